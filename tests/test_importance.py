"""Pricing of units: moments against explicit sums, prices against the optimal repair."""

import pytest
import torch
from tiny import make_gates, padded, tiny_model, token_ids

import gatepack as gp
from gatepack.importance import (
    Moments,
    _greedy,
    _prices,
    _recorder,
    calibrate,
    damped_inverse,
    unit_scores,
)

CONFIG = gp.GateConfig(noise=0.0, target=0.7, width_multiple=4)


def random_problem(seed: int = 0):
    torch.manual_seed(seed)
    x = torch.randn(200, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    gradient = torch.randn(90, 10, dtype=torch.float64)
    weight = torch.randn(10, 24, dtype=torch.float64)
    return weight, Moments(x.t() @ x, gradient.t() @ gradient)


def damage_after_best_repair(weight, moments, closed, damping):
    """Half tr(F dW G dW^T) at the least-squares repair of the other columns, by solving for it."""
    g = moments.inputs + damping * moments.inputs.diagonal().mean() * torch.eye(
        len(moments.inputs), dtype=torch.float64
    )
    kept = torch.tensor([i for i in range(weight.shape[1]) if i not in closed.tolist()])
    change = torch.zeros_like(weight)
    change[:, closed] = -weight[:, closed]
    across = weight[:, closed] @ g[closed][:, kept]
    change[:, kept] = torch.linalg.solve(g[kept][:, kept], across.t()).t()
    return torch.trace(moments.gradients @ change @ g @ change.t()) / 2


@pytest.mark.parametrize("lanes", [1, 4])
def test_price_is_damage_after_best_repair(lanes):
    weight, moments = random_problem()
    prices = _prices(weight, damped_inverse(moments.inputs, 0.1), moments.gradients @ weight, lanes)
    for unit in range(24 // lanes):
        closed = torch.arange(unit * lanes, (unit + 1) * lanes)
        expected = damage_after_best_repair(weight, moments, closed, 0.1)
        torch.testing.assert_close(prices[unit], expected, rtol=1e-9, atol=0)


def test_greedy_scores_add_up_to_the_joint_damage():
    weight, moments = random_problem(1)
    scores, order = _greedy(weight, moments, lanes=1, block=1, damping=0.1).sort()
    # Scores never fall along the order of closing; where the raw damage does, the sum is an upper
    # bound.
    assert bool((scores[:3].diff() > 0).all())
    joint = damage_after_best_repair(weight, moments, order[:3], 0.1)
    torch.testing.assert_close(scores[:3].sum(), joint, rtol=1e-9, atol=0)


def test_moments_are_fp32_products_under_autocast():
    gate = make_gates(noise=0.0)["b:channels"]
    moments = {}
    for enabled in (False, True):
        linear, inputs, gradients = torch.nn.Linear(8, 4), {}, {}
        linear.load_state_dict({"weight": torch.eye(8)[:4], "bias": torch.zeros(4)})
        linear.register_forward_hook(_recorder(gate, None, inputs, gradients))
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            linear(x).backward(torch.ones(32, 4, dtype=torch.bfloat16 if enabled else None))
        moments[enabled] = inputs[gate.name], gradients[gate.name]
    for exact, under in zip(moments[False], moments[True], strict=True):
        torch.testing.assert_close(under, exact, rtol=1e-6, atol=1e-6)


def test_unused_channel_is_cheapest_and_essential_one_dearest():
    weight, moments = random_problem(2)
    weight[:, 5] = 0
    weight[:, 11] *= 100
    scores = _greedy(weight, moments, lanes=1, block=1, damping=0.1)
    assert scores.argmin() == 5
    assert scores.max() == scores[11]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_calibrate_sums_second_moments(model_type):
    model = tiny_model(model_type)
    gates = gp.attach(model, CONFIG)
    ids = [token_ids(seed=seed) for seed in (1, 2)]
    moments = calibrate(model, [{"input_ids": i, "labels": i} for i in ids])
    assert moments.keys() == gates.gates.keys()
    name = next(name for name in gates if name.endswith(":channels"))
    parent, child, _ = next(s for s in gates.attachment.sites if s[2].in_gate is gates[name])
    linear = parent._modules[child]
    inputs, gradients = [], []

    def record(module, args, output):
        inputs.append(args[0].reshape(-1, args[0].shape[-1]))
        output.retain_grad()
        gradients.append(output)

    handle = linear.register_forward_hook(record)
    model.eval()
    for batch in ids:
        (model(batch, labels=batch).loss * batch[:, 1:].numel()).backward()
    handle.remove()
    x = torch.cat(inputs).detach()
    g = torch.cat([y.grad.reshape(-1, y.shape[-1]) for y in gradients])
    torch.testing.assert_close(moments[name].inputs, x.t() @ x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        moments[name].gradients, g.t() @ g, rtol=1e-5, atol=1e-7 * float((g.t() @ g).abs().max())
    )
    scores = unit_scores(gates, moments, block=8)
    assert {name: len(score) for name, score in scores.items()} == {
        n: g.size for n, g in gates.items()
    }
    assert all(
        bool((score >= 0).all()) and bool(torch.isfinite(score).all()) for score in scores.values()
    )


def moments_of(model_type, batches):
    model = tiny_model(model_type)
    gp.attach(model, CONFIG)
    return calibrate(model, batches)


@pytest.mark.parametrize(
    ("model_type", "side"),
    [("llama", "left"), ("llama", "right"), ("gpt2", "right"), ("bert", "right")],
)
def test_calibrate_does_not_count_padding(model_type, side):
    ids = token_ids(2, 16)
    plain, spread = {"input_ids": ids}, padded(ids, 48, side)
    if model_type == "bert":
        plain["labels"] = spread["labels"] = torch.tensor([0, 1])
    found, expected = (moments_of(model_type, [batch]) for batch in (spread, plain))
    for name in expected:
        for field in ("inputs", "gradients"):
            got, wanted = getattr(found[name], field), getattr(expected[name], field)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * scale)


def test_each_label_counts_as_much_in_any_batch():
    """A batch of which half is not scored adds as much as its scored half alone."""
    ids = token_ids(2, 16)
    labels = ids.clone()
    labels[:, 8:] = -100
    found = moments_of("llama", [{"input_ids": ids, "labels": labels}])
    expected = moments_of("llama", [ids[:, :8]])
    for name in expected:
        wanted = expected[name].gradients
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found[name].gradients, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_of_padding_do_not_count_where_its_labels_do(side):
    inputs = padded(token_ids(2, 16), 48, side)
    found = moments_of("llama", [{**inputs, "labels": inputs["input_ids"]}])
    expected = moments_of("llama", [token_ids(2, 16)])
    for name in expected:
        torch.testing.assert_close(found[name].inputs, expected[name].inputs, rtol=1e-5, atol=1e-5)


def test_calibrate_needs_a_batch():
    with pytest.raises(ValueError, match="at least one batch of token ids, got none"):
        moments_of("llama", [])
    with pytest.raises(ValueError, match="batches must hold tensors .* one of type str"):
        moments_of("llama", {"input_ids": token_ids()})


def test_calibrate_needs_a_label():
    ids = token_ids()
    labels = torch.full_like(ids, -100)
    with pytest.raises(ValueError, match="batches must hold labels other than -100, got none"):
        moments_of("llama", [{"input_ids": ids, "labels": labels}])


def test_calibrate_needs_what_is_finite():
    model, ids = tiny_model("llama"), token_ids()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    gp.attach(model, CONFIG)
    with pytest.raises(FloatingPointError, match=r"of model\.layers\.1.* hold infinite or NaN"):
        calibrate(model, [{"input_ids": ids, "labels": ids}])


def test_calibrate_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    gp.attach(model, CONFIG)
    model.model.layers[0].eval()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    ids = token_ids()
    calibrate(model, [{"input_ids": ids, "labels": ids}])
    assert [module.training for module in model.modules()] == modes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("path", ["folded", "dense"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_closed_units_are_as_if_they_had_been_removed(model_type, path, monkeypatch):
    monkeypatch.setenv("GATEPACK_BACKEND", path)
    model = tiny_model(model_type)
    gates = gp.attach(model, CONFIG)
    closed = {
        name: list(range(gate.spec.shared_size)) if gate.kind == "heads" else [0, 3]
        for name, gate in gates.items()
    }
    for name, units in closed.items():
        gates.close(name, units)
    ids = token_ids()
    batch = {"input_ids": ids, "labels": ids}
    moments = calibrate(model, [batch])
    scores = unit_scores(gates, moments, block=8)
    gp.pack(model)
    packed = gp.attach(model, CONFIG)
    expected = calibrate(model, [batch])
    expected_scores = unit_scores(packed, expected, block=8)
    for name, units in closed.items():
        torch.testing.assert_close(moments[name].inputs, expected[name].inputs)
        torch.testing.assert_close(moments[name].gradients, expected[name].gradients)
        left = torch.ones(gates[name].size, dtype=torch.bool)
        left[units] = False
        assert bool((scores[name][~left] == 0).all())
        torch.testing.assert_close(scores[name][left], expected_scores[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_is_priced_as_if_it_were_merged(dtype):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=12, init_lora_weights=False, target_modules="all-linear"
    )
    wrapped = peft.get_peft_model(tiny_model("llama", dtype), config)
    gates, ids = gp.attach(wrapped, CONFIG), token_ids()
    moments = calibrate(wrapped, [{"input_ids": ids, "labels": ids}])
    found = unit_scores(gates, moments, block=8)
    wrapped.merge_and_unload()
    for name, expected in unit_scores(gates, moments, block=8).items():
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("how", ["none is open", "one is a half"])
def test_calibrate_refuses_gates_that_it_cannot_price(how):
    model = tiny_model("llama")
    gates = gp.attach(model, CONFIG)
    gate = next(gate for name, gate in gates.items() if name.endswith(":channels"))
    if how == "none is open":
        gates.close(gate.name, range(gate.size))
    else:
        with torch.no_grad():
            gates.logits[gate.start] = gates.estimator.logits_of(torch.tensor(0.5))
    ids = token_ids()
    with pytest.raises(ValueError, match=f"calibrate needs open units .* {gate.name!r} has others"):
        calibrate(model, [{"input_ids": ids, "labels": ids}])
