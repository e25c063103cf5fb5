import dataclasses
import importlib

import pytest
import torch
from ops import ids, make_gate

from gatepack.kernels import Tile, open_set_fn
from gatepack.kernels._tma import descriptor
from gatepack.kernels.gated_matmul import gated_matmul, gated_outer
from gatepack.kernels.open_sets import Axis
from gatepack.testing import poisoned_empty

gated_matmul_module = importlib.import_module("gatepack.kernels.gated_matmul")

T, N, K = 19, 24, 48
TILE = Tile(32, 32, 32, num_warps=1, num_stages=1, group_m=2)


def normal(*shape, device, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random).to(device)


def axes_of(z, group, capacity=None):
    """The same gated axis twice: for a full activation, and for a compact one."""
    units = open_set_fn(z)
    size = len(z) * group
    return Axis(size, z, units, group), Axis(size, z, units, group, True, capacity)


def lanes_of(axis):
    """Lanes of the open units, as a compact activation holds them, and how many."""
    count = int(axis.open_set[-1])
    units = axis.open_set[:count].long()
    inside = torch.arange(axis.group, device=units.device)
    return (units[:, None] * axis.group + inside).reshape(-1)


def compacted(x, axis):
    """[T, size] -> [T, columns], zeros past the open lanes."""
    lanes = lanes_of(axis)
    out = x.new_zeros(len(x), axis.columns)
    out[:, : len(lanes)] = x[:, lanes]
    return out


def capacities(z, group):
    """The whole axis, exactly what is open, and a little more than that."""
    count = int((z != 0).sum())
    return {None, count * group, min(count + 2, len(z)) * group}


# Gathered lanes, units that a tile fills, and units that it does not.
GROUPS = [1, 4, 16, 24]
SOME_GATES = ["open", "closed", "fractional"]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("gates", SOME_GATES)
def test_compact_input(gates, group, device):
    z = make_gate(gates, K // group).to(device)
    x, w = normal(T, K, device=device), normal(K, N, device=device, seed=1).t()
    for capacity in capacities(z, group):
        full, compact = axes_of(z, group, capacity)
        expected, _, _ = gated_matmul(x, w, full, Axis(N), TILE)
        with poisoned_empty():
            got, _, _ = gated_matmul(compacted(x, compact), w, compact, Axis(N), TILE)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("gates", SOME_GATES)
def test_compact_output(gates, group, device):
    z = make_gate(gates, K // group).to(device)
    dy, w, aux = (normal(*s, device=device) for s in ((T, N), (K, N), (T, K)))
    u, up = normal(T, 3, device=device), normal(K, 3, device=device)
    bias = normal(K, device=device)
    for capacity in capacities(z, group):
        full, compact = axes_of(z, group, capacity)
        rest = {"u": u, "up": up, "bias": bias, "keep": "yh", "alpha": 0.5}
        expected = gated_matmul(dy, w, Axis(N), full, TILE, aux=aux, **rest)
        with poisoned_empty():
            got = gated_matmul(dy, w, Axis(N), compact, TILE, aux=compacted(aux, compact), **rest)
            alone, _, _ = gated_matmul(dy, w, Axis(N), compact, TILE, **rest)
        assert torch.equal(got[0], compacted(expected[0], compact))
        assert torch.equal(got[1], compacted(expected[1], compact))
        assert torch.equal(got[2], expected[2])
        assert torch.equal(got[0], alone)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("gates", SOME_GATES)
def test_compact_sides_of_a_weight_gradient(gates, group, device):
    z = make_gate(gates, K // group).to(device)
    dy, x, w = (normal(*s, device=device) for s in ((T, K), (T, N), (K, N)))
    for capacity in capacities(z, group):
        full, compact = axes_of(z, group, capacity)
        expected = gated_outer(dy, x, full, Axis(N), TILE, w)
        with poisoned_empty():
            rows = gated_outer(compacted(dy, compact), x, compact, Axis(N), TILE, w)
            cols = gated_outer(x, compacted(dy, compact), Axis(N), compact, TILE, w.t())
        assert torch.equal(rows, expected)
        torch.testing.assert_close(cols, expected.t())
        closed = torch.ones(K, dtype=torch.bool, device=device)
        closed[lanes_of(compact)] = False
        assert (rows[closed] == 0).all()


@pytest.mark.parametrize("group", [1, 16])
def test_more_open_lanes_than_columns_give_nan(group, device):
    z = make_gate("open", K // group).to(device)
    _, compact = axes_of(z, group, K - 2 * group)
    small = normal(T, compact.columns, device=device)
    x, w = normal(T, N, device=device), normal(N, K, device=device)
    y, _, _ = gated_matmul(small, w, compact, Axis(N), TILE)
    h, _, dz = gated_matmul(x, w.t(), Axis(N), compact, TILE, aux=small)
    dw = gated_outer(x, small, Axis(N), compact, TILE, w)
    for name, out in {"y": y, "h": h, "dz": dz, "dw": dw}.items():
        assert out.isnan().all(), name


def test_lanes_can_be_skipped_without_a_gate(device):
    z = make_gate("mixed", K).to(device)
    full, compact = axes_of(z, 1)
    x, w = normal(T, K, device=device), normal(N, K, device=device)
    expected, _, _ = gated_matmul(x, w, full, Axis(N), TILE)
    got, _, _ = gated_matmul(compacted(x, compact), w, compact._replace(z=None), Axis(N), TILE)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize(
    ("dtype", "group"),
    [(torch.bfloat16, None), *((torch.bfloat16, g) for g in GROUPS), (torch.float32, 16)],
    ids=ids,
)
def test_persistent_programs_and_descriptors_change_nothing(
    dtype, group, compact, device, monkeypatch
):
    """The same tiles give the same bits, wherever operands come from and whoever computes them."""
    described = []

    def spy(*arguments):
        described.append(descriptor(*arguments))
        return described[-1]

    monkeypatch.setattr(gated_matmul_module, "descriptor", spy)
    looping = dataclasses.replace(TILE, persistent=2)
    t, n = 40, 32
    axis = Axis(K)
    if group:
        axis = axes_of(make_gate("fractional", K // group).to(device), group)[compact]
    x, dy = (normal(*s, device=device).to(dtype) for s in ((t, K), (t, n)))
    x = compacted(x, axis) if axis.compact else x
    for shape in ((n, K), (K, n)):
        w = normal(*shape, device=device, seed=1).to(dtype)
        w = w if shape == (n, K) else w.t()
        results = []
        for tile in (TILE, looping):
            y, _, _ = gated_matmul(x, w, axis, Axis(n), tile)
            dx, _, dz = gated_matmul(dy, w.t(), Axis(n), axis, tile, aux=x)
            results.append((y, dx, dz, gated_outer(dy, x, Axis(n), axis, tile, w)))
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)
    assert any(d is not None for d in described) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_compact_in_16_bit(dtype, device):
    z = make_gate("fractional", K).to(device)
    full, compact = axes_of(z, 1)
    x, w = normal(T, K, device=device).to(dtype), normal(N, K, device=device).to(dtype)
    expected, _, _ = gated_matmul(x, w, full, Axis(N), TILE)
    got, _, _ = gated_matmul(compacted(x, compact), w, compact, Axis(N), TILE)
    assert torch.equal(got, expected)
