"""CloseAndRepair: the recipe's closings in any loop, beside a distillation, resumed, refused."""

import copy
import dataclasses

import pytest
import torch
from closing import GATES, METHOD, STEPS, labelled, texts, with_lora
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainingArguments

import gatepack as gp
from gatepack import distillation
from gatepack.methods import CloseAndRepair, close_and_repair
from gatepack.methods.one_shot import run_beside_lora
from gatepack.training import FineTuning, TrainConfig, close_to_budget

FRACTIONS = r"close: expected fractions of all steps in \[0, 1\], got "
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


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model_closes_as_an_eager_one(compiled_first):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = run = tiny_model("llama", torch.float32)
        if compiled and compiled_first:
            run = torch.compile(model, backend="eager")
        training = METHOD.start(model, STEPS, texts(3))
        if compiled and not compiled_first:
            run = torch.compile(model, backend="eager")
        losses = []
        for batch in texts(STEPS, seed=20):
            model.train()
            losses.append(run(**batch).loss.item())
            training.step()
        assert training.closed
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("close", [0.0, 0.5])
def test_under_the_autocast_of_a_loop_no_copy_of_weights_from_before_is_left(close):
    model = tiny_model("llama", torch.float32)
    method = dataclasses.replace(METHOD, close=close, autocast="bfloat16")
    training = method.start(model, STEPS, texts(3))
    training.done = training.due[0]
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        first = model(token_ids()).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert training.closed and torch.equal(model(token_ids()).logits, first)


def test_a_closing_that_fails_is_due_again(monkeypatch):
    model, failures = tiny_model("llama", torch.float32), [RuntimeError("out of memory")]
    real = close_and_repair.close_to_budget

    def failing(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(close_and_repair, "close_to_budget", failing)
    training = dataclasses.replace(METHOD, close=0.0).start(model, STEPS, texts(3))
    with pytest.raises(RuntimeError, match="out of memory"):
        model.train()(token_ids())
    model(token_ids())
    assert training.closed and gp.gates_of(model).kept_fraction() == pytest.approx(0.6, abs=0.005)


def test_peft_that_calls_no_hook_of_the_model_closes_it_too(monkeypatch):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama", torch.float32), lora)
    tuner = type(model.base_model)

    def forward(self, *args, **kwargs):  # as it was before PEFT 0.21
        return self.model.forward(*args, **kwargs)

    monkeypatch.setattr(tuner, "forward", forward)
    training = dataclasses.replace(METHOD, close=0.0).start(model, STEPS, texts(3))
    model.train()(input_ids=token_ids())
    assert training.closed


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


@pytest.mark.parametrize("resumed", [False, True])
def test_the_teacher_stays_the_dense_model_in_a_loop_of_ones_own(resumed, monkeypatch):
    model, seen = with_lora(), []
    dense = copy.deepcopy(model.get_base_model()).eval()
    divergence = distillation.divergence
    monkeypatch.setattr(
        distillation, "divergence", lambda s, t, *rest: (seen.append(t), divergence(s, t, *rest))[1]
    )
    method = dataclasses.replace(METHOD, close=(0.0, 0.5))
    if resumed:
        other = with_lora()
        before = method.start(other, STEPS, labelled(3))
        train(other, before, labelled(STEPS), until=2)
    gp.Distillation().start(model)
    training = method.start(model, STEPS, labelled(3))
    if resumed:
        training.load_state_dict(before.state_dict())
    for batch in labelled(STEPS, seed=20)[training.done :]:
        model.train()(**batch)
        training.step()
        expected = dense(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(seen[-1], expected, rtol=1e-5, atol=1e-6)
    assert training.closed


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
            ({"close": 1.5}, FRACTIONS + "1.5"),
            ({"close": "half"}, FRACTIONS + "'half'"),
            ({"close": (0.2, -0.1)}, FRACTIONS + r"\(0.2, -0.1\)"),
            ({"close": ()}, FRACTIONS + r"\(\)"),
            ({"gates": 0.7}, "gates: expected a GateConfig, got 0.7"),
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

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            (list(token_ids(4, 8)), r"batches\[0\]: input_ids must be .* got \[8\]: give batches"),
            ([*texts(1), {"input_ids": [[1, 2]]}], r"batches\[1\]: input_ids must be .* got list"),
            ([{"ids": token_ids()}], r"batches\[0\] must hold input_ids, got ids"),
            ([[1, 2]], "batches must hold tensors of token ids .* one of type list"),
        ],
    )
    def test_what_is_no_batch(self, batches, message):
        model = tiny_model("llama", torch.float32)
        with pytest.raises(ValueError, match=message):
            METHOD.start(model, STEPS, batches)
        assert not hasattr(model, "gatepack_gates")

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
        words = r"needs every gate open and exactly 1, .* these keep 9\d\.\d%: resume with the"
        with pytest.raises(ValueError, match=words):
            METHOD.start(model, STEPS, labelled(1))

    def test_a_training_whose_forwards_are_not_in_training_mode(self):
        model = tiny_model("llama", torch.float32).eval()
        training = dataclasses.replace(METHOD, close=0.2).start(model, 10, texts(2))
        for _ in range(2):
            model(token_ids())
            training.step()
        model(token_ids())
        with pytest.raises(RuntimeError, match=r"due to close, .*: call model\.train\(\) before"):
            training.step()

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
