"""GateCallback in transformers.Trainer: no subclass, accumulation, evaluation, resume."""

import copy

import pytest
import torch
from interrupted import NoFinish, StopAt, same
from letters import letter_tokenizer
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

import gatepack as gp
from gatepack.callback import BESIDE, FILE, GateCallback
from gatepack.files import read_safetensors
from gatepack.gate_training import GateSchedule

CONFIG = gp.GateConfig(noise=0.1, target=0.5, width_multiple=4, seed=3)


def dataset(n=24):
    rows = token_ids(n, 6)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, callback=None, model=None, callbacks=(), **arguments):
    model = tiny_model("llama", torch.float32) if model is None else model
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    callback = GateCallback(CONFIG) if callback is None else callback
    return Trainer(
        model,
        TrainingArguments(**settings | arguments),
        train_dataset=dataset(),
        eval_dataset=dataset(4),
        callbacks=[callback, *callbacks],
    )


def test_trains_to_the_target_evaluates_and_packs(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=6)
    run.train()
    gates = gp.gates_of(run.model)
    assert gates.frozen and abs(gates.kept_fraction() - 0.5) <= 0.005
    logged = [entry for entry in run.state.log_history if "gates/kept_fraction" in entry]
    assert logged and 0 < logged[-1]["gates/kept_fraction"] <= 1
    assert any("eval_loss" in entry for entry in run.state.log_history)
    before = run.evaluate()["eval_loss"]
    gp.pack(run.model)
    assert run.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-4)


def test_the_trainers_optimizer_never_holds_the_logits(tmp_path):
    run = trainer(tmp_path)
    run.train()
    logits = gp.gates_of(run.model).logits
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert held and not any(p is logits for p in held)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_gate_step_per_optimizer_step(accumulation, tmp_path):
    callback = GateCallback(CONFIG, GateSchedule(freeze=1.0))
    run = trainer(tmp_path, callback, gradient_accumulation_steps=accumulation, max_steps=4)
    run.train()
    assert callback.training.done == 4
    assert gp.gates_of(run.model).controller.steps == 4
    assert int(gp.gates_of(run.model).draws) == 4 * accumulation


@pytest.mark.parametrize("cut", [5, 10])
def test_resume_is_bit_exact(cut, tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "cut", NoFinish(CONFIG), callbacks=[StopAt(cut)]).train()
    assert (tmp_path / "cut" / f"checkpoint-{cut}" / FILE).is_file()
    second = trainer(tmp_path / "cut")
    second.train(resume_from_checkpoint=True)
    same(second.model.state_dict(), whole.model.state_dict())


def test_resume_without_the_file_says_how(tmp_path):
    trainer(tmp_path, NoFinish(CONFIG), callbacks=[StopAt(5)]).train()
    (tmp_path / "checkpoint-5" / FILE).unlink()
    with pytest.raises(ValueError, match=r"is missing: .*GateCallback\(resume_from="):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    trainer(tmp_path, NoFinish(CONFIG), callbacks=[StopAt(5)]).train()
    closing = gp.methods.CloseAndRepair(CONFIG, bars=False)
    other = trainer(tmp_path, GateCallback(closing, batches=[token_ids()]))
    with pytest.raises(ValueError, match="of a training by GateRecipe, not by CloseAndRepair"):
        other.train(resume_from_checkpoint=True)


def test_lora_beside_gates(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(tiny_model("llama", torch.float32), lora)
    run = trainer(tmp_path, model=model)
    frozen = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.clone()
    run.train()
    gates = gp.gates_of(model)
    assert abs(gates.kept_fraction() - 0.5) <= 0.005
    up = model.get_base_model().model.layers[0].mlp.up_proj
    assert torch.equal(up.base_layer.weight, frozen)
    assert up.lora_B["default"].weight.abs().max() > 0


def partly_trained_lora(*targets):
    """LoRA on a model of which a norm and two weights train, one of them repaired by closings."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=list(targets))
    model = peft.get_peft_model(tiny_model("llama", torch.float32), lora)
    layer = model.get_base_model().model.layers[0]
    down = getattr(layer.mlp.down_proj, "base_layer", layer.mlp.down_proj)
    for part in (down, layer.mlp.up_proj, layer.input_layernorm):
        part.weight.requires_grad_(True)
    return model


CLOSING = gp.methods.CloseAndRepair(
    gp.GateConfig(noise=0.0, target=0.6, width_multiple=4, equal_layers=False),
    close=(0.25, 0.5), bars=False,
)  # fmt: skip
PRUNING = gp.methods.FLAP(
    gates=gp.GateConfig(noise=0.0, target=0.7, width_multiple=2, equal_layers=False)
)


@pytest.mark.parametrize(
    ("method", "distillation", "targets"),
    [
        (CONFIG, None, ("q_proj", "down_proj")),
        (CONFIG, gp.Distillation(), ("q_proj", "down_proj")),
        (CLOSING, None, ("q_proj", "down_proj")),
        (CLOSING, gp.Distillation(), ("q_proj", "down_proj")),
        (PRUNING, None, ("lm_head",)),
    ],
    ids=["gates", "gates-distilled", "closing", "closing-distilled", "pruning"],
)
def test_what_trains_beside_lora_is_resumed(method, distillation, targets, tmp_path):
    inputs = {
        "batches": [{"input_ids": ids, "labels": ids} for ids in (token_ids(4, 9),)],
        "distillation": distillation,
    }
    whole = trainer(
        tmp_path / "whole", GateCallback(method, **inputs), partly_trained_lora(*targets)
    )
    whole.train()
    cut = NoFinish(method, **inputs)
    trainer(tmp_path / "cut", cut, partly_trained_lora(*targets), [StopAt(7)]).train()
    kept, _ = read_safetensors(tmp_path / "cut" / "checkpoint-7" / FILE)
    beside = sorted(key for key in kept if key.startswith(BESIDE))
    parts = [f"layers.0.{name}." for name in ("input_layernorm", "mlp.down_proj", "mlp.up_proj")]
    assert all(sum(part in key for part in parts) == 1 for key in beside)
    assert len(beside) == (5 if method is PRUNING else 3)  # FLAP adds two biases
    assert "closed.model.layers.0.mlp.down_proj" not in kept  # it trains, and is kept once
    second = trainer(
        tmp_path / "cut", GateCallback(method, **inputs), partly_trained_lora(*targets)
    )
    second.train(resume_from_checkpoint=True)
    same(second.model.state_dict(), whole.model.state_dict())


def test_gates_of_a_frozen_model(tmp_path):
    model = tiny_model("llama", torch.float32).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    callback = GateCallback(CONFIG, GateSchedule(freeze=1.0))
    trainer(tmp_path, callback, model, weight_decay=0.5, learning_rate=0.5).train()
    assert abs(gp.gates_of(model).kept_fraction() - 0.5) <= 0.005
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


class TestTRL:
    """TRL's trainers, on rows that each of them takes."""

    @staticmethod
    def check(name, model, folder, rows, batch=2, settings=(), **inputs):
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        tokenizer = letter_tokenizer()
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
        arguments = getattr(trl, f"{name}Config")(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=batch, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, logging_steps=2,
            **dict(settings),
        )  # fmt: skip
        callback = GateCallback(CONFIG)
        run = getattr(trl, f"{name}Trainer")(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tokenizer, callbacks=[callback], **inputs,
        )  # fmt: skip
        seen = []

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **_):
                seen.append(gates.value_grads().abs().max() > 0)

        run.add_callback(Gradients())
        gates = gp.gates_of(model)
        run.train()
        assert len(seen) == callback.training.done == 8 and all(seen)
        assert gates.frozen and abs(gates.kept_fraction() - 0.5) <= 0.005
        logged = [entry for entry in run.state.log_history if "gates/kept_fraction" in entry]
        assert logged[0]["gates/kept_fraction"] == 1 and logged[-1]["gates/kept_fraction"] < 0.6
        with torch.no_grad():
            expected = model.eval()(token_ids()).logits
            gp.pack(model)
            torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
        return run

    def test_sft(self, tmp_path):
        skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        rows = {"input_ids": token_ids(24, 6).tolist()}
        self.check("SFT", tiny_model("llama", torch.float32), tmp_path, rows, settings=skip)

    def test_dpo(self, tmp_path):
        model = tiny_model("llama", torch.float32)
        rows = {"prompt": ["ab: "] * 16, "chosen": ["yes"] * 16, "rejected": ["nope!"] * 16}
        reference = copy.deepcopy(model)
        before = reference(token_ids()).logits.detach()
        run = self.check("DPO", model, tmp_path, rows, ref_model=reference)
        assert torch.equal(reference(token_ids()).logits, before)
        margins = [e["rewards/margins"] for e in run.state.log_history if "rewards/margins" in e]
        assert margins[-1] > margins[0]

    def test_grpo(self, tmp_path):
        def letters(completions, **_):
            # Hardly ever equal: texts of one reward bring no gradient.
            return [sum(map(ord, completion)) / 500 for completion in completions]

        model = tiny_model("llama", torch.float32)
        rows = {"prompt": [f"{letter}: " for letter in "abcdefghijklmnop"]}
        settings = {"num_generations": 4, "max_completion_length": 6}
        self.check("GRPO", model, tmp_path, rows, batch=4, settings=settings, reward_funcs=letters)


def test_gates_that_are_there_are_kept_or_refused(tmp_path):
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, CONFIG)
    trainer(tmp_path, GateCallback(), model=model)
    assert gp.gates_of(model) is gates
    other = gp.GateConfig(target=0.9)
    with pytest.raises(ValueError, match="config: the model already has gates"):
        trainer(tmp_path, GateCallback(other), model=model)


def test_an_optimizer_that_holds_the_logits_is_refused(tmp_path):
    model = tiny_model("llama", torch.float32)
    gp.attach(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True),
        train_dataset=dataset(),
        callbacks=[GateCallback()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(ValueError, match="already holds the gates' logits"):
        run.train()


class Interrupt(TrainerCallback):
    """Ctrl-C after a step, once."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", [CONFIG, gp.methods.FineGates(budget=0.7, learning_rate=0.05)])
def test_a_rerun_after_an_interrupt_trains_the_gates_by_the_loss(method, tmp_path):
    callback = GateCallback(method)
    run = trainer(tmp_path, callback, callbacks=[Interrupt(3)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    interrupted, seen = callback.training, []

    class Gradients(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                callback.training.step = lambda scale: seen.append(callback.training.gradient)

    run.add_callback(Gradients())
    run.train()
    assert callback.training is not interrupted and interrupted.gradient is None
    assert all(gradient.abs().max() > 0 for gradient in seen) and len(seen) == 11


@pytest.mark.parametrize("method", [CONFIG, gp.methods.FineGates()])
def test_a_model_that_model_init_makes_anew_is_refused(method, tmp_path):
    run = Trainer(
        model_init=lambda: tiny_model("llama", torch.float32),
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True),
        train_dataset=dataset(),
        callbacks=[GateCallback(method)],
    )
    with pytest.raises(ValueError, match=r"model_init makes it anew: pass Trainer\(model=...\)"):
        run.train()


def test_one_shot_method_prunes_before_the_trainer_tunes(tmp_path):
    gates = gp.GateConfig(noise=0.0, target=0.7, width_multiple=2, equal_layers=False)
    calibration = [token_ids(4, 9)]
    model = tiny_model("llama", torch.float32)
    method = gp.methods.FLAP(gates=gates)
    run = trainer(tmp_path, GateCallback(method, batches=calibration), model=model)
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, gp.PackedLinear)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_what_is_not_a_method_is_refused():
    with pytest.raises(ValueError, match="method: expected a GateConfig or a method of"):
        GateCallback(0.5)
    with pytest.raises(ValueError, match="got <class 'gatepack.methods.*FLAP'>"):
        GateCallback(gp.methods.FLAP)
    with pytest.raises(ValueError, match="schedule: expected None with a FLAP, got one"):
        GateCallback(gp.methods.FLAP(), GateSchedule())
    with pytest.raises(ValueError, match="schedule: expected a GateSchedule or None, got 0.3"):
        GateCallback(schedule=0.3)
    with pytest.raises(ValueError, match="distillation: expected a Distillation or None, got True"):
        GateCallback(distillation=True)
