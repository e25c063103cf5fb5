"""FoldedLinear and add_low_rank against the dense masked computation, with every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from gatepack import functional
from gatepack._ext import fold_pack
from gatepack.functional import (
    FoldedLinear,
    add_low_rank,
    column_dot,
    lane_values,
    spread_lanes,
    take_lanes,
)

N, K = 12, 16
SETS = {
    "all": (None, None),
    "rows": ([0, 3, 4, 9], None),
    "cols": (None, [1, 2, 3, 8, 15]),
    "both": ([0, 3, 4, 9], [1, 2, 3, 8, 15]),
    "no rows": ([], None),
    "no cols": (None, []),
    "one": ([11], [0]),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def index(units):
    return None if units is None else torch.tensor(units, dtype=torch.int64)


def lanes_of(units, lanes):
    if units is None:
        return None
    return torch.tensor([u * lanes + i for u in units for i in range(lanes)], dtype=torch.int64)


def gate(count, dtype=torch.float32):
    return (torch.rand(count, generator=generator(7)) * 0.9 + 0.05).to(dtype).requires_grad_()


def leaves(x_shape, dtype, bias):
    x = random(*x_shape, dtype=dtype, seed=1).requires_grad_()
    w = random(N, K, dtype=dtype, seed=2).requires_grad_()
    b = random(N, dtype=dtype, seed=3).requires_grad_() if bias else None
    return x, w, b


def masked_dense(x, w, b, z_in, z_out, rows, cols, in_lanes, out_lanes):
    """The same function by autograd in x's precision: full width with zeros, then narrowed to open
    rows."""
    full = x if cols is None else x.new_zeros(*x.shape[:-1], K).index_copy(-1, cols, x)
    if z_in is not None:
        z = lane_values(z_in, in_lanes).to(x.dtype)
        z = z if cols is None else z.new_zeros(K).index_copy(0, cols, z)
        full = full * z
    y = full @ w.t()
    y = y if b is None else y + b
    y = y if rows is None else y.index_select(-1, rows)
    return y if z_out is None else y * lane_values(z_out, out_lanes).to(y.dtype)


def compare(inputs, x_shape, rows, cols, in_lanes=1, out_lanes=1):
    where = (rows, cols, in_lanes, out_lanes)
    assert_same(FoldedLinear.apply(*inputs, *where), masked_dense(*inputs, *where), inputs)


def assert_same(got, expected, inputs):
    """The values, and the gradients of all inputs that are not None."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)
    wanted = [leaf for leaf in inputs if leaf is not None]
    upstream = random(*expected.shape, seed=9)
    got_grads = torch.autograd.grad(got, wanted, upstream)
    expected_grads = torch.autograd.grad(expected, wanted, upstream)
    for leaf, mine, theirs in zip(wanted, got_grads, expected_grads, strict=True):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        if leaf.numel():
            tolerance = (
                1e-12 if leaf.dtype == torch.float64 else 1e-6 * max(1.0, float(theirs.abs().max()))
            )
            assert (mine - theirs).abs().max() <= tolerance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("gate_in", "gate_out"), list(itertools.product([False, True], repeat=2)), ids=str
)
@pytest.mark.parametrize("where", list(SETS))
def test_equals_masked_dense(where, gate_in, gate_out, bias):
    rows, cols = map(index, SETS[where])
    x_shape = (2, 5, K if cols is None else cols.numel())
    x, w, b = leaves(x_shape, torch.float64, bias)
    z_in = gate(x_shape[-1]) if gate_in else None
    z_out = gate(N if rows is None else rows.numel()) if gate_out else None
    compare((x, w, b, z_in, z_out), x_shape, rows, cols)


@pytest.mark.parametrize("heads", [None, [1], [0, 1]])
def test_groups_of_eight_input_lanes(heads):
    cols = lanes_of(heads, 8)
    x_shape = (6, K if cols is None else cols.numel())
    x, w, b = leaves(x_shape, torch.float64, True)
    compare((x, w, b, gate(x_shape[-1] // 8), None), x_shape, None, cols, in_lanes=8)


@pytest.mark.parametrize("groups", [None, [0, 2]])
def test_groups_of_four_output_rows(groups):
    rows = lanes_of(groups, 4)
    x, w, b = leaves((6, K), torch.float64, True)
    z_out = gate((N if rows is None else rows.numel()) // 4)
    compare((x, w, b, None, z_out), (6, K), rows, None, out_lanes=4)


@pytest.mark.parametrize("tokens", [(), (1,), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_shapes_of_x(tokens):
    rows, cols = map(index, SETS["both"])
    x_shape = (*tokens, cols.numel())
    x, w, b = leaves(x_shape, torch.float64, True)
    compare((x, w, b, gate(cols.numel()), gate(rows.numel())), x_shape, rows, cols)


def test_strided_operands():
    rows, cols = map(index, SETS["both"])
    x = random(cols.numel(), 6, seed=1).t().requires_grad_()
    w = random(K, N, seed=2).t().requires_grad_()
    compare((x, w, None, gate(cols.numel()), gate(rows.numel())), (6, cols.numel()), rows, cols)


def test_expanded_upstream_gradient():
    x, w, b = leaves((6, K), torch.float64, True)
    z = gate(K)
    y = FoldedLinear.apply(x, w, b, z, None, None, None, 1, 1)
    expected = masked_dense(x, w, b, z, None, None, None, 1, 1)
    upstream = torch.tensor(0.7, dtype=torch.float64).expand(6, N)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, w, b), upstream),
        torch.autograd.grad(expected, (x, w, b), upstream),
        strict=True,
    ):
        assert (mine - theirs).abs().max() <= 1e-12


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)))
def test_any_set_of_wanted_gradients(wanted):
    rows, cols = map(index, SETS["both"])
    x, w, b = leaves((3, cols.numel()), torch.float64, True)
    inputs = (x, w, b, gate(cols.numel()), gate(rows.numel()))
    for leaf, wants in zip(inputs, wanted, strict=True):
        leaf.requires_grad_(wants)
    y = FoldedLinear.apply(*inputs, rows, cols, 1, 1)
    assert y.requires_grad == any(wanted)
    chosen = [leaf for leaf in inputs if leaf.requires_grad]
    if chosen:
        upstream = random(*y.shape, seed=9)
        expected = masked_dense(*inputs, rows, cols, 1, 1)
        for mine, theirs in zip(
            torch.autograd.grad(y, chosen, upstream),
            torch.autograd.grad(expected, chosen, upstream),
            strict=True,
        ):
            assert (mine - theirs).abs().max() <= 1e-6


def test_zero_gate_gets_zero_gradient():
    x, w, b = leaves((4, K), torch.float64, True)
    z = torch.zeros(2, requires_grad=True)
    y = FoldedLinear.apply(x, w, b, z, None, None, None, 8, 1)
    assert torch.equal(y, b.expand(4, N))
    grad_x, grad_z = torch.autograd.grad(y, (x, z), random(4, N))
    assert torch.equal(grad_x, torch.zeros_like(x)) and grad_z.tolist() == [0.0, 0.0]


def test_saves_no_token_tensor_when_only_x_needs_a_gradient():
    x, w, b = leaves((64, K), torch.float64, True)
    w.requires_grad_(False), b.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        FoldedLinear.apply(x, w, b, gate(K).detach(), None, None, None, 1, 1)
    assert all(64 not in shape for shape in kept)
    assert (N, K) in kept


def test_double_backward_is_refused():
    x, w, b = leaves((4, K), torch.float64, True)
    y = FoldedLinear.apply(x, w, b, gate(K), None, None, None, 1, 1)
    upstream = random(4, N).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        grad.backward(random(4, K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_near_torchs_own(dtype):
    t, n, k = 96, 64, 80
    cols = torch.arange(k)[torch.rand(k, generator=generator(4)) > 0.4]
    rows = torch.arange(n)[torch.rand(n, generator=generator(5)) > 0.4]
    values = {
        "x": random(t, cols.numel(), seed=1).to(dtype),
        "w": (random(n, k, seed=2) / 8).to(dtype),
        "b": random(n, seed=3).to(dtype),
    }
    z_in, z_out = gate(cols.numel()).detach(), gate(rows.numel()).detach()
    upstream = random(t, rows.numel(), seed=6).to(dtype)

    def dense(x, w, b, z_in, z_out):
        return (F.linear(x * z_in.to(x.dtype), w[rows][:, cols], b[rows])) * z_out.to(x.dtype)

    def run(function, cast):
        inputs = [cast(v).requires_grad_() for v in (*values.values(), z_in, z_out)]
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]

    exact = run(dense, lambda v: v.double())
    theirs = run(dense, lambda v: v.clone())
    mine = run(lambda *args: FoldedLinear.apply(*args, rows, cols, 1, 1), lambda v: v.clone())
    for name, truth, torchs, ours in zip(
        ("y", "x", "w", "b", "z_in", "z_out"), exact, theirs, mine, strict=True
    ):
        assert ours.dtype == torchs.dtype
        allowed = 2 if name == "y" else 3
        own = (torchs.double() - truth).norm()
        assert (ours.double() - truth).norm() <= allowed * own + 1e-12, name


def test_column_dot_accumulates_in_fp32():
    a, b = (random(4096, 3, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    got = column_dot(a, b)
    assert got.dtype == torch.float32
    exact = (a.double() * b.double()).sum(0)
    assert (got - exact).abs().max() <= 1e-4
    assert column_dot(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("gate_in", "gate_out"), list(itertools.product([False, True], repeat=2)), ids=str
)
@pytest.mark.parametrize("where", list(SETS))
def test_low_rank_equals_masked_dense(where, gate_in, gate_out):
    rows, cols = map(index, SETS[where])
    a = random(3, K, seed=1).requires_grad_()
    b = random(N, 3, seed=2).requires_grad_()
    x = random(2, 5, K if cols is None else cols.numel(), seed=3).requires_grad_()
    y = random(2, 5, N if rows is None else rows.numel(), seed=5).requires_grad_()
    z_in = gate(x.shape[-1]) if gate_in else None
    z_out = gate(y.shape[-1]) if gate_out else None
    got = add_low_rank(y, x, a, b, 0.25, z_in, z_out, rows, cols, 1, 1)
    expected = y + 0.25 * masked_dense(x, b @ a, None, z_in, z_out, rows, cols, 1, 1)
    assert_same(got, expected, (y, x, a, b, z_in, z_out))


def test_low_rank_of_heads_and_of_other_dtypes():
    """Groups of lanes, and an fp32 adapter of a bf16 model: the product is fp32, the sum bf16."""
    cols, rows = lanes_of([0, 1], 4), lanes_of([2], 4)
    a, b = (random(*shape, dtype=torch.float32) for shape in ((3, K), (N, 3)))
    x, y = random(5, 8, dtype=torch.float32, seed=3), random(5, 4, seed=5).bfloat16()
    z_in, z_out = gate(2), gate(1)
    inputs = [t.requires_grad_() for t in (y, x, a, b, z_in, z_out)]
    got = add_low_rank(y, x, a, b, 0.25, z_in, z_out, rows, cols, 4, 4)
    low = 0.25 * masked_dense(x, b @ a, None, z_in, z_out, rows, cols, 4, 4)
    expected = y + low.bfloat16()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
    upstream = random(5, 4, seed=9).bfloat16()
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_low_rank_gives_closed_units_no_gradient():
    a, b, x, y = (random(*shape) for shape in ((3, K), (N, 3), (5, K), (5, N)))
    z_in = torch.zeros(2).requires_grad_()
    got = add_low_rank(y, x, a, b, 2.0, z_in, None, None, None, 8, 1)
    assert torch.equal(got, y)
    assert torch.autograd.grad(got, z_in, random(5, N))[0].tolist() == [0.0, 0.0]


def test_lane_values():
    z = torch.tensor([0.5, 1.0])
    assert lane_values(None, 4) is None and lane_values(z, 1) is z
    assert lane_values(z, 2).tolist() == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("lanes", [[], [2], [0, 3, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_lanes_are_taken_and_spread(lanes, shape):
    at = torch.tensor(lanes, dtype=torch.int64)
    x = random(*shape, seed=1).requires_grad_()
    y = take_lanes(x, at)
    assert torch.equal(y, x[..., at])
    full = spread_lanes(y, at, 5)
    kept = torch.zeros(5, dtype=torch.bool)
    kept[at] = True
    assert torch.equal(full, torch.where(kept, x, 0.0))
    (dx,) = torch.autograd.grad(full, x, upstream := random(*shape, seed=2))
    assert torch.equal(dx, torch.where(kept, upstream, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_lanes_move_bit_for_bit_however_they_lie(dtype):
    """By fold_pack on a CPU where it knows the dtype, in one step of autograd: NaN and all."""
    whole = (random(6, 9, seed=1) * 100).to(dtype)
    if dtype.is_floating_point:
        whole[2, 3] = float("nan")
    at = torch.tensor([0, 3, 4, 8])
    for x in (whole, whole.t().contiguous().t(), whole[::2]):
        taken = take_lanes(x, at)
        assert taken.dtype == dtype
        torch.testing.assert_close(taken, x[:, at], rtol=0, atol=0, equal_nan=True)
        full = spread_lanes(taken, at, 9)
        expected = torch.zeros_like(x).index_copy(1, at, x[:, at])
        torch.testing.assert_close(full, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("limit, past", [(0, True), (1 << 40, False)])
def test_large_weights_alone_are_packed_past_the_caches(monkeypatch, limit, past):
    asked = []

    def pack(*arguments, stream):
        asked.append(stream)
        return fold_pack(*arguments, stream=stream)

    monkeypatch.setattr(functional, "PAST_CACHES", limit)
    monkeypatch.setattr(functional, "fold_pack", pack)
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8)
    rows, z = torch.tensor([0, 2, 5]), torch.tensor([0.5, 1.0, 0.25])
    y = FoldedLinear.apply(x, w, None, None, z, rows, None, 1, 1)
    torch.testing.assert_close(y, x @ (w[rows] * z[:, None]).t())
    assert asked == [past]
