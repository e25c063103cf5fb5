"""The CPU passes of gatepack._C against torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from gatepack import _ext
from gatepack.functional import column_dot, gate_lanes, swiglu
from gatepack.testing import assert_close_to_fp64

pytestmark = pytest.mark.skipif(
    _ext.backend().name == "torch", reason="gatepack._C could not be built"
)
ops = torch.ops.gatepack


def normal(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*size).to(dtype)


@pytest.mark.parametrize("size", [(0,), (1,), (5, 31), (7, 64)])
def test_swiglu_and_its_gradients_are_as_close_as_torch(size):
    a, u, dh = (normal(*size).requires_grad_() for _ in range(3))
    exact_a, exact_u = (t.detach().double().requires_grad_() for t in (a, u))
    exact = F.silu(exact_a) * exact_u
    theirs = F.silu(a) * u
    got = swiglu(a, u)
    assert got.grad_fn.name() == "_SwiGLUBackward"
    largest = exact.abs().max().item() if a.numel() else 0.0
    assert_close_to_fp64("h", got, theirs, exact, terms=largest)
    upstream = dh.detach()
    truth = torch.autograd.grad(exact, (exact_a, exact_u), upstream.double())
    torchs = torch.autograd.grad(theirs, (a, u), upstream)
    ours = torch.autograd.grad(got, (a, u), upstream)
    for name, mine, their, true in zip(("da", "du"), ours, torchs, truth, strict=True):
        assert_close_to_fp64(name, mine, their, true, factor=3.0)


@pytest.mark.parametrize("tokens, n", [(0, 4), (1, 1), (3, 31), (70, 64), (65, 300)])
def test_gated_swiglu_and_its_gradients_are_as_close_as_torch(tokens, n):
    a, u, dh = (normal(tokens, n) for _ in range(3))
    z = torch.rand(n)
    z[::3] = 0
    results = []
    for dtype, compute in (
        (torch.float64, lambda a, u, z: F.silu(a) * u * z),
        (torch.float32, lambda a, u, z: F.silu(a) * u * z),
        (torch.float32, swiglu),
    ):
        inputs = [t.to(dtype).requires_grad_() for t in (a, u, z)]
        h = compute(*inputs)
        results.append((h, *torch.autograd.grad(h, inputs, dh.to(dtype))))
    exact, theirs, ours = results
    assert ours[0].grad_fn.name() == "_SwiGLUBackward"
    closed = z == 0
    assert not ours[3][closed].any()
    terms = (dh.double() * exact[0].detach() / z.double())[:, ~closed].abs().sum(0)
    for name, mine, their, true in zip(
        ("h", "da", "du"), ours[:3], theirs[:3], exact[:3], strict=True
    ):
        assert_close_to_fp64(name, mine, their, true, factor=3.0)
    mine, their, true = (grads[3][~closed] for grads in (ours, theirs, exact))
    most = terms.max().item() if terms.numel() else 0.0
    assert_close_to_fp64("dz", mine, their, true, factor=3.0, terms=2 * most)


def test_closed_lanes_give_zero_whatever_they_hold():
    a, u, z = normal(3, 40), normal(3, 40), torch.ones(40, requires_grad=True)
    a[:, 7], u[1, 9] = float("nan"), float("inf")
    with torch.no_grad():
        z[7] = z[9] = 0
    for h in (swiglu(a, u, z), gate_lanes(a * u, z, 1)):
        assert h.isfinite().all() and not h[:, [7, 9]].any()
    h = swiglu(a.requires_grad_(), u.requires_grad_(), z)
    for grad in torch.autograd.grad(h, (a, u, z), torch.ones_like(h)):
        assert grad.isfinite().all() and not grad[..., [7, 9]].any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_python_take_the_passes(dtype, autocast):
    x, dy = normal(3, 40, dtype=dtype).requires_grad_(), normal(3, 40, dtype=dtype)
    z = torch.rand(8, requires_grad=True)
    with profile() as trace, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.autograd.grad(gate_lanes(x, z, 5), (x, z), dy)
        column_dot(x.detach(), dy)
    taken = {event.key for event in trace.key_averages()}
    assert taken >= {
        f"gatepack::{name}" for name in ("gate_lanes", "gate_lanes_backward", "column_products")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tokens, units, lanes", [(0, 4, 2), (1, 1, 1), (3, 0, 5), (3, 9, 64), (70, 5, 37), (65, 300, 1)]
)
def test_gated_lanes_and_their_gradients_are_as_close_as_torch(dtype, tokens, units, lanes):
    x, dy = (normal(tokens, units * lanes, dtype=dtype) for _ in range(2))
    z = torch.rand(units)
    z[::3] = 0
    wide, closed = z.repeat_interleave(lanes), z == 0
    y = ops.gate_lanes(x, z, lanes)
    dx, dz = ops.gate_lanes_backward(dy, x, z, lanes)
    # One rounding, as in torch.
    assert torch.equal(y, (x * wide).to(dtype)) and torch.equal(dx, (dy * wide).to(dtype))
    assert not dz[closed].any()
    products = dy.double() * x.double()
    exact = products.sum(0).reshape(units, lanes).sum(1)
    theirs = (dy.float() * x.float()).sum(0).reshape(units, lanes).sum(1)
    terms = products.abs().sum(0).reshape(units, lanes).sum(1)[~closed]
    most = terms.max().item() if terms.numel() else 0.0
    assert_close_to_fp64(
        "dz", dz[~closed], theirs[~closed], exact[~closed], factor=3.0, terms=2 * most
    )


def test_gated_lanes_round_every_bfloat16_as_torch_does(simd_levels):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(64, 1024)
    z = torch.rand(16).clamp_min(0.1)
    for _ in simd_levels():
        y, wanted = ops.gate_lanes(x, z, 64), (x * z.repeat_interleave(64)).bfloat16()
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


def test_closed_units_stop_what_is_no_number():
    x, dy, z = normal(3, 40), normal(3, 40), torch.ones(10)
    x[:, 8], dy[1, 9], z[2] = float("nan"), float("inf"), 0
    dx, dz = ops.gate_lanes_backward(dy, x, z, 4)
    for found in (ops.gate_lanes(x, z, 4), dx):
        assert found.isfinite().all() and not found[:, 8:12].any()
    assert dz.isfinite().all() and dz[2] == 0


def test_gated_lanes_do_not_depend_on_the_number_of_threads():
    x, dy, z = normal(300, 700), normal(300, 700), torch.rand(100)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((ops.gate_lanes(x, z, 7), *ops.gate_lanes_backward(dy, x, z, 7)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(
    "x, z, lanes, message",
    [
        (normal(2, 8).double(), torch.ones(4), 2, "x must be float32 or bfloat16, got float64"),
        (normal(2, 8).t(), torch.ones(1), 2, "x must be contiguous"),
        (normal(2, 8), torch.ones(4).double(), 2, "z must be float32, contiguous and on the CPU"),
        (normal(2, 8), torch.ones(8)[::2], 2, "z must be float32, contiguous and on the CPU"),
        (normal(2, 8), torch.ones(4), 0, "lanes must be at least 1, got 0"),
        (normal(2, 8), torch.ones(3), 2, "z must have one value for every 2 of the last"),
    ],
)
def test_gated_lanes_refuse(x, z, lanes, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.gate_lanes(x, z, lanes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.gate_lanes_backward(x, x, z, lanes)


def test_swiglu_refuses_gates_of_another_size():
    a = normal(2, 8)
    for z in (torch.ones(7), torch.ones(2, 8), torch.ones(8).double(), torch.ones(16)[::2]):
        with pytest.raises((ValueError, RuntimeError), match="swiglu: z must"):
            ops.swiglu(a, a, z)


def test_swiglu_far_from_zero():
    a = torch.tensor([-1e30, -200.0, -88.0, -30.0, 30.0, 88.0, 200.0, 1e30, float("nan")])
    h = ops.swiglu(a, torch.ones_like(a))
    torch.testing.assert_close(h, F.silu(a), equal_nan=True)
    da, du, dz = ops.swiglu_backward(torch.ones(8), a[:8], torch.ones(8))
    assert dz.shape == (0,)
    assert da.isfinite().all() and du.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, n", [(0, 5), (1, 1), (65, 33), (300, 600)])
def test_column_products_are_as_close_as_torch(dtype, tokens, n):
    a, b = normal(tokens, n, dtype=dtype), normal(tokens, n, dtype=dtype)
    exact = (a.double() * b.double()).sum(0)
    terms = (a.double() * b.double()).abs().sum(0).max().item()
    got, theirs = column_dot(a, b), (a.float() * b.float()).sum(0)
    assert_close_to_fp64("sums", got, theirs, exact, terms=2 * terms)


def test_every_instruction_set_writes_the_same_bytes(simd_levels):
    a, u, dh, z = normal(9, 75), normal(9, 75), normal(9, 75), torch.rand(75)
    found = []
    for _ in simd_levels():
        found.append(
            (
                ops.swiglu(a, u),
                *ops.swiglu_backward(dh, a, u),
                ops.swiglu(a, u, z),
                *ops.swiglu_backward(dh, a, u, z),
                ops.gate_lanes(a, z[:15], 5),
                *ops.gate_lanes_backward(dh, a, z[:15], 5),
                *ops.gate_lanes_backward(dh.bfloat16(), a.bfloat16(), z[:15], 5),
                ops.column_products(a, u),
            )
        )
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
