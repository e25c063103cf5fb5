"""The recipe and its resumable run."""

import dataclasses
import math
import os
import signal

import pytest
import torch
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack import compensation, files, importance, training
from gatepack.data import batches
from gatepack.training import FineTuning, Interrupted, TrainConfig, add_lora, close_to_budget

CONFIG = TrainConfig(
    steps=6, batch_size=2, window=9, lora_rank=2, calibration_batches=2, learning_rate=1e-2
)


def lora_model():
    return add_lora(tiny_model("llama", torch.float32), CONFIG)


def adapter_state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_learns():
    windows = token_ids(batch=4, length=9)
    config = dataclasses.replace(CONFIG, steps=20, batch_size=4)
    losses = FineTuning(lora_model(), windows, config).run()
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]


def test_interrupted_run_resumes_bit_exactly(tmp_path, caplog):
    windows = token_ids(batch=8, length=9)
    whole = lora_model()
    losses = FineTuning(whole, windows, CONFIG).run()

    def stop_at_three(run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    first = FineTuning(lora_model(), windows, CONFIG, tmp_path)
    with pytest.raises(Interrupted):
        first.run(stop_at_three)
    assert first.step == 3 and "stopping after this step; Ctrl-C again" in caplog.text
    resumed_model = lora_model()
    resumed = FineTuning(resumed_model, windows, CONFIG, tmp_path)
    assert resumed.step == 3
    assert resumed.run() == losses
    expected = adapter_state(whole)
    for name, value in adapter_state(resumed_model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("seconds", "saves"), [(0.01, 6), (0.19, 2)])
def test_saves_as_often_as_its_share_of_the_time_allows(seconds, saves, tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    run = FineTuning(lora_model(), token_ids(batch=8, length=9), CONFIG, tmp_path)

    def save():
        saved.append(now[0])
        now[0] += seconds

    def step(run):
        now[0] += 1.0

    monkeypatch.setattr(run, "save", save)
    run.save_every, run.save_share = 0.5, 0.05
    run.run(step)
    assert len(saved) == saves + 1  # and once at the end


def test_optimizer_resumes_on_the_device_of_the_model(tmp_path):
    windows = token_ids(batch=8, length=9)
    FineTuning(lora_model(), windows, CONFIG, tmp_path).run()
    resumed = FineTuning(lora_model().to("meta"), windows, CONFIG, tmp_path)
    for parameter in resumed.parameters.values():
        state = resumed.optimizer.state[parameter]
        assert state["exp_avg"].is_meta and state["exp_avg_sq"].is_meta
        assert int(state["step"]) == CONFIG.steps


def beside(model):
    """Gates on a model with LoRA, to be trained by FineGates with noise."""
    method = gp.methods.FineGates(learning_rate=0.2, trains="gates", budget=0.7, freeze=0.7)
    method.prepare(model)
    return method.start(model, CONFIG.steps)


def test_interrupted_run_with_gates_beside_it_resumes_bit_exactly(tmp_path):
    windows = token_ids(batch=8, length=9)
    whole = lora_model()
    gates = beside(whole)
    losses = FineTuning(whole, windows, CONFIG, beside=gates).run()
    assert gates.gates.frozen

    def stop_at_three(run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    model = lora_model()
    first = FineTuning(model, windows, CONFIG, tmp_path, beside=beside(model))
    with pytest.raises(Interrupted):
        first.run(stop_at_three)
    resumed_model = lora_model()
    resumed_gates = beside(resumed_model)
    resumed = FineTuning(resumed_model, windows, CONFIG, tmp_path, beside=resumed_gates)
    assert not any("gatepack_gates" in name for name in resumed.parameters)
    assert resumed.run() == losses
    assert torch.equal(resumed_gates.gates.logits, gates.gates.logits)
    expected = adapter_state(whole)
    for name, value in adapter_state(resumed_model).items():
        assert torch.equal(value, expected[name]), name


def test_autocast_rounds_the_matmuls_and_keeps_fp32_weights():
    windows = token_ids(batch=8, length=9)
    model = lora_model()
    lowered = FineTuning(model, windows, dataclasses.replace(CONFIG, autocast="bfloat16")).run()
    exact = FineTuning(lora_model(), windows, CONFIG).run()
    assert lowered != exact
    assert lowered == pytest.approx(exact, rel=2**-7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_prices_and_repairs_on_as_many_batches_as_asked(monkeypatch):
    windows, seen = token_ids(batch=12, length=9), {}

    def calibrate(model, batches, progress):
        seen["priced"] = batches
        return importance.calibrate(model, batches, progress)

    def repair(model, masks, batches, progress):
        seen["repaired"] = batches
        return compensation.close_and_compensate(model, masks, batches, progress=progress)

    monkeypatch.setattr(training, "calibrate", calibrate)
    monkeypatch.setattr(training, "close_and_compensate", repair)
    for calibration, repaired in ((2, 3), (3, 1), (2, None)):
        model = tiny_model("llama", torch.float32)
        gp.attach(model, gp.GateConfig(noise=0.0, target=0.7, width_multiple=4))
        counts = {"calibration_batches": calibration, "repair_batches": repaired}
        close_to_budget(model, windows, dataclasses.replace(CONFIG, **counts))
        assert (len(seen["priced"]), len(seen["repaired"])) == (calibration, repaired or 6)
        shared = zip(seen["priced"], seen["repaired"], strict=False)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in shared)


def test_closing_in_autocast_rounds_the_models_matmuls_alone():
    windows = token_ids(batch=12, length=33)
    logits, masks = {}, {}
    for precision in (None, "bfloat16"):
        model = tiny_model("llama", torch.float32).eval()
        gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.7, width_multiple=4))
        close_to_budget(model, windows, dataclasses.replace(CONFIG, autocast=precision))
        logits[precision], masks[precision] = model(windows).logits, gates.open_masks()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert gates.kept_fraction() == pytest.approx(0.7, abs=0.02)
    assert all(torch.equal(mask, masks[None][name]) for name, mask in masks["bfloat16"].items())
    assert not torch.equal(logits["bfloat16"], logits[None])
    rounded = (logits["bfloat16"] - logits[None]).norm() / logits[None].norm()
    assert rounded <= 2**-8


def test_objective_is_what_is_minimised():
    windows = token_ids(batch=8, length=9)
    model = lora_model()

    def tripled(model, ids):
        return 3 * training.next_token_loss(model, ids)

    first, *_ = FineTuning(model, windows, CONFIG, objective=tripled).run()
    assert first == pytest.approx(3 * FineTuning(lora_model(), windows, CONFIG).run()[0])


def test_finished_run_does_not_train_again(tmp_path):
    windows = token_ids(batch=8, length=9)
    FineTuning(lora_model(), windows, CONFIG, tmp_path).run()
    model = lora_model()
    again = FineTuning(model, windows, CONFIG, tmp_path)
    trained = adapter_state(model)
    assert len(again.run()) == 6
    assert all(torch.equal(value, trained[name]) for name, value in adapter_state(model).items())


def test_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    windows = token_ids(batch=8, length=9)
    FineTuning(lora_model(), windows, CONFIG, tmp_path).run()
    other = TrainConfig(steps=7, batch_size=2, window=9, lora_rank=2, calibration_batches=2)
    with pytest.raises(ValueError, match="other settings"):
        FineTuning(lora_model(), windows, other, tmp_path)
    path = tmp_path / "run.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="run.safetensors is damaged"):
        FineTuning(lora_model(), windows, CONFIG, tmp_path)


def test_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def full(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_safetensors(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_diverged_loss_is_an_error():
    model = lora_model()
    with torch.no_grad():
        [p for p in model.parameters() if p.requires_grad][-1].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 0"):
        FineTuning(model, token_ids(batch=4, length=9), CONFIG).run()


def test_closing_on_batches_is_that_on_the_windows_they_are_of():
    windows, found = token_ids(batch=16, length=9), []
    drawn = batches(windows, CONFIG.batch_size, CONFIG.repaired, CONFIG.seed + 1)
    texts = [{"input_ids": windows[rows], "labels": windows[rows]} for rows in drawn]
    for source in (windows, texts):
        model = tiny_model("llama", torch.float32)
        gp.attach(model, gp.GateConfig(noise=0.0, target=0.75, width_multiple=8))
        close_to_budget(model, source, CONFIG)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_close_to_budget_meets_the_target():
    windows = token_ids(batch=16, length=9)
    gate_config = gp.GateConfig(noise=0.0, target=0.75, width_multiple=8, equal_layers=False)
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gate_config)
    phases = []
    kept = close_to_budget(model, windows, CONFIG, lambda *state: phases.append(state))
    assert abs(kept - 0.75) <= 0.005
    assert kept == gates.kept_fraction()
    assert phases[-1] == ("closing and repairing", 2, 2)


@pytest.mark.parametrize(("estimator", "noise"), [("stg", 0.5), ("hard_concrete", 1.0)])
def test_noise_of_a_model_in_training_does_not_matter_to_closing(estimator, noise):
    windows, found = token_ids(batch=16, length=9), []
    for mode in (False, True):
        model = tiny_model("llama", torch.float32).train(mode)
        config = gp.GateConfig(
            estimator=estimator, noise=noise, target=0.6, width_multiple=4, equal_layers=False
        )
        gp.attach(model, config)
        close_to_budget(model, windows, CONFIG, target=0.8)
        close_to_budget(model, windows, CONFIG)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_close_to_budget_refuses_gates_on_rows_and_columns():
    model = tiny_model("llama", torch.float32)
    gp.attach(model, gp.GateConfig(units=("rows", "columns"), noise=0.0, target=0.75))
    with pytest.raises(ValueError, match=r"units: expected 'heads' .* for close_to_budget, got"):
        close_to_budget(model, token_ids(batch=16, length=9), CONFIG)


@pytest.mark.parametrize(("equal", "uniform"), [(False, True), (False, False), (True, True)])
def test_a_target_on_the_way_leaves_what_it_closed_closed(equal, uniform):
    model = tiny_model("llama", torch.float32)
    config = gp.GateConfig(
        noise=0.0, target=0.6, width_multiple=4, equal_layers=equal, q_per_kv_uniform=uniform
    )
    gates, windows = gp.attach(model, config), token_ids(batch=16, length=9)
    assert close_to_budget(model, windows, CONFIG, target=0.8) == pytest.approx(0.8, abs=0.005)
    between = gates.open_masks()
    assert close_to_budget(model, windows, CONFIG) == pytest.approx(0.6, abs=0.005)
    after = gates.open_masks()
    for name, mask in after.items():
        assert not (mask & ~between[name]).any(), name
    assert any(not torch.equal(after[name], between[name]) for name in after)


def test_a_target_on_the_way_that_no_shape_meets_closes_nothing(caplog):
    model, windows = tiny_model("llama", torch.float32), token_ids(batch=16, length=9)
    config = gp.GateConfig(noise=0.0, units=("heads",), targets=("*.0.*",))
    gates = gp.attach(model, config)
    (masks,) = ({name: torch.arange(gate.size) >= gate.size // 2} for name, gate in gates.items())
    target = gates.costs.kept_fraction(masks)
    gp.detach(model)
    gp.attach(model, dataclasses.replace(config, target=target))
    between = 1 - (1 - target) / 4
    assert close_to_budget(model, windows, CONFIG, target=between) == 1
    assert f"closing nothing at a kept fraction of {between:.4f}: target=" in caplog.text
    assert close_to_budget(model, windows, CONFIG) == pytest.approx(target)


@pytest.mark.parametrize(
    "field", ["steps", "batch_size", "lora_rank", "calibration_batches", "repair_batches"]
)
def test_config_names_the_field(field):
    with pytest.raises(ValueError, match=f"{field} must be >= 1, got 0"):
        TrainConfig(**{field: 0})


def test_rate_rises_and_falls_along_a_cosine():
    config = TrainConfig(steps=10, warmup_steps=2, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(10)]
    expected = [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))]
    assert rates == pytest.approx(expected)


def test_config_refuses_bad_rates_and_windows():
    with pytest.raises(ValueError, match="learning_rate must be a positive number, got -1"):
        TrainConfig(learning_rate=-1)
    with pytest.raises(ValueError, match="window must be >= 2"):
        TrainConfig(window=1)
    with pytest.raises(ValueError, match="autocast must be None or 'bfloat16', got 'fp8'"):
        TrainConfig(autocast="fp8")
