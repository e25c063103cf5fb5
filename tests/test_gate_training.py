"""GateTraining: gates beside any optimizer, to the budget, resumable bit for bit."""

import copy

import pytest
import torch
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.gate_training import GateRecipe, GateSchedule, GateTraining

CONFIG = gp.GateConfig(noise=0.1, target=0.5, width_multiple=4, seed=3)
STEPS = 30


def gated(dtype=torch.float32, **config):
    model = tiny_model("llama", dtype).train()
    gp.attach(model, gp.GateConfig(**{**CONFIG.to_dict(), **config}))
    return model


def loss_of(model, step):
    ids = token_ids(2, 6, seed=step)
    return model(ids, labels=ids).loss


def train(model, steps, training=None, optimizer=None, schedule=None, total=STEPS):
    if training is None:
        training = GateTraining(model, total, schedule)
        optimizer = torch.optim.AdamW(training.weights(), lr=1e-3)
    for step in range(training.done, training.done + steps):
        loss_of(model, step).backward()
        training.step()
        optimizer.step()
        optimizer.zero_grad()
    return training, optimizer


def test_recipe_ends_at_the_target_and_packs():
    model = gated()
    training, _ = train(model, STEPS)
    assert training.gates.frozen
    assert abs(training.finish() - 0.5) <= 0.005
    ids = token_ids(2, 6)
    expected = model.eval()(ids).logits
    gp.pack(model)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_gates_move_before_they_freeze_and_not_after():
    model = gated()
    schedule = GateSchedule(freeze=0.5)
    training, optimizer = train(model, 14, schedule=schedule)
    assert not training.gates.frozen and training.gates.logits.std() > 0
    train(model, 1, training, optimizer)
    assert training.gates.frozen and not training.gates.logits.requires_grad
    frozen = training.gates.logits.clone()
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    train(model, 5, training, optimizer)
    assert torch.equal(training.gates.logits, frozen)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


@pytest.mark.parametrize("estimator", ["stg", "hard_concrete"])
def test_the_default_rate_lets_gates_close_in_any_number_of_steps(estimator):
    for steps in (10, 20, 35, 217, 2000):
        gates = gp.GateSet(
            gp.GateConfig(estimator=estimator), {"a": gp.gates.GateSpec("channels", 4)}
        )
        gated_steps = int(0.75 * steps)
        rate = GateSchedule().rate(gates, steps)
        way = gates.way_to_close()
        assert 1.3 * way < gated_steps * rate < 6 * way
        with torch.no_grad():
            gates.logits -= way
        assert gates.open_fraction() == 0
    assert GateSchedule(learning_rate=0.3).rate(gates, 1000) == 0.3


@pytest.mark.parametrize(("steps", "most"), [(12, 0.99), (30, 0.6)])
def test_gates_close_before_they_are_rounded(steps, most):
    model = gated(noise=0.0)
    training = GateTraining(model, steps)
    kept = []
    training._round = lambda: kept.append(training.gates.kept_fraction())
    for step in range(steps):
        loss_of(model, step).backward()
        training.step()
    assert min(kept) < most


def test_schedule_reaches_the_controller():
    training = GateTraining(gated(), 100, GateSchedule(warmup=0.1, ramp=0.6, freeze=0.9))
    controller = training.gates.controller
    assert (controller.warmup_steps, controller.ramp_steps) == (10, 50)


def test_gradient_is_that_of_the_loss_and_the_penalty():
    model = gated(torch.float64, noise=0.0, init_logit=0.2)
    twin = copy.deepcopy(model)
    training = GateTraining(model, STEPS)
    for step in (0, 1):
        loss_of(model, step).backward()
    assert model.gatepack_gates.logits.grad is None
    seen = {}
    real = training.optimizer.step
    training.optimizer.step = lambda: seen.update(grad=training.gates.logits.grad.clone()) or real()
    controller = twin.gatepack_gates.controller
    controller.warmup_steps = training.gates.controller.warmup_steps
    controller.ramp_steps = training.gates.controller.ramp_steps
    (loss_of(twin, 0) + loss_of(twin, 1) + twin.gatepack_gates.penalty()).backward()
    training.step()
    assert torch.allclose(seen["grad"], twin.gatepack_gates.logits.grad, rtol=1e-6, atol=1e-9)


def test_loss_scale_is_undone():
    logits = []
    for scale in (1.0, 1024.0):
        model = gated(noise=0.0, init_logit=0.2)
        training = GateTraining(model, STEPS)
        (loss_of(model, 0) * scale).backward()
        training.step(scale)
        logits.append(training.gates.logits.detach().clone())
    assert torch.allclose(*logits, rtol=1e-5)


def test_an_infinite_gradient_counts_as_none():
    model = gated()
    training = GateTraining(model, STEPS)
    training.gradient = torch.full_like(training.gates.logits, float("inf"))
    training.step()
    assert training.gates.logits.isfinite().all() and training.gradient is None


def test_clipping_and_zeroing_of_the_weights_leave_the_gates_alone():
    model = gated(init_logit=0.2)
    training = GateTraining(model, STEPS)
    loss_of(model, 0).backward()
    before = training.gradient.clone()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    model.zero_grad()
    assert before.abs().max() > 0 and torch.equal(training.gradient, before)


@pytest.mark.parametrize("cut", [5, 25])
def test_resumes_bit_for_bit(cut):
    torch.manual_seed(0)
    whole = gated()
    train(whole, STEPS)
    first = gated()
    training, optimizer = train(first, cut)
    second = gated()
    resumed = GateTraining(second, STEPS)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(training.state_dict()))
    again = torch.optim.AdamW(resumed.weights(), lr=1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, STEPS - cut, resumed, again)
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_earlier_state_takes_everything_back():
    model = gated()
    training, optimizer = train(model, 0)
    start = copy.deepcopy((model.state_dict(), training.state_dict(), optimizer.state_dict()))
    train(model, STEPS, training, optimizer)
    assert training.gates.frozen
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    loss_of(model, 0).backward()
    for part, state in zip((model, training, optimizer), start, strict=True):
        part.load_state_dict(state)
    optimizer.zero_grad()
    assert not training.gates.frozen and not training.optimizer.state
    train(model, STEPS, training, optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_state_holds_tensors_only():
    training, _ = train(gated(), 3)
    assert all(isinstance(value, torch.Tensor) for value in training.state_dict().values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number or None, got 0.0"),
        ({"learning_rate": "a"}, "learning_rate: expected a positive number or None, got 'a'"),
        ({"ramp": 1.5}, "ramp: expected a fraction of all steps, got 1.5"),
        ({"ramp": "a"}, "ramp: expected a fraction of all steps, got 'a'"),
        ({"warmup": 0.6}, "warmup, ramp, freeze: expected ascending fractions, got 0.6, 0.5, 0.75"),
    ],
)
def test_schedule_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        GateSchedule(**fields)


def test_refuses_no_steps_and_no_gates():
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        GateTraining(gated(), 0)
    with pytest.raises(ValueError, match="model has no gates"):
        GateTraining(tiny_model("llama"), 1)


@pytest.mark.parametrize("steps", ["3", 1.5])
def test_refuses_steps_that_are_no_integers(steps):
    with pytest.raises(ValueError, match=f"steps: expected an integer >= 1, got {steps!r}"):
        GateTraining(gated(), steps)


def test_refuses_a_schedule_that_is_none():
    message = r"schedule: expected a GateSchedule or None, got 0.5; pass gatepack.GateSchedule\("
    for refused in (lambda: GateTraining(gated(), 3, 0.5), lambda: GateRecipe(CONFIG, 0.5)):
        with pytest.raises(ValueError, match=message):
            refused()


def test_the_newest_training_of_the_gates_gets_their_gradient():
    model = gated(noise=0.0, init_logit=0.2)
    earlier, _ = train(model, 3)
    training = GateTraining(model, STEPS)
    assert training.gates.controller.steps == 0 and training.gates.controller.multiplier == 0
    loss_of(model, 3).backward()
    assert earlier.gradient is None and training.gradient.abs().max() > 0
    for use in (earlier.step, earlier.finish):
        with pytest.raises(RuntimeError, match="a newer GateTraining has taken them over"):
            use()
    assert not training.gates.frozen and earlier.done == 3
    train(model, STEPS, training, torch.optim.AdamW(training.weights(), lr=1e-3))
    assert abs(earlier.finish() - 0.5) <= 0.005


@pytest.mark.parametrize(
    "config", [{"target": 0.1}, {"target": 0.994}, {"target": 0.3, "tp_divisor": 40}]
)
def test_an_unreachable_target_is_refused_before_the_first_step(config):
    model = gated(**config)
    gates = gp.gates_of(model)
    gates.freeze()
    with pytest.raises(ValueError, match=r"cannot be met .* nearest reachable kept fraction is"):
        GateTraining(model, STEPS)
    assert gates.frozen
    gates.close("model.layers.0.mlp:channels", [0])
    assert gates.kept_fraction() < 1
