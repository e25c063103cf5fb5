import itertools
import math

import pytest
import torch
from ops import captured, ids, no_host_sync

from gatepack.estimators import STG, HardConcrete
from gatepack.kernels import Panel, open_set_ref, sample_gates_fn, sample_gates_ref
from gatepack.kernels.sample_gates import ESTIMATORS
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty

SIZES = [7, 0, 1, 66, 32, 2]
SMALL = Panel(rows=1, columns=64, span=1, num_warps=1)
# Where the gates of an estimator are open, closed and in between.
CENTER = {"stg": 0.0, "hard_concrete": 0.0, "gumbel": -3.4}


def offsets_of(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def make_inputs(estimator, sizes=SIZES, seed=0, closed=True):
    """Logits, offsets and settings of sample_gates_fn on the CPU."""
    random = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    logits = CENTER[estimator] + torch.randn(n, generator=random)
    settings = {"seed": 11, "draw": torch.tensor([5]), "estimator": estimator, "sigma": 0.2}
    if closed:
        settings["closed"] = torch.rand(n, generator=random) < 0.2
    return logits, offsets_of(sizes), settings


def on(device, settings):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


def sample(fn, logits, offsets, dz, **settings):
    logits = logits.detach().requires_grad_()
    z, open_sets = fn(logits, offsets, **settings)
    (dlogits,) = torch.autograd.grad(z, logits, dz.to(z))
    return z.detach(), open_sets, dlogits


def check(logits, offsets, settings, device, config=SMALL):
    """z, open sets and dlogits, from poisoned memory, against fp64 and torch's own error."""
    logits, offsets, settings = logits.to(device), offsets.to(device), on(device, settings)
    dz = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7)).to(device)
    truth = sample(sample_gates_ref, logits.double(), offsets, dz, **settings)
    theirs = sample(sample_gates_ref, logits, offsets, dz, **settings)
    with poisoned_empty():
        ours = sample(
            sample_gates_fn, logits, offsets, dz, max_segment=100, config=config, **settings
        )
    assert_close_to_fp64("z", ours[0], theirs[0], truth[0])
    assert_close_to_fp64("dlogits", ours[2], theirs[2], truth[2], factor=3)
    assert torch.equal(ours[1], open_sets_of(ours[0], offsets))
    assert torch.equal(ours[1], truth[1])
    return ours


def open_sets_of(z, offsets):
    segments = torch.split(z, offsets.diff().tolist())
    return torch.cat([offsets[:0], *(open_set_ref(segment) for segment in segments)])


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(estimator, noise, device):
    logits, offsets, settings = make_inputs(estimator)
    z, _, _ = check(logits, offsets, settings | {"noise": noise}, device)
    assert 0.05 < (z == 0).float().mean() < 0.95


@pytest.mark.parametrize("config", [None, Panel(1, 16, 1, num_warps=1)])
def test_tiles(config, device):
    check(*make_inputs("stg"), device, config=config)


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (1, 2**31), (-5, 2**32 + 1), (2**40 + 3, -1)])
def test_seeds_and_draws(seed, draw, device):
    logits, offsets, settings = make_inputs("stg")
    check(logits, offsets, settings | {"seed": seed, "draw": torch.tensor(draw)}, device)


@pytest.mark.parametrize("logit", [-6.0, 6.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_logits(estimator, logit, device):
    logits, offsets, settings = make_inputs(estimator, [33], closed=False)
    check(torch.full_like(logits, logit), offsets, settings, device)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("logit", [-300.0, 300.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_logits_that_overflow_exp(estimator, logit, device):
    logits = torch.full((3,), logit, device=device)
    offsets, dz = offsets_of([3]).to(device), torch.ones(3)
    settings = {"max_segment": 3, "estimator": estimator, "noise": False}
    z, _, dlogits = sample(sample_gates_fn, logits, offsets, dz, **settings)
    assert (z == (logit > 0)).all() and (dlogits == 0).all()


def test_strides(device):
    logits, offsets, settings = make_inputs("stg")
    logits = logits.repeat_interleave(2)[::2]
    settings["closed"] = settings["closed"].repeat_interleave(3)[::3]
    check(logits, offsets, settings, device)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 5]], ids=ids)
def test_zero_sizes(sizes, device):
    check(*make_inputs("stg", sizes), device)


def test_closed_gates_are_zero_and_get_no_gradient(device):
    logits, offsets, settings = make_inputs("gumbel")
    closed = settings["closed"]
    logits[closed] = float("nan")
    z, _, dlogits = sample(
        sample_gates_fn, logits.to(device), offsets.to(device), torch.ones(len(logits)),
        max_segment=66, **on(device, settings),
    )  # fmt: skip
    assert (z[closed] == 0).all() and (dlogits[closed] == 0).all()
    assert z.isfinite().all() and dlogits.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_nan_logit_gives_an_open_nan_gate(estimator, device):
    logits = torch.tensor([float("nan"), -9.0, 9.0], device=device)
    offsets = torch.tensor([0, 3], dtype=torch.int32, device=device)
    z, open_set = sample_gates_fn(logits, offsets, max_segment=3, estimator=estimator, noise=False)
    assert z[0].isnan() and z[1:].tolist() == [0, 1]
    assert open_set.tolist() == [0, 2, 1, 2]


def test_noise_follows_draw_and_position_only(device):
    logits = torch.zeros(40, device=device)

    def draw(number, sizes):
        number = torch.tensor(number, device=device)
        offsets = offsets_of(sizes).to(device)
        return sample_gates_fn(logits[: sum(sizes)], offsets, max_segment=9, seed=3, draw=number)[0]

    first = draw(0, [40])
    assert torch.equal(first[:30], draw(0, [11, 19]))
    assert not torch.equal(first, draw(1, [40]))
    assert torch.equal(first, draw(0, [40]))


@pytest.mark.parametrize(
    ("estimator", "constants"), [("stg", STG(0.3)), ("hard_concrete", HardConcrete(1.0))]
)
def test_same_values_as_the_estimators_of_gatepack(estimator, constants, device):
    logits = torch.linspace(-3, 3, 61, device=device)
    offsets = torch.tensor([0, 61], dtype=torch.int32, device=device)
    z, _ = sample_gates_fn(logits, offsets, max_segment=61, estimator=estimator, noise=False)
    torch.testing.assert_close(z, constants.values(logits))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_distribution(estimator, device):
    """Mean and deviation of the noise over 8192 gates, within 5 standard errors."""
    logits = torch.full((8192,), {"stg": 0.0, "hard_concrete": 0.3, "gumbel": -3.4}[estimator])
    offsets = torch.tensor([0, 8192], dtype=torch.int32)
    z, _ = sample_gates_ref(logits, offsets, draw=torch.tensor(2), estimator=estimator, sigma=0.1)
    if estimator == "stg":
        assert abs(z.mean() - 0.5) < 5 * 0.1 / math.sqrt(8192)
        assert abs(z.std() - 0.1) < 5 * 0.1 / math.sqrt(2 * 8192)
        return
    open_probability = {
        "hard_concrete": HardConcrete(1.0).open_probability(logits)[0].item(),
        "gumbel": 1 - math.exp(-math.exp(-0.4)),
    }[estimator]
    error = math.sqrt(open_probability * (1 - open_probability) / 8192)
    assert abs((z > 0).float().mean() - open_probability) < 5 * error


def test_draw_may_change_before_the_backward(device):
    logits, offsets, settings = make_inputs("gumbel")
    expected = check(logits, offsets, settings, device)[2]
    settings = on(device, settings)
    leaf = logits.to(device).requires_grad_()
    z, _ = sample_gates_fn(leaf, offsets.to(device), max_segment=9, config=SMALL, **settings)
    settings["draw"] += 1
    dz = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7)).to(device)
    z.backward(dz)
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opcheck(estimator, device):
    logits, offsets, settings = make_inputs(estimator, [3, 9])
    draw, closed = settings["draw"].to(device), settings["closed"].to(device)
    logits = logits.to(device).requires_grad_()
    arguments = (logits, offsets.to(device), draw, closed, 9, 3, estimator, 0.1, True, [])
    torch.library.opcheck(torch.ops.gatepack.sample_gates.default, arguments)
    dz = torch.randn_like(logits)
    arguments = (dz, logits.detach(), draw, closed, 3, estimator, 0.1, True, [])
    torch.library.opcheck(torch.ops.gatepack.sample_gates_backward.default, arguments)


def test_compiles_into_one_graph(device):
    logits, offsets, settings = make_inputs("stg")
    dz, settings = torch.randn(logits.shape, device=device), on(device, settings)
    arguments = (logits.to(device), offsets.to(device), dz)
    settings |= {"max_segment": 66, "config": SMALL}
    compiled = torch.compile(sample_gates_fn, fullgraph=True, backend="aot_eager")
    expected = sample(sample_gates_fn, *arguments, **settings)
    for ours, theirs in zip(sample(compiled, *arguments, **settings), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_second_derivative_is_refused(device):
    logits = torch.zeros(5, device=device, requires_grad=True)
    offsets = torch.tensor([0, 5], dtype=torch.int32, device=device)
    z, _ = sample_gates_fn(logits, offsets, max_segment=5, noise=False)
    (grad,) = torch.autograd.grad(z, logits, torch.ones_like(z).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="sample_gates has no second derivative"):
        grad.sum().backward()


REFUSED = [
    ({"logits": torch.zeros(2, 3)}, r"logits: expected one dimension, got shape \(2, 3\)"),
    ({"logits": torch.zeros(6).half()}, "logits: expected dtype torch.float32, got torch.float16"),
    ({"offsets": torch.zeros(3)}, r"offsets: expected int32 \[segments \+ 1\], got torch.float32"),
    ({"offsets": torch.zeros(0, dtype=torch.int32)}, r"offsets: expected int32 .* shape \(0,\)"),
    ({"closed": torch.zeros(5, dtype=torch.bool)}, r"closed: expected bool of shape \(6,\)"),
    ({"closed": torch.zeros(6)}, r"closed: expected bool of shape \(6,\), got torch.float32"),
    (
        {"closed": torch.zeros(6, dtype=torch.bool, device="meta")},
        "closed: expected device .* meta",
    ),
    ({"draw": None}, "draw: expected one int64 for the noise, got None"),
    ({"draw": torch.zeros(2, dtype=torch.int64)}, r"draw: expected one int64 .* shape \(2,\)"),
    ({"draw": torch.zeros(1, dtype=torch.int64, device="meta")}, "draw: expected device .* meta"),
    ({"estimator": "relaxed"}, "estimator: expected one of .*, got 'relaxed'"),
    ({"sigma": -0.1}, "sigma: expected a finite number >= 0, got -0.1"),
    ({"max_segment": -1}, "max_segment: expected at least 0, got -1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = {
        "logits": torch.zeros(6),
        "offsets": torch.tensor([0, 6], dtype=torch.int32),
        "draw": torch.zeros(1, dtype=torch.int64),
        "max_segment": 6,
    } | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        sample_gates_fn(**arguments)


def test_the_reference_refuses_an_unknown_estimator():
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="estimator: expected one of .*, got 'relaxed'"):
        sample_gates_ref(torch.zeros(6), offsets, noise=False, estimator="relaxed")


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_llama_3_8b(estimator, device):
    shape = MODEL_SHAPES["llama-3-8b"]
    check(*make_inputs(estimator, [shape.heads, shape.mlp] * 4), device, config=None)


@pytest.mark.gpu
def test_a_replayed_graph_draws_anew(device):
    logits, offsets, settings = make_inputs("stg")
    logits, offsets, settings = logits.to(device), offsets.to(device), on(device, settings)

    def step():
        z = sample_gates_fn(logits, offsets, max_segment=66, **settings)[0]
        settings["draw"] += 1
        return z

    with no_host_sync():
        step()
    replayed = captured(step)
    settings["draw"] -= 1
    assert torch.equal(replayed, step())
