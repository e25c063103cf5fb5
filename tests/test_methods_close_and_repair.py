"""CloseAndRepair: the recipe's closing at one step of any loop or Trainer, resumed, refused."""

import copy
import dataclasses

import pytest
import torch
from interrupted import NoFinish, StopAt
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainingArguments

import gatepack as gp
from gatepack import distillation
from gatepack.methods import CloseAndRepair, close_and_repair
from gatepack.methods.one_shot import run_beside_lora
from gatepack.training import FineTuning, TrainConfig, close_to_budget

STEPS = 6
GATES = gp.GateConfig(target=0.6, noise=0.0, width_multiple=4, equal_layers=False)
METHOD = CloseAndRepair(GATES, close=0.5, calibration_batches=2, bars=False)


def labelled(count, seed=0):
    """Batches of padded rows with a label each."""
    found = []
    for step in range(count):
        ids = token_ids(4, 8, seed=seed + step)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.sum(1) % 2})
    return found


def texts(count, seed=0):
    rows = [token_ids(4, 8, seed=seed + step) for step in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


BATCHES = {"bert": labelled, "llama": texts}


def train(model, training, loader, closing=None, until=STEPS):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step, batch in enumerate(loader[:until]):
        if closing is not None and step == closing[0]:
            closing[1]()
        model.train()(**batch).loss.backward()
        if training is not None:
            training.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", BATCHES)
@pytest.mark.parametrize(("close", "step"), [(0.0, 0), (0.5, 3), (0.6, 4)])
def test_is_close_to_budget_before_that_step(family, close, step):
    loader, calibration = BATCHES[family](STEPS), BATCHES[family](3, seed=40)
    model = tiny_model(family, torch.float32)
    twin = copy.deepcopy(model)
    method = CloseAndRepair(GATES, close=close, calibration_batches=2, bars=False)
    training = method.start(model, STEPS, calibration)
    train(model, training, loader)
    assert training.finish() == gp.gates_of(model).kept_fraction()
    gates = gp.attach(twin, GATES)
    gates.freeze()
    settings = TrainConfig(calibration_batches=2, repair_batches=3)
    train(twin, None, loader, (step, lambda: close_to_budget(twin, calibration, settings)))
    assert abs(gates.kept_fraction() - 0.6) <= 0.005
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_only_a_training_forward_closes_and_only_once(monkeypatch):
    model = tiny_model("llama", torch.float32)
    training = CloseAndRepair(GATES, close=0.0, bars=False).start(model, STEPS, texts(2))
    model.eval()(token_ids())
    assert not training.closed and gp.gates_of(model).kept_fraction() == 1
    model.train()(token_ids())
    assert training.closed and abs(gp.gates_of(model).kept_fraction() - 0.6) <= 0.005
    monkeypatch.setattr(training, "_close", lambda: pytest.fail("closed again"))
    model.train()(token_ids())
    training.begin_step()
    assert abs(training.finish() - 0.6) <= 0.005


def test_several_closings_remove_equal_parts():
    model, kept = tiny_model("llama", torch.float32), []
    method = dataclasses.replace(METHOD, close=(0.9, 0.0, 0.5))
    training = method.start(model, STEPS, texts(3))
    for _ in range(STEPS):
        model.train()(**texts(1)[0])
        training.step()
        kept.append(gp.gates_of(model).kept_fraction())
    parts = [1 - 0.4 / 3] * 3 + [1 - 0.8 / 3] * 2 + [0.6]
    assert kept == pytest.approx(parts, abs=0.005)
    assert training.closed and training.finish() == kept[-1]


def test_closings_that_are_due_together_are_one(monkeypatch):
    model, targets = tiny_model("llama", torch.float32), []
    real = close_and_repair.close_to_budget

    def recorded(model, batches, settings, progress, target):
        targets.append(target)
        return real(model, batches, settings, progress, target)

    monkeypatch.setattr(close_and_repair, "close_to_budget", recorded)
    method = dataclasses.replace(METHOD, close=(0.1, 0.2, 1.0))
    training = method.start(model, 2, texts(3))
    for _ in range(2):
        model.train()(**texts(1)[0])
        training.step()
    assert training.finish() == pytest.approx(0.6, abs=0.005)
    assert targets == [pytest.approx(1 - 0.8 / 3), None]


def test_a_rerun_on_the_same_model_goes_on_from_its_closings():
    model = tiny_model("bert", torch.float32)
    method = dataclasses.replace(METHOD, close=(0.0, 0.5))
    interrupted = method.start(model, STEPS, labelled(3))
    train(model, interrupted, labelled(STEPS), until=2)
    assert gp.gates_of(model).kept_fraction() == pytest.approx(0.8, abs=0.005)
    state = copy.deepcopy(interrupted.state_dict())
    training = method.start(model, STEPS, labelled(3))
    assert training.closings == 1 and not training.closed
    train(model, training, labelled(STEPS))
    assert training.finish() == pytest.approx(0.6, abs=0.005)
    training.load_state_dict(state)
    assert training.closings == 1
    assert gp.gates_of(model).kept_fraction() == pytest.approx(0.8, abs=0.005)


def test_repairs_on_as_many_batches_as_asked(monkeypatch):
    seen = []

    def recorded(model, batches, settings, progress, target):
        seen.append((settings.calibration_batches, settings.repaired))

    monkeypatch.setattr(close_and_repair, "close_to_budget", recorded)
    for repair in (None, 2):
        method = dataclasses.replace(METHOD, close=0.0, repair_batches=repair)
        method.start(tiny_model("llama", torch.float32), STEPS, texts(5)).begin_step()
    assert seen == [(2, 5), (2, 2)]


def test_the_autocast_of_the_training_forward_is_not_that_of_the_closing():
    found = []
    for enabled in (False, True):
        model = tiny_model("llama", torch.float32)
        CloseAndRepair(GATES, close=0.0, bars=False).start(model, STEPS, texts(3))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.train()(token_ids())
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_a_training_that_ends_early_is_closed_by_finish():
    model = tiny_model("bert", torch.float32)
    training = METHOD.start(model, STEPS, labelled(3))
    train(model, training, labelled(STEPS), until=2)
    assert gp.gates_of(model).kept_fraction() == 1
    assert abs(training.finish() - 0.6) <= 0.005


def test_weights_of_before_that_are_loaded_at_the_end_are_closed_too():
    model = tiny_model("bert", torch.float32)
    training = METHOD.start(model, STEPS, labelled(3))
    best = copy.deepcopy(model.state_dict())
    train(model, training, labelled(STEPS))
    model.load_state_dict(best)
    assert gp.gates_of(model).kept_fraction() == 1
    assert abs(training.finish() - 0.6) <= 0.005


def test_a_rerun_takes_the_place_of_an_interrupted_one():
    model = tiny_model("bert", torch.float32)
    interrupted = METHOD.start(model, STEPS, labelled(3))
    train(model, interrupted, labelled(STEPS), until=2)
    training = METHOD.start(model, STEPS, labelled(3))
    train(model, training, labelled(STEPS))
    assert training.closed and not interrupted.closed


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
        callbacks=[callback, *callbacks],
    )


def with_lora(family="bert"):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    return peft.get_peft_model(tiny_model(family, torch.float32), lora)


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


@pytest.mark.parametrize(("close", "cut"), [(0.5, 2), (0.5, 6), ((0.25, 0.75), 4)])
@pytest.mark.parametrize("make", [lambda: None, with_lora], ids=["all", "lora"])
def test_resume_is_bit_exact(make, close, cut, tmp_path):
    method = dataclasses.replace(METHOD, close=close)
    whole = trainer(tmp_path / "whole", make(), method=method)
    whole.train()
    trainer(tmp_path / "cut", make(), NoFinish, [StopAt(cut)], method=method).train()
    second = trainer(tmp_path / "cut", make(), method=method)
    second.train(resume_from_checkpoint=True)
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


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


def test_beside_lora_cut_off_and_resumed(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    windows = token_ids(16, 8)
    settings = TrainConfig(steps=STEPS, batch_size=2, window=8, lora_rank=2, calibration_batches=3)

    def run(folder, on_step=None):
        model = tiny_model("llama", torch.float32)
        return run_beside_lora(METHOD, model, windows, settings, folder, on_step)

    def kill(run: FineTuning) -> None:
        if run.step == 4:
            run.save()
            raise RuntimeError("killed")

    whole = run(tmp_path / "whole")
    assert abs(whole.report.kept_fraction - 0.6) <= 0.005
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", kill)
    again = run(tmp_path / "cut")
    assert again.losses == whole.losses
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"close": 1.5}, r"close: expected fractions of all steps, got 1.5"),
            ({"close": "half"}, r"close: expected fractions of all steps, got 'half'"),
            ({"close": (0.2, -0.1)}, r"close: expected fractions of all steps, got \(0.2, -0.1\)"),
            ({"close": ()}, r"close: expected fractions of all steps, got \(\)"),
            ({"repair_batches": 0}, "repair_batches must be >= 1, got 0"),
            ({"calibration_batches": 0}, "calibration_batches must be >= 1, got 0"),
            ({"autocast": "fp16"}, "autocast must be None or 'bfloat16', got 'fp16'"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            CloseAndRepair(**fields)

    def test_no_batches(self, tmp_path):
        model = tiny_model("bert", torch.float32)
        with pytest.raises(ValueError, match="batches must hold at least one batch"):
            METHOD.start(model, STEPS)
        with pytest.raises(ValueError, match="batches must hold at least one batch"):
            Trainer(
                model,
                TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
                callbacks=[gp.GateCallback(METHOD)],
            )
        assert not hasattr(model, "gatepack_gates") and not hasattr(model.config, "gatepack")

    def test_rows_and_columns(self):
        model = tiny_model("bert", torch.float32)
        gp.attach(model, gp.GateConfig(units=("rows",)))
        with pytest.raises(ValueError, match=r"for CloseAndRepair, got \('rows',\)"):
            METHOD.start(model, STEPS, labelled(1))

    def test_a_target_out_of_reach(self):
        config = gp.GateConfig(target=0.001, noise=0.0, units=("heads",))
        model = tiny_model("bert", torch.float32)
        with pytest.raises(ValueError, match="target"):
            CloseAndRepair(config).start(model, STEPS, labelled(1))
        assert not hasattr(model.config, "gatepack")
        gp.attach(model, GATES)  # which a model with gates would refuse

    def test_gates_that_are_partly_closed(self):
        model = tiny_model("bert", torch.float32)
        gates = gp.attach(model, GATES)
        gates.close(next(iter(gates)), [0])
        with pytest.raises(ValueError, match="needs every gate open and exactly 1"):
            METHOD.start(model, STEPS, labelled(1))

    def test_a_state_of_before_on_a_model_that_is_closed(self):
        model = tiny_model("bert", torch.float32)
        training = METHOD.start(model, STEPS, labelled(3))
        before = training.state_dict()
        train(model, training, labelled(STEPS))
        with pytest.raises(ValueError, match=r"state: is of before .*: load the model anew"):
            training.load_state_dict(before)
        assert training.closed and training.done == STEPS

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda s: s.pop("done"), r"state: done must be \[\], got None"),
            (lambda s: s.update(closings=torch.tensor(2)), "closings must be 0 to 1, got 2"),
            (lambda s: s.pop("closed.gates.logits"), r"closed\.gates\.logits must be .* got None"),
            (
                lambda s: s.update({"closed.gates.closed": torch.zeros(3)}),
                r"closed\.gates\.closed must be \[\d+\], got \[3\]",
            ),
        ],
    )
    def test_a_state_that_is_damaged(self, damage, message):
        model = tiny_model("bert", torch.float32)
        training = METHOD.start(model, STEPS, labelled(3))
        train(model, training, labelled(STEPS))
        state = training.state_dict()
        damage(state)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            training.load_state_dict(state)
        for name, tensor in model.state_dict().items():
            assert torch.equal(before[name], tensor), name
