import pytest
import torch
from ops import captured, no_host_sync

from gatepack.budget import Costs
from gatepack.estimators import STG, HardConcrete
from gatepack.gates import GateSpec
from gatepack.kernels import Panel, gate_penalty_fn, gate_penalty_ref
from gatepack.kernels.sample_gates import ESTIMATORS
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty

SMALL = Panel(rows=1, columns=16, span=1, num_warps=1)
SIZES, SHARED = [12, 0, 37, 1, 10], [4, 1, 1, 1, 4]
CENTER = {"stg": 0.0, "hard_concrete": 0.0, "gumbel": -3.4}


def make_inputs(estimator="stg", sizes=SIZES, shared=SHARED, seed=0):
    """Tensors of gate_penalty_fn on the CPU; shared names the block sizes, or None."""
    random = torch.Generator().manual_seed(seed)
    n, segments = sum(sizes), len(sizes)
    inputs = {
        "logits": CENTER[estimator] + torch.randn(n, generator=random),
        "offsets": torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
        "unit_cost": torch.rand(segments, generator=random),
        "closed": torch.rand(n, generator=random) < 0.3,
    }
    if shared is not None:
        inputs["shared_size"] = torch.tensor(shared, dtype=torch.int32)
        inputs["shared_cost"] = 3 * torch.rand(segments, generator=random)
    return inputs


def penalize(fn, inputs, dcost, **settings):
    logits = inputs["logits"].detach().requires_grad_()
    cost = fn(**inputs | {"logits": logits}, **settings)
    (dlogits,) = torch.autograd.grad(cost, logits, dcost.to(cost))
    return cost.detach(), dlogits


def check(inputs, device, estimator="stg", max_segment=20, config=SMALL):
    """Cost and dlogits, from poisoned memory, against fp64 and torch's own error."""
    inputs = {name: t.to(device) for name, t in inputs.items()}
    segments = len(inputs["unit_cost"])
    dcost = torch.randn(segments, generator=torch.Generator().manual_seed(7)).to(device)
    wide = inputs | {"logits": inputs["logits"].double()}
    truth = penalize(gate_penalty_ref, wide, dcost, estimator=estimator)
    theirs = penalize(gate_penalty_ref, inputs, dcost, estimator=estimator)
    settings = {"estimator": estimator, "max_segment": max_segment, "config": config}
    with poisoned_empty():
        ours = penalize(gate_penalty_fn, inputs, dcost, **settings)
    assert_close_to_fp64("cost", ours[0], theirs[0], truth[0])
    assert_close_to_fp64("dlogits", ours[1], theirs[1], truth[1], factor=3)
    return ours


@pytest.mark.parametrize("shared", [SHARED, None], ids=["shared", "alone"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(estimator, shared, device):
    check(make_inputs(estimator, shared=shared), device, estimator)


@pytest.mark.parametrize("max_segment", [0, 1, 37, 1000])
def test_any_max_segment_gives_the_same(max_segment, device):
    expected = check(make_inputs(), device)
    got = check(make_inputs(), device, max_segment=max_segment)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_default_config(device):
    check(make_inputs(), device, config=None)


@pytest.mark.parametrize("logit", [-6.0, 6.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_logits(estimator, logit, device):
    inputs = make_inputs(estimator)
    inputs["logits"] = logit + 0.5 * (inputs["logits"] - CENTER[estimator])
    check(inputs, device, estimator)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("logit", [-300.0, 300.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_logits_that_overflow_exp(estimator, logit, device):
    inputs = {name: t.to(device) for name, t in make_inputs(estimator).items()}
    inputs["logits"].fill_(logit)
    settings = {"estimator": estimator, "max_segment": 12}
    cost, dlogits = penalize(gate_penalty_fn, inputs, torch.ones(5), **settings)
    assert cost.isfinite().all() and (dlogits == 0).all()


def test_strides(device):
    inputs = make_inputs()
    for name in ("logits", "closed", "unit_cost", "shared_size"):
        inputs[name] = inputs[name].repeat_interleave(2)[::2]
    check(inputs, device)
    dcost = torch.ones((), device=device).expand(5)
    inputs = {name: t.to(device) for name, t in inputs.items()}
    _, dlogits = penalize(gate_penalty_fn, inputs, dcost, max_segment=37)
    assert torch.equal(
        dlogits, penalize(gate_penalty_fn, inputs, dcost.contiguous(), max_segment=37)[1]
    )


@pytest.mark.parametrize(("sizes", "shared"), [([], []), ([0], [2]), ([0, 5, 0], None)])
def test_zero_sizes(sizes, shared, device):
    check(make_inputs(sizes=sizes, shared=shared), device)


def test_closed_gates_cost_nothing_and_get_no_gradient(device):
    inputs = make_inputs()
    inputs["logits"][inputs["closed"]] = float("nan")
    inputs = {name: t.to(device) for name, t in inputs.items()}
    cost, dlogits = penalize(gate_penalty_fn, inputs, torch.ones(5), max_segment=37)
    assert cost.isfinite().all() and (dlogits[inputs["closed"]] == 0).all()
    inputs["closed"].fill_(True)
    cost, dlogits = penalize(gate_penalty_fn, inputs, torch.ones(5), max_segment=37)
    assert (cost == 0).all() and (dlogits == 0).all()


def test_everything_open_costs_everything(device):
    inputs = make_inputs("gumbel") | {"logits": torch.full((60,), 9.0)}
    inputs["closed"].fill_(False)
    inputs = {name: t.to(device) for name, t in inputs.items()}
    sizes, blocks = torch.tensor(SIZES), torch.tensor([3, 0, 37, 1, 3])
    expected = inputs["unit_cost"].cpu() * sizes + inputs["shared_cost"].cpu() * blocks
    cost = gate_penalty_fn(**inputs, max_segment=37, estimator="gumbel")
    torch.testing.assert_close(cost.cpu(), expected)


@pytest.mark.parametrize(
    ("name", "estimator"), [("stg", STG(0.1)), ("hard_concrete", HardConcrete(0.1))]
)
def test_equals_the_budget_of_gatepack(name, estimator, device):
    """(fixed + sum of costs) / total is Costs.expected, and so is its gradient."""
    specs = {
        "heads": GateSpec("heads", 12, 8, unit_cost=1024, shared_size=4, shared_cost=512),
        "channels": GateSpec("channels", 37, unit_cost=192),
    }
    costs = Costs(specs, fixed=1000)
    logits = torch.randn(49, device=device)
    closed = torch.rand(49, device=device) < 0.2

    def expected(logits, offsets, closed, **_):
        return costs.expected(estimator.open_probability(logits).masked_fill(closed, 0.0))

    def ours(**inputs):
        cost = gate_penalty_fn(**inputs, estimator=name, max_segment=37)
        return (costs.fixed + cost.sum()) / costs.total

    inputs = {"logits": logits, "closed": closed}
    inputs["offsets"] = torch.tensor([0, 12, 49], dtype=torch.int32, device=device)
    for field, dtype in (
        ("unit_cost", torch.float32),
        ("shared_size", torch.int32),
        ("shared_cost", torch.float32),
    ):
        values = [getattr(spec, field) for spec in specs.values()]
        inputs[field] = torch.tensor(values, dtype=dtype, device=device)
    one = torch.ones((), device=device)
    torch.testing.assert_close(penalize(ours, inputs, one), penalize(expected, inputs, one))


def test_means_for_the_v_shaped_penalty(device):
    inputs = make_inputs(shared=None, sizes=[8, 24])
    inputs["unit_cost"] = 1 / torch.tensor([8.0, 24.0])
    del inputs["closed"]
    inputs = {name: t.to(device) for name, t in inputs.items()}
    p = STG(0.1).open_probability(inputs["logits"])
    expected = torch.stack([p[:8].mean(), p[8:].mean()])
    torch.testing.assert_close(gate_penalty_fn(**inputs, max_segment=24), expected)


def test_deterministic(device):
    inputs = {name: t.to(device) for name, t in make_inputs().items()}
    first, second = (
        penalize(gate_penalty_fn, inputs, torch.ones(5), max_segment=37) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def arguments_of(inputs, device):
    names = ("logits", "offsets", "unit_cost", "shared_size", "shared_cost", "closed")
    tensors = [inputs[name].to(device) if name in inputs else None for name in names]
    return *tensors, 37, "stg", []


@pytest.mark.parametrize("shared", [SHARED, None], ids=["shared", "alone"])
def test_opcheck(shared, device):
    logits, *rest = arguments_of(make_inputs(shared=shared), device)
    forward = torch.ops.gatepack.gate_penalty.default
    torch.library.opcheck(forward, (logits.requires_grad_(), *rest))
    backward = torch.ops.gatepack.gate_penalty_backward.default
    torch.library.opcheck(backward, (torch.randn(5, device=device), logits.detach(), *rest))


def test_compiles_into_one_graph(device):
    inputs = {name: t.to(device) for name, t in make_inputs().items()}
    compiled = torch.compile(gate_penalty_fn, fullgraph=True, backend="aot_eager")
    settings = {"max_segment": 37, "config": SMALL}
    expected = penalize(gate_penalty_fn, inputs, torch.ones(5), **settings)
    got = penalize(compiled, inputs, torch.ones(5), **settings)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_second_derivative_is_refused(device):
    inputs = {name: t.to(device) for name, t in make_inputs().items()}
    inputs["logits"].requires_grad_()
    cost = gate_penalty_fn(**inputs, max_segment=37)
    upstream = torch.ones_like(cost).requires_grad_()
    (grad,) = torch.autograd.grad(cost, inputs["logits"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="gate_penalty has no second derivative"):
        grad.sum().backward()


REFUSED = [
    ({"logits": torch.zeros(2, 30)}, r"logits: expected one dimension, got shape \(2, 30\)"),
    ({"offsets": torch.zeros(6)}, r"offsets: expected int32 \[segments \+ 1\], got torch.float32"),
    ({"unit_cost": torch.zeros(4)}, r"unit_cost: expected shape \(5,\), got"),
    ({"shared_size": torch.zeros(5)}, "shared_size: expected dtype torch.int32, got torch.f"),
    ({"shared_size": None}, "shared_size: expected a tensor beside the other shared one, got None"),
    ({"shared_cost": None}, "shared_cost: expected a tensor beside the other shared one, got None"),
    ({"shared_cost": torch.zeros(5, device="meta")}, "shared_cost: expected device .* got meta"),
    ({"estimator": "relaxed"}, "estimator: expected one of .*, got 'relaxed'"),
    ({"max_segment": -1}, "max_segment: expected at least 0, got -1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = make_inputs() | {"max_segment": 37} | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        gate_penalty_fn(**arguments)


def test_the_reference_refuses_an_unknown_estimator():
    with pytest.raises(ValueError, match="estimator: expected one of .*, got 'relaxed'"):
        gate_penalty_ref(**make_inputs(), estimator="relaxed")


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_llama_3_8b(estimator, device):
    shape = MODEL_SHAPES["llama-3-8b"]
    shared = [shape.heads // shape.kv_heads, 1] * 4
    inputs = make_inputs(estimator, [shape.heads, shape.mlp] * 4, shared)
    check(inputs, device, estimator, max_segment=shape.mlp, config=None)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture(device):
    inputs = {name: t.to(device) for name, t in make_inputs().items()}
    dcost = torch.ones(5, device=device)

    def step():
        return penalize(gate_penalty_fn, inputs, dcost, max_segment=37)

    expected = step()
    with no_host_sync():
        step()
    assert all(torch.equal(a, b) for a, b in zip(captured(step), expected, strict=True))
