"""Plans: what they pack is what the model computes, and they survive JSON and being undone."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import assert_same_bytes, gate, matrix, open_sets

from gatepack._reference import E4M3
from gatepack.repack import (
    PackPlan,
    Part,
    Piece,
    pack_heads,
    pack_tensors,
    plan_channels,
    plan_heads,
    unpack_tensors,
)  # fmt: skip
from gatepack.repack import (
    open_sets as open_sets_op,
)

D, KV, RATIO, HIDDEN = 8, 3, 2, 20


@st.composite
def plans(draw):
    parts = {}
    for i in range(draw(st.integers(1, 4))):
        m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        rows, cols = draw(open_sets(m)), draw(open_sets(n))
        multiples = [draw(st.sampled_from((1, 16))) for _ in range(2)]
        order = draw(st.sampled_from(("keep", "row", "column")))
        parts[f"{i}.weight"] = Part((m, n), rows, cols, *multiples, order)
        parts[f"{i}.bias"] = Part((m,), rows, None, multiples[0])
    return PackPlan(parts)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_a_plan_survives_json_and_is_undone_by_unpack(plan):
    tensors = {
        name: matrix(*(*part.shape, 1)[:2], torch.bfloat16, seed=i).view(part.shape)
        for i, (name, part) in enumerate(plan.parts.items())
    }
    packed = plan.pack(tensors)
    again = PackPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    for name, tensor in again.pack(tensors).items():
        assert_same_bytes(tensor, packed[name])
    for name, full in plan.unpack(packed).items():
        part = plan.parts[name]
        kept = torch.zeros(*(*part.shape, 1)[:2], dtype=torch.bool)
        rows = torch.arange(kept.shape[0]) if part.rows is None else part.rows.long()
        cols = torch.arange(kept.shape[1]) if part.cols is None else part.cols.long()
        kept[rows[:, None], cols[None]] = True
        assert_same_bytes(full, torch.where(kept.view(part.shape), tensors[name], 0))
        assert packed[name].shape[0] == -(-part.kept[0] // part.row_multiple) * part.row_multiple


def test_e4m3_comes_with_scales_and_goes_back():
    plan = PackPlan({"up.weight": Part((12, 40), torch.tensor([0, 5, 7]), None, 8, 64)})
    plan = PackPlan({**plan.parts, "up.bias": Part((12,), torch.tensor([0, 5, 7]), None, 8)})
    tensors = {"up.weight": matrix(12, 40, torch.bfloat16), "up.bias": torch.randn(12)}
    packed = plan.pack(tensors, dtype=E4M3)
    assert list(packed) == ["up.weight", "up.weight_scale", "up.bias"]
    assert packed["up.weight"].shape == (8, 64) and packed["up.weight_scale"].shape == (8,)
    assert packed["up.bias"].dtype == torch.float32 and packed["up.bias"].shape == (8,)
    full = plan.unpack(packed, torch.bfloat16)
    w, back = tensors["up.weight"].float(), full["up.weight"].float()
    largest = w.abs().amax(1, keepdim=True)
    rows = [0, 5, 7]
    assert ((back - w).abs() <= w.abs() / 15 + largest / 448 / 512)[rows].all()
    assert not full["up.weight"][[1, 2, 3, 4, 6]].any()


def test_packing_commutes_with_merging():
    """Merge then slice is slice W, A and B, then merge."""
    w, a, b = matrix(30, 50, torch.float32), torch.randn(4, 50), torch.randn(30, 4)
    rows, cols = torch.arange(0, 30, 3), torch.arange(1, 50, 2)
    z_in = gate(25, 0)
    (merged,), _ = pack_tensors([Piece(w, rows, cols, None, z_in, (a, b, 0.5))])
    (k, ka), _ = pack_tensors([Piece(w, rows, cols), Piece(a, None, cols)])
    (kb,), _ = pack_tensors([Piece(b, rows)])
    (after,), _ = pack_tensors([Piece(k, z_in=z_in, lora=(ka, kb, 0.5))])
    assert_same_bytes(merged, after)


def attention(t, x, cos, sin, pairs_of):
    """Causal attention, rotate-half RoPE; cos, sin [T, KV, P]: pairs of each key/value head."""
    q, k, v = (F.linear(x, t[n], t.get(f"{n}.bias")) for n in "qkv")
    kv = pairs_of.shape[0]
    k, v = k.view(len(x), kv, -1), v.view(len(x), kv, -1)
    q = q.view(len(x), kv, -1, k.shape[-1])

    def turn(y, cos, sin):
        a, b = y.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    k = turn(k, cos, sin)
    q = turn(q, cos[:, :, None], sin[:, :, None])
    scores = torch.einsum("tgrd,sgd->grts", q, k)
    mask = torch.ones(len(x), len(x)).tril().bool()
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return F.linear(torch.einsum("grts,sgd->tgrd", p, v).flatten(1), t["o"])


@pytest.mark.parametrize("narrow", (False, True))
def test_packed_heads_compute_what_the_gated_ones_do(narrow):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = KV * RATIO
    full = {"q": random(heads * D, HIDDEN), "k": random(KV * D, HIDDEN)}
    full |= {"v": random(KV * D, HIDDEN), "o": random(HIDDEN, heads * D)}
    full |= {"q.bias": random(heads * D), "v.bias": random(KV * D)}
    x, angles = random(5, HIDDEN), random(5, D // 2)
    open_heads = torch.tensor([1, 4])  # of the groups {0, 1} and {4, 5}
    z = torch.tensor([0.5, 0.25])
    pairs = torch.tensor([[0, 2], [0, 1], [1, 3]]) if narrow else None
    v_lanes = torch.tensor([0, 3, 7]) if narrow else None
    packed = pack_heads(full, open_heads, D, z=z, pairs=pairs, v_lanes=v_lanes)
    assert packed["q"].shape == ((4 if narrow else D) * 2, HIDDEN)
    assert packed["o"].shape == (HIDDEN, (3 if narrow else D) * 2)

    gated = {name: t.clone() for name, t in full.items()}
    values = torch.zeros(heads, dtype=torch.float64)
    values[open_heads] = z.double()
    gated["o"] *= values.repeat_interleave(D)
    if narrow:
        for g in range(KV):
            closed = [p for p in range(D // 2) if p not in pairs[g]]
            lanes = torch.tensor([*closed, *(p + D // 2 for p in closed)]) + g * D
            gated["k"][lanes] = 0
            dead = torch.tensor([i for i in range(D) if i not in v_lanes]) + g * D
            gated["v"][dead] = 0
            gated["v.bias"][dead] = 0
    angles = angles[:, None].expand(-1, KV, -1)
    every = torch.arange(D // 2).expand(KV, -1)
    expected = attention(gated, x, angles.cos(), angles.sin(), every)
    kept = pairs[[0, 2]] if narrow else every[:2]
    small = torch.stack([angles[:, g, p] for g, p in zip((0, 2), kept, strict=True)], 1)
    actual = attention(packed, x, small.cos(), small.sin(), kept)
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_interleaved_pairs_are_neighbours():
    shapes = {"q": (16, 4), "k": (16, 4), "v": (16, 4), "o": (4, 16)}
    plan = plan_heads(torch.tensor([1]), shapes, 8, pairs=torch.tensor([0, 3]), interleaved=True)
    assert plan.parts["q"].rows.tolist() == [8, 9, 14, 15]
    assert plan.parts["o"].cols.tolist() == list(range(8, 16))


@pytest.mark.parametrize(
    "change, message",
    (
        ({"open_heads": torch.tensor([0, 1, 2])}, "expected equally many query heads"),
        ({"open_heads": torch.tensor([6])}, r"open_heads: .* in \[0, 6\)"),
        ({"open_heads": torch.tensor([1, 1])}, "open_heads: expected strictly increasing"),
        ({"pairs": torch.tensor([4])}, r"pairs: .* in \[0, 4\)"),
        ({"pairs": torch.zeros(2, 1)}, r"pairs: expected \[n\] or \[3, n\], got \[2, 1\]"),
        ({"head_dim": 7}, "shapes: expected query heads in multiples"),
    ),
)
def test_plan_heads_refuses(change, message):
    shapes = {"q": (48, 4), "k": (24, 4), "v": (24, 4), "o": (4, 48)}
    arguments = {"open_heads": torch.tensor([0, 2]), "shapes": shapes, "head_dim": D, **change}
    with pytest.raises(ValueError, match=message):
        plan_heads(**arguments)


def test_channels_are_padded_and_channel_major():
    shapes = {"gate": (30, 6), "up": (30, 6), "up.bias": (30,), "down": (6, 30)}
    plan = plan_channels(torch.tensor([2, 3, 29]), shapes, multiple=8, channel_major=True)
    t = {name: torch.randn(shape) for name, shape in shapes.items()}
    packed = plan.pack(t)
    assert packed["gate"].shape == (8, 6) and packed["up.bias"].shape == (8,)
    assert packed["down"].shape == (6, 8) and packed["down"].t().is_contiguous()
    assert torch.equal(packed["down"][:, :3], t["down"][:, [2, 3, 29]])
    assert not packed["down"][:, 3:].any() and not packed["gate"][3:].any()


def test_plan_refuses_other_tensors():
    plan = PackPlan({"w": Part((4, 6), torch.tensor([1]))})
    with pytest.raises(ValueError, match="the plan has no part 'v'"):
        plan.pack({"v": torch.ones(4, 6)})
    with pytest.raises(ValueError, match=r"'w' must be \[4, 6\], got \[6, 4\]"):
        plan.pack({"w": torch.ones(6, 4)})
    with pytest.raises(ValueError, match=r"'w' must be \[1, 6\], got \[1, 5\]"):
        plan.unpack({"w": torch.ones(1, 5)})
    with pytest.raises(ValueError, match="version: expected 1, got 7"):
        PackPlan.from_dict({"version": 7, "parts": {}})
    with pytest.raises(ValueError, match=r"parts\['w'\].rows: expected \[start, stop\] pairs"):
        PackPlan.from_dict({"version": 1, "parts": {"w": {"shape": [4], "rows": 3, "cols": None}}})
    with pytest.raises(ValueError, match=r"shape: expected \[O, I\], or \[O\] without cols"):
        Part((4,), None, torch.tensor([0]))


def test_lists_may_be_empty_and_gradients_are_refused():
    assert pack_tensors([]) == ([], []) and unpack_tensors([], []) == [] == open_sets_op([])
    with pytest.raises(ValueError, match=r"pieces\[1\] must not require grad"):
        pack_tensors([Piece(torch.ones(2, 2)), Piece(torch.ones(2, 2, requires_grad=True))])
    with pytest.raises(ValueError, match=r"order\[0\] must be one of"):
        pack_tensors([Piece(torch.ones(2, 2), order="other")])
