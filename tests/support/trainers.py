"""A method of every kind for the tests of Trainers, and a run that is cut off and resumed."""

import pytest
import torch
from closing import GATES
from interrupted import NoFinish, StopAt, same
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainingArguments

import gatepack as gp
from gatepack.callback import GateCallback
from gatepack.methods import ATP, CloseAndRepair, FineGates

STEPS = 8
# (method, the kept fraction to end at): gates close before the step at which a run is cut off and
# after it.
METHODS = {
    "gates": (gp.GateConfig(noise=0.1, target=0.5, width_multiple=4, seed=3), 0.5),
    "fine_gates": (FineGates(budget=0.7, learning_rate=0.05, freeze=0.75, trains="all"), 0.7),
    "atp": (ATP(target=0.6, lora_rank=3, generator_rate=1e-2), 0.6),
    "close_and_repair": (CloseAndRepair(GATES, close=(0.25, 0.5), bars=False), 0.6),
}
CUT = 3


def callback_of(name, kind=GateCallback, **fields):
    """A callback with a method of METHODS, and with text for those that look at some."""
    if name == "atp":
        pytest.importorskip("peft")
    batches = [token_ids(3, 7, seed=100 + i) for i in range(2)]
    return kind(METHODS[name][0], batches=batches, **fields)


def trainer(name, folder, kind=GateCallback, callbacks=(), **arguments):
    """A Trainer of a tiny Llama in fp32, which logs every step."""
    settings = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=5,
        learning_rate=1e-3, **arguments,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in token_ids(24, 6)]
    return Trainer(
        tiny_model("llama", torch.float32),
        settings,
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[callback_of(name, kind), *callbacks],
    )


def training_of(trainer):
    callbacks = trainer.callback_handler.callbacks
    return next(each for each in callbacks if isinstance(each, GateCallback)).training


def cut_off_and_resumed(make, folder):
    """(a whole run, one that was cut off and resumed), equal in weights and gates.

    make: (folder, kind of callback, more callbacks) -> Trainer.
    """
    whole = make(folder / "whole", GateCallback, [])
    whole.train()
    make(folder / "cut", NoFinish, [StopAt(CUT)]).train()
    resumed = make(folder / "cut", GateCallback, [])
    resumed.train(resume_from_checkpoint=True)
    assert training_of(whole).done == training_of(resumed).done == STEPS
    same(resumed.model.state_dict(), whole.model.state_dict())
    same(training_of(resumed).state_dict(), training_of(whole).state_dict())
    return whole, resumed


def logged(trainer, name):
    """step -> what was logged under a name."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
