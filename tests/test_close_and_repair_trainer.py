"""CloseAndRepair in a Trainer: resumed, distilled, and the best model of a run."""

import copy
import dataclasses

import pytest
import torch
from closing import METHOD, labelled, with_lora
from interrupted import NoFinish, StopAt, same
from tiny import tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import gatepack as gp
from gatepack import distillation


def trainer(
    folder, model=None, callback=None, callbacks=(), distil=None, method=METHOD, **arguments
):
    model = tiny_model("bert", torch.float32) if model is None else model
    of_one = [
        {name: tensor[row] for name, tensor in batch.items()}
        for batch in labelled(6)
        for row in range(4)
    ]
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2,
        "learning_rate": 1e-3, "logging_steps": 2, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 5,
    }  # fmt: skip
    kind = gp.GateCallback if callback is None else callback
    callback = kind(method, batches=labelled(3, seed=40), distillation=distil)
    return Trainer(
        model,
        TrainingArguments(**settings | arguments),
        train_dataset=of_one,
        eval_dataset=of_one,
        callbacks=[callback, *callbacks],
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_in_a_trainer(accumulation, tmp_path):
    run = trainer(tmp_path, gradient_accumulation_steps=accumulation)
    run.train()
    logged = [e["gates/kept_fraction"] for e in run.state.log_history if "loss" in e]
    assert logged[:2] == [1.0, 1.0] and all(abs(kept - 0.6) <= 0.005 for kept in logged[2:])
    batch = labelled(1)[0]
    before = run.model.eval()(**batch).logits
    report = gp.pack(run.model)
    assert abs(report.kept_fraction - 0.6) <= 0.005
    torch.testing.assert_close(run.model(**batch).logits, before, rtol=1e-4, atol=1e-5)


def test_dora_is_merged_and_packed(tmp_path):
    model = with_lora(use_dora=True)
    magnitudes = {name: p for name, p in model.named_parameters() if "magnitude" in name}
    before = {name: parameter.detach().clone() for name, parameter in magnitudes.items()}
    trainer(tmp_path, model, learning_rate=1e-2).train()
    assert len(magnitudes) == 6 * model.config.num_hidden_layers + 1  # and the pooler's
    assert not any(torch.equal(magnitudes[name], tensor) for name, tensor in before.items())
    batch = labelled(1)[0]
    expected = model.eval()(**batch).logits
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, expected, rtol=1e-2, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    report = gp.pack(merged)
    assert abs(report.kept_fraction - 0.6) <= 0.005
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("close", "cut"), [(0.5, 2), (0.5, 6), ((0.25, 0.75), 4)])
@pytest.mark.parametrize("make", [lambda: None, with_lora], ids=["all", "lora"])
def test_resume_is_bit_exact(make, close, cut, tmp_path):
    method = dataclasses.replace(METHOD, close=close)
    whole = trainer(tmp_path / "whole", make(), method=method)
    whole.train()
    trainer(tmp_path / "cut", make(), NoFinish, [StopAt(cut)], method=method).train()
    second = trainer(tmp_path / "cut", make(), method=method)
    second.train(resume_from_checkpoint=True)
    same(second.model.state_dict(), whole.model.state_dict())


def test_a_trainers_checkpoint_leaves_trained_weights_to_the_trainer(tmp_path):
    def state_of(run):
        run.train()
        found = (getattr(each, "training", None) for each in run.callback_handler.callbacks)
        return next(filter(None, found)).state_dict()

    fixed = {"closed.gates.logits", "closed.gates.closed"}
    assert set(state_of(trainer(tmp_path))) == {"done", "closings", *fixed}
    model = with_lora()
    state = state_of(trainer(tmp_path, model))
    assert len(set(state) - {"done", "closings", *fixed}) == 2 * model.config.num_hidden_layers


def test_the_teacher_stays_the_dense_model(tmp_path, monkeypatch):
    model = with_lora()
    dense = copy.deepcopy(model.get_base_model()).eval()
    seen, given = [], []
    divergence = distillation.divergence

    def recorded(student, teacher, *args):
        seen.append(teacher)
        return divergence(student, teacher, *args)

    monkeypatch.setattr(distillation, "divergence", recorded)
    run = trainer(tmp_path, model, distil=gp.Distillation())
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs) if module.training else None,
        with_kwargs=True,
    )
    run.train()
    assert len(seen) == len(given) == 8
    for teacher, kwargs in zip(seen, given, strict=True):
        expected = dense(kwargs["input_ids"], attention_mask=kwargs["attention_mask"]).logits
        torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: None, with_lora], ids=["all", "lora"])
@pytest.mark.parametrize(("best", "chosen"), [(2, 6), (6, 6), (7, 7)])
def test_the_best_model_is_one_of_the_last_size(make, best, chosen, tmp_path):
    """Gates close before the third and the fifth step; all later models have the last size."""
    method, models = dataclasses.replace(METHOD, close=(0.25, 0.5)), {}

    class Recorded(TrainerCallback):
        def on_save(self, args, state, control, model, **_):
            models[state.global_step] = model.eval()(**labelled(1)[0]).logits.detach()

    run = trainer(
        tmp_path, make(), method=method, callbacks=[Recorded()], save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="chosen", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    order = [best, chosen]
    run.compute_metrics = lambda _: {"chosen": order.count(run.state.global_step)}
    run.train()
    assert run.state.best_model_checkpoint.endswith(f"-{chosen}")
    logits = run.model.eval()(**labelled(1)[0]).logits
    torch.testing.assert_close(logits, models[chosen], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits, models[8], rtol=1e-3, atol=1e-4)
