"""Whole runs of ATP: where they end, how they resume, in a Trainer and beside PEFT's LoRA."""

import copy

import pytest
import torch
from atp_training import FAST, STEPS, batches_of, generator_batches, started, train
from interrupted import NoFinish, StopAt, same
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

import gatepack as gp
from gatepack.methods import ATP
from gatepack.methods.group_lasso import lasso

pytest.importorskip("peft")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("final", ["budget", "sample"])
def test_recipe_ends_at_the_target_and_packs(family, final, tmp_path):
    model = tiny_model(family, torch.float32).train()
    training = ATP(**{**FAST, "final": final}).start(model, STEPS, batches_of(model))
    assert float(training.metrics()["gates/kept_fraction"]) == 1.0
    train(model, training)
    kept = training.finish()
    assert training.finish() == kept < 1
    if final == "budget":
        assert abs(kept - 0.6) <= 0.005
    ids = token_ids()
    expected = model.eval()(ids).logits.detach()
    gp.pack(model)
    packed = model(ids).logits.detach()
    torch.testing.assert_close(packed, expected, rtol=1e-3, atol=1e-3)
    gp.save_pretrained(model, tmp_path)
    assert torch.equal(gp.from_pretrained(tmp_path).eval()(ids).logits, packed)


def test_generator_meets_the_budget_and_its_masks_change():
    model, training = started("llama", torch.float32, 60, decide=False, freeze=1.0)
    first = training.decisions.hard.clone()
    train(model, training, until=59)
    assert training.budget_loss < 0.2 and not torch.equal(training.decisions.hard, first)


@pytest.mark.parametrize("regulariser", ["lasso", "proximal"])
def test_resumes_bit_for_bit(regulariser):
    def fresh():
        torch.manual_seed(0)
        fields = {"regulariser": regulariser, "generator_dropout": 0.1}
        return started("llama", torch.float32, decide=False, **fields)

    whole, training = fresh()
    train(whole, training)
    for cut in (4, 9):
        first, training = fresh()
        optimizer = train(first, training, until=cut)
        second, resumed = fresh()
        second.load_state_dict(first.state_dict())
        resumed.load_state_dict(copy.deepcopy(training.state_dict()))
        again = torch.optim.AdamW(resumed.weights(), lr=1e-2)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(second, resumed, again)
        for (name, a), b in zip(
            whole.state_dict().items(), second.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


def trainer(folder, callback, callbacks=(), model=None, **arguments):
    rows = [{"input_ids": row, "labels": row} for row in token_ids(24, 6)]
    return Trainer(
        tiny_model("llama", torch.float32) if model is None else model,
        TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=2, seed=5,
            **{"max_steps": 8, **arguments},
        ),
        train_dataset=rows,
        callbacks=[callback, *callbacks],
    )  # fmt: skip


def with_own_adapters():
    import peft

    torch.manual_seed(7)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    return peft.get_peft_model(tiny_model("llama", torch.float32), lora)


@pytest.mark.parametrize(
    ("cut", "regulariser", "accumulation", "brings_adapters"),
    [
        (3, "lasso", 1, False),
        (3, "proximal", 2, True),
        (4, "lasso", 2, True),  # decisions are fixed by step 4
        (4, "proximal", 1, False),
        (6, "lasso", 2, False),
        (6, "proximal", 1, True),
    ],
)
def test_in_a_trainer_with_resume(cut, regulariser, accumulation, brings_adapters, tmp_path):
    fields = {"lora_dropout": 0.1, "regulariser": regulariser, "proximal_rate": 1e-7}
    method = ATP(**{**FAST, **fields})

    def run(folder, callback, *callbacks):
        model = with_own_adapters() if brings_adapters else None
        callback = callback(method, batches=generator_batches())
        arguments = {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-3}
        return trainer(tmp_path / folder, callback, callbacks, model, **arguments)

    whole = run("whole", gp.GateCallback)
    whole.train()
    assert any("gates/budget_loss" in entry for entry in whole.state.log_history)
    run("cut", NoFinish, StopAt(cut)).train()
    second = run("cut", gp.GateCallback)
    second.train(resume_from_checkpoint=True)
    same(second.model.state_dict(), whole.model.state_dict())
    model = second.model.merge_and_unload() if brings_adapters else second.model
    assert abs(gp.pack(model).kept_fraction - 0.6) <= 0.005


class Scaled(TrainerCallback):
    """Makes an accelerator scale and unscale as it does for fp16, but on a CPU, without autocast.

    Of each step it notes LoRA's gradients as the optimizer gets them.
    """

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model=None, **_):
        self.accelerator.native_amp = True

    def on_optimizer_step(self, args, state, control, model=None, **_):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append(grads)


def run_scaled(folder, monkeypatch, scale, regulariser="lasso", **arguments):
    """(LoRA's gradients by step, trainer) of a run whose decisions are fixed after 2 steps."""
    method = ATP(**{**FAST, "freeze": 0.25, "regulariser": regulariser})
    callback, notes = gp.GateCallback(method, batches=generator_batches()), Scaled()
    run = trainer(folder, callback, [notes], **arguments)
    notes.accelerator = run.accelerator
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(type(run.accelerator), "mixed_precision", "fp16")
    run.train()
    assert run.accelerator.scaler.get_scale() == scale
    return notes.steps, callback


@pytest.mark.parametrize("arguments", [{"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}])
def test_a_grad_scaler_changes_nothing(arguments, tmp_path, monkeypatch):
    plain, _ = run_scaled(tmp_path, monkeypatch, 1.0, **arguments)
    scaled, _ = run_scaled(tmp_path, monkeypatch, 2.0**10, **arguments)
    for ours, expected in zip(scaled, plain, strict=True):
        for name, grad in expected.items():
            torch.testing.assert_close(ours[name], grad, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lasso_counts_once_and_is_clipped(accumulation, tmp_path, monkeypatch):
    """At a rate of 0, so that the weights of all runs are those that training begins with."""
    fields = {"gradient_accumulation_steps": accumulation, "max_steps": 2, "learning_rate": 0.0}

    def last_step(regulariser, clip):
        arguments = {**fields, "max_grad_norm": clip}
        steps, callback = run_scaled(tmp_path, monkeypatch, 2.0**10, regulariser, **arguments)
        return steps[1], callback.training

    without, _ = last_step("none", 0.0)
    found, training = last_step("lasso", 0.0)
    clipped, _ = last_step("lasso", 0.1)
    fresh = trainer(tmp_path, gp.GateCallback(ATP(**FAST), batches=generator_batches())).model
    (100 * lasso(fresh, training.decisions)).backward()
    pushed = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(pushed) == 4  # A of both layers' out and down linears: every B is still 0
    norm = torch.stack([grad.norm() for grad in found.values()]).norm()
    for name, grad in found.items():
        expected = without[name] + pushed.get(name, 0.0)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clipped[name], grad * 0.1 / norm, rtol=1e-3, atol=1e-7)


def test_peft_model_keeps_its_adapters():
    import peft

    lora = peft.LoraConfig(r=2, target_modules="all-linear", lora_alpha=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama", torch.float32), lora).train()
    training = ATP(**FAST).start(model, STEPS, generator_batches())
    ids = token_ids(4, 8)
    optimizer = torch.optim.AdamW(training.weights(), lr=1e-3)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        training.step()
        optimizer.step()
        optimizer.zero_grad()
    training.finish()
    expected = model.eval()(ids).logits.detach()
    plain = model.merge_and_unload()
    report = gp.pack(plain)
    assert abs(report.kept_fraction - 0.6) <= 0.005
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("brings_adapters", [False, True])
def test_the_newest_training_alone_decides(brings_adapters):
    import peft

    model = tiny_model("llama", torch.float32).train()
    if brings_adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    method = ATP(**FAST)
    earlier = method.start(model, STEPS, generator_batches())
    train(model, earlier, until=2)
    training = method.start(model, STEPS, generator_batches())
    for use in (earlier.step, earlier.finish):
        with pytest.raises(RuntimeError, match="a newer training of ATP has begun"):
            use()
    train(model, training)
    assert abs(training.finish() - 0.6) <= 0.005
    if brings_adapters:
        model = model.merge_and_unload()
    assert abs(gp.pack(model).kept_fraction - 0.6) <= 0.005
    assert model(input_ids=token_ids(2, 6)).logits.isfinite().all()
