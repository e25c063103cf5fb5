"""open_linear and its gradients against fp64, and where modules use them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatepack as gp
from gatepack import _ext, in_place
from gatepack._reference import open_linear_backward_ref, open_linear_ref
from gatepack.functional import FoldedLinear
from gatepack.in_place import DECODED, few_tokens, linear, open_linear, tokens_in_place
from gatepack.modules import PackedLinear
from gatepack.testing import assert_close_to_fp64

pytestmark = pytest.mark.skipif(
    _ext.backend().name == "torch", reason="gatepack._C could not be built"
)
ops = torch.ops.gatepack
SIZES = [(1, 1), (3, 15), (5, 33), (131, 100), (40, 576)]
TOKENS = [0, 1, 2, 3, 5, 8, 13, 48]
SIDES = ["all", "rows", "columns", "both"]


def normal(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*size).to(dtype)


def some(size: int, lanes: int = 1) -> torch.Tensor:
    """Indices of about 60 % of the lanes, in whole units."""
    units = (torch.rand(size // lanes) < 0.6).nonzero()
    return (units * lanes + torch.arange(lanes)).flatten()


def call(tokens, n, k, side="both", dtype=torch.float32, lanes=1):
    """x, dy and (w, bias, rows, cols, z_out, z_in, out_lanes, in_lanes)."""
    rows = some(n, lanes) if side in ("rows", "both") else None
    cols = some(k, lanes) if side in ("columns", "both") else None
    kept = n if rows is None else len(rows), k if cols is None else len(cols)
    gates = [None if i is None else torch.rand(len(i) // lanes) + 0.1 for i in (rows, cols)]
    for z in gates:
        if z is not None and len(z):
            z[0] = 0
    w, bias = normal(n, k, dtype=dtype), normal(n, dtype=dtype)
    x, dy = normal(tokens, kept[1], dtype=dtype), normal(tokens, kept[0], dtype=dtype)
    return x, dy, (w, bias, rows, cols, *gates, lanes, lanes)


def wide(values):
    return [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]


def largest(*factors: torch.Tensor) -> float:
    """The largest sum of magnitudes in a product: what fp32 sums may be as long as."""
    a, b = (factor.double().abs() for factor in factors)
    return (a @ b).max().item() if a.numel() and b.numel() else 0.0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("n, k", [*SIZES, (0, 8), (8, 0)])
def test_as_close_as_torch(n, k, side):
    for tokens in TOKENS:
        x, dy, arguments = call(tokens, n, k, side)
        _, _, rows, cols, z_out, z_in, *_ = arguments
        w = arguments[0]
        y, exact = ops.open_linear(x, *arguments), exact_forward(x, arguments)
        terms = 4 * largest(x if cols is None else x.new_ones(tokens, k), w.t()) + 4
        assert_close_to_fp64("y", y, open_linear_ref(x, *arguments), exact, terms=terms)
        saved = None if z_in is None else x, None if z_out is None else y
        got = ops.open_linear_backward(dy, *saved, w, *arguments[2:])
        theirs = open_linear_backward_ref(dy, *saved, w, *arguments[2:])
        truth = exact_backward(dy, *saved, arguments)
        for name, mine, their, true in zip(
            ("dx", "dz_out", "dz_in"), got, theirs, truth, strict=True
        ):
            assert mine.shape == true.shape and mine.dtype == torch.float32
            size = true.abs().max().item() if true.numel() else 0.0
            terms = 4 * max(size, largest(dy, dy.new_ones(dy.shape[1], 1)), 1.0)
            assert_close_to_fp64(name, mine, their, true, factor=3.0, terms=terms * 4)


def exact_forward(x, arguments):
    w, bias, rows, cols, z_out, z_in, *_ = wide(arguments)
    part = w if rows is None else w[rows]
    part = part if cols is None else part[:, cols]
    y = (x.double() if z_in is None else x.double() * z_in) @ part.t()
    y = y + (bias if rows is None else bias[rows])
    return y if z_out is None else y * z_out


def exact_backward(dy, x, y, arguments):
    w, _, rows, cols, z_out, z_in, *_ = wide(arguments)
    dy = dy.double()
    part = w if rows is None else w[rows]
    part = part if cols is None else part[:, cols]
    dx = (dy if z_out is None else dy * z_out) @ part
    dz_out = dz_in = dy.new_zeros(0)
    if y is not None:
        dz_out = torch.where(z_out > 0, (dy * y.double()).sum(0) / z_out, 0.0)
    if x is not None:
        dz_in = torch.where(z_in > 0, (dx * x.double()).sum(0), 0.0)
    return dx if z_in is None else dx * z_in, dz_out, dz_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lanes", [1, 4])
def test_lanes_share_a_gate(dtype, lanes):
    x, dy, arguments = call(6, 24, 40, "both", dtype, lanes)
    y = ops.open_linear(x, *arguments)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
    torch.testing.assert_close(y, open_linear_ref(x, *arguments), **tolerance)
    got = ops.open_linear_backward(dy, x, y, arguments[0], *arguments[2:])
    expected = open_linear_backward_ref(dy, x, y, arguments[0], *arguments[2:])
    loose = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **loose)


def test_rows_of_a_wider_matrix():
    x, dy, (_, *rest) = call(5, 9, 40)
    part = normal(9, 64)[:, :40]
    whole = part.contiguous()
    assert torch.equal(ops.open_linear(x, part, *rest), ops.open_linear(x, whole, *rest))
    one, two = (ops.open_linear_backward(dy, None, None, w, *rest[1:])[0] for w in (part, whole))
    assert torch.equal(one, two)


def test_closed_rows_may_hold_anything():
    x, dy, arguments = call(3, 60, 33, "rows")
    w, bias, rows = arguments[:3]
    before = (
        ops.open_linear(x, *arguments),
        *ops.open_linear_backward(dy, None, None, w, *arguments[2:]),
    )
    closed = torch.ones(60, dtype=torch.bool)
    closed[rows] = False
    w[closed], bias[closed] = float("nan"), float("inf")
    after = (
        ops.open_linear(x, *arguments),
        *ops.open_linear_backward(dy, None, None, w, *arguments[2:]),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_infinity_and_nan_stay_where_they_are():
    x, w = torch.ones(1, 20), torch.ones(4, 20)
    w[1, 3], w[2, 19] = float("inf"), float("nan")
    y = linear(x, w, None)[0]
    assert y[0] == 20 and y[1] == float("inf") and y[2].isnan() and y[3] == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_writes_the_same_bytes(dtype, simd_levels):
    for tokens in (1, 2, 7, 48):
        x, dy, arguments = call(tokens, 70, 200, dtype=dtype)
        found = []
        for _ in simd_levels():
            y = ops.open_linear(x, *arguments)
            found.append((y, *ops.open_linear_backward(dy, x, y, arguments[0], *arguments[2:])))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_threads_do_not_change_the_bits():
    x, dy, arguments = call(17, 900, 577)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.open_linear(x, *arguments)
            found.append((y, *ops.open_linear_backward(dy, x, y, arguments[0], *arguments[2:])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


X, W, NONE = normal(2, 4), normal(3, 4), (None,) * 5


@pytest.mark.parametrize(
    "x, w, rest, message",
    [
        (normal(2, 3), W, (*NONE, 1, 1), r"x must be \[T, 4\]"),
        (X, W.double(), (*NONE, 1, 1), "w must be float32 or bfloat16, got float64"),
        (X.bfloat16(), W, (*NONE, 1, 1), "x must be float32, got bfloat16"),
        (X, normal(4, 3).t(), (*NONE, 1, 1), "stride 1 along its rows"),
        (normal(2, 8)[:, ::2], W, (*NONE, 1, 1), "x must be contiguous"),
        (X, W, (normal(2), *NONE[1:], 1, 1), "bias must have 3 values"),
        (X, W, (None, torch.tensor([0, 3]), *NONE[2:], 1, 1), r"rows must be in \[0, 3\), got 3"),
        (X, W, (None, torch.tensor([-1, 2]), *NONE[2:], 1, 1), r"rows must be in .* got -1"),
        (X, W, (None, torch.tensor([1, 1]), *NONE[2:], 1, 1), "rows must be strictly increasing"),
        (X, W, (None, torch.tensor([0.0]), *NONE[2:], 1, 1), "rows must be int64 or int32"),
        (X, W, (None, None, torch.tensor([0, 4]), None, None, 1, 1), "cols must be in"),
        (X, W, (*NONE[:3], torch.rand(2), None, 1, 1), "z_out must have one value per kept unit"),
        (X, W, (*NONE[:4], torch.rand(4).double(), 1, 1), "z_in must be float32, got float64"),
        (X, W, (*NONE, 2, 1), "z_out must have a whole number of lanes"),
        (X, W, (*NONE, 1, 0), "z_in must have a whole number of lanes"),
    ],
)
def test_refusals(x, w, rest, message):
    with pytest.raises((ValueError, RuntimeError), match=f"open_linear: .*{message}"):
        ops.open_linear(x, w, *rest)
    dy = x.new_ones(2, 3)
    if message.startswith(("x must", "bias")):
        dy, message = dy.double(), "dy must be"
    with pytest.raises((ValueError, RuntimeError), match=f"open_linear_backward: .*{message}"):
        ops.open_linear_backward(dy, None, None, w, *rest[1:])


def test_backward_refuses_what_has_no_gate():
    dy, z = normal(2, 3), torch.rand(4)
    for saved, gates, message in (
        ((X, None), (None, None), "x must be None where z_in is"),
        ((None, dy), (None, None), "y must be None where z_out is"),
        ((normal(1, 4), None), (None, z), "as many tokens as dy"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.open_linear_backward(dy, *saved, W, None, None, *gates, 1, 1)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("side", SIDES)
def test_gradients_are_those_of_folded_linear(side, lanes):
    x, dy, (w, bias, rows, cols, z_out, z_in, *_) = call(6, 24, 40, side, torch.float32, lanes)
    x, dy = x.reshape(2, 3, -1), dy.reshape(2, 3, -1)
    results = []
    for function in (FoldedLinear.apply, open_linear):
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, bias, z_in, z_out)]
        y = function(leaves[0], w, *leaves[1:], rows, cols, lanes, lanes)
        wanted = [t for t in leaves if t is not None]
        results.append((y, *torch.autograd.grad(y, wanted, dy)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_input_may_have_any_strides():
    x, w = normal(24, 5).t().requires_grad_(), normal(7, 24)
    y = open_linear(x, w, None)
    torch.testing.assert_close(y, x @ w.t(), rtol=1e-4, atol=1e-5)
    (dx,) = torch.autograd.grad(y, x, normal(5, 1).expand(5, 7))
    assert dx.shape == x.shape


def test_what_it_leaves_to_others():
    x, w = normal(1, 24), normal(12, 24)
    assert tokens_in_place(w) == few_tokens()[torch.float32]
    trained = w.clone().requires_grad_()
    assert tokens_in_place(trained) == 0 and open_linear(x, trained, None) is None
    with torch.no_grad():
        assert open_linear(x, trained, None) is not None
    assert open_linear(x.double(), w.double(), None) is None
    assert open_linear(x, w.t().contiguous().t(), None) is None
    assert open_linear(normal(few_tokens()[torch.float32] + 1, 24), w, None) is None
    assert open_linear(normal(0, 24), w, None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert tokens_in_place(w) == 0 and linear(x, w, None).dtype == torch.bfloat16


def packed_linear(dtype=torch.float32) -> PackedLinear:
    linear = nn.Linear(24, 12, dtype=dtype)
    part = nn.Parameter(linear.weight.detach()[:8].clone()), nn.Parameter(linear.bias.detach()[:8])
    return PackedLinear.from_linear(linear, *part).requires_grad_(False)


def calls(monkeypatch) -> list:
    """Shapes that open_linear computes from here on."""
    seen, own = [], in_place.open_linear

    def counted(x, *arguments):
        y = own(x, *arguments)
        if y is not None:
            seen.append(tuple(x.shape))
        return y

    monkeypatch.setattr(in_place, "open_linear", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_uses_it_for_few_tokens(dtype, monkeypatch):
    packed, seen = packed_linear(dtype), calls(monkeypatch)
    few = DECODED[dtype]
    for shape in ((24,), (1, few, 24), (1, few + 1, 24), (0, 24)):
        x = normal(*shape, dtype=dtype)
        torch.testing.assert_close(packed(x), F.linear(x, packed.weight, packed.bias))
    assert seen == [(24,), (1, few, 24)]
    x = normal(1, few + 1, 24, dtype=dtype)
    assert torch.equal(packed(x), F.linear(x, packed.weight, packed.bias))


def test_packed_linear_leaves_the_rest_to_torch(monkeypatch):
    packed, seen = packed_linear(), calls(monkeypatch)
    x = normal(1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
    torch.compile(packed, backend="eager", fullgraph=True)(x)
    trained = copy.deepcopy(packed).requires_grad_(True)
    trained(x).sum().backward()
    assert trained.weight.grad is not None and not seen
    with pytest.raises(RuntimeError):
        packed(normal(1, 23))


@pytest.mark.parametrize("forced", [None, "folded"])
def test_a_forced_path_packs(forced, monkeypatch):
    if forced:
        monkeypatch.setenv("GATEPACK_BACKEND", forced)
    seen, rows = calls(monkeypatch), torch.tensor([0, 2])
    y = in_place.folded_linear(X, W, None, None, None, rows, None, 1, 1)
    torch.testing.assert_close(y, (X @ W.t())[:, rows])
    assert seen == ([] if forced else [(2, 4)])


def test_gated_linear_matches_a_masked_one():
    gates = gp.gates.GateSet(
        gp.GateConfig(noise=0.0), {"out:channels": gp.gates.GateSpec("channels", 12)}
    )
    with torch.no_grad():
        gates.logits.copy_(torch.linspace(-2, 2, 12))
    gated = gp.GatedLinear(24, 12, out_gate=gates["out:channels"]).requires_grad_(False)
    x, z = normal(3, 24).requires_grad_(), gates.deterministic_values()
    assert 0 < (z == 0).sum() < 12
    y = gated(x)
    torch.testing.assert_close(y, F.linear(x, gated.weight, gated.bias) * z)
    dx, dlogits = torch.autograd.grad(y, (x, gates.logits), torch.ones_like(y))
    torch.testing.assert_close(dx, (z * torch.ones(3, 12)) @ gated.weight)
    assert dlogits[z == 0].eq(0).all() and dlogits.any()
