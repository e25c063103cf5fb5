"""What the tests of gated_attention share: inputs by name, masks, and a check against fp64."""

import pytest
import torch
import torch.nn.functional as F
from ops import make_gate, run, to

from gatepack.kernels import (
    AttentionTile,
    GatedAttentionConfig,
    gated_attention_fn,
    gated_attention_ref,
)
from gatepack.testing import assert_close_to_fp64, poisoned_empty

S, H, KV_HEADS, D = 17, 2, 1, 16
SMALL_TILES = GatedAttentionConfig(*[AttentionTile(16, 16, num_warps=1, num_stages=1)] * 3)


def mostly_slow(values, quick=1):
    """Parameters of which the first `quick` run by default, the others as slow tests."""
    return [*values[:quick], *(pytest.param(v, marks=pytest.mark.slow) for v in values[quick:])]


def make_inputs(
    dtype, queries=S, keys=None, batch=1, heads=H, kv_heads=KV_HEADS, lanes=D, v_lanes=None,
    z="fractional", seed=0
):  # fmt: skip
    """CPU tensors for gated_attention_fn; z names a kind of gate, or gives it."""
    random = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    return {
        "q": normal(batch, queries, heads, lanes),
        "k": normal(batch, keys, kv_heads, lanes),
        "v": normal(batch, keys, kv_heads, lanes if v_lanes is None else v_lanes),
        "z": make_gate(z, heads, seed + 1) if isinstance(z, str) else z,
    }


def upstream(inputs):
    """do, in the dtype of q."""
    shape = (*inputs["q"].shape[:-1], inputs["v"].shape[-1])
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(inputs["q"].dtype)


def softmax_weights(q, k, settings):
    """p [B, S, H, keys]."""
    batch, keys, kv_heads, _ = k.shape
    each_key = torch.eye(keys, dtype=q.dtype, device=q.device)[:, None]
    return gated_attention_ref(q, k, each_key.expand(batch, -1, kv_heads, -1), **settings)


def summed_terms(inputs, do, settings):
    """The largest sums of |terms| behind one number of dq and of dk. Their ds = p * (dp - delta) is
    a small difference where one key gets almost all of the softmax."""
    q, k, v, z = (inputs[name].double() for name in ("q", "k", "v", "z"))
    kv_heads, lanes = k.shape[2:]
    group = q.shape[2] // kv_heads
    p = softmax_weights(q, k, settings)
    dp = torch.einsum("bshd,bkhd->bshk", do.double(), v.repeat_interleave(group, 2))
    ds = p * (dp.abs() + (p * dp).sum(-1, keepdim=True).abs()) * z[:, None] * lanes**-0.5
    dq = torch.einsum("bshk,bkhd->bshd", ds, k.abs().repeat_interleave(group, 2))
    dk = torch.einsum("bshk,bshd->bkhd", ds, q.abs()).unflatten(2, (kv_heads, group)).sum(3)
    return {"dq": dq.max().item(), "dk": dk.max().item()}


def moved_by_rounding(inputs, do, settings):
    """By how many units in the last place the rounding of the scores, which are fp32, may move one
    number of dv: p moves by as much, relatively, as the scores of its query do."""
    q, k, z = (inputs[name].double() for name in ("q", "k", "z"))
    kv_heads, lanes = k.shape[2:]
    group = q.shape[2] // kv_heads
    p = softmax_weights(q, k, settings)
    size = torch.einsum("bshd,bkhd->bshk", q.abs(), k.abs().repeat_interleave(group, 2))
    in_fp32 = torch.finfo(torch.float32).eps / torch.finfo(inputs["q"].dtype).eps
    rounding = in_fp32 * (size * (p > 0)).amax(-1, keepdim=True) * lanes**-0.5
    moved = torch.einsum("bshk,bshd->bkhd", 2 * p * z[:, None] * rounding, do.double().abs())
    return {"dv": moved.unflatten(2, (kv_heads, group)).sum(3).max().item()}


def check(
    inputs, device, do=None, config=SMALL_TILES, cancels=False, large_scores=False, **settings
):
    """Forward and every gradient, from poisoned memory, against fp64 and torch's own error.

    cancels: dq and dk are differences of numbers that are larger by far. large_scores: their
    rounding moves dv by more than its own.
    """
    inputs = to(inputs, device)
    do = (upstream(inputs) if do is None else do).to(device)
    truth = run(gated_attention_ref, {k: t.double() for k, t in inputs.items()}, do, **settings)
    theirs = run(gated_attention_ref, inputs, do, **settings)
    with poisoned_empty():
        ours = run(gated_attention_fn, inputs, do, config=config, **settings)
    z, dtype = inputs["z"], inputs["q"].dtype
    per_head = (do.double() * truth["y"]).abs().sum(-1).flatten(0, -2).sum(0)
    terms = summed_terms(inputs, do, settings) if cancels else {}
    terms |= moved_by_rounding(inputs, do, settings) if large_scores else {}
    terms["dz"] = torch.where(z != 0, per_head / z, 0.0).max().item() if len(z) else 0.0
    for name, got in ours.items():
        factor, of_sum = 2 if name == "y" else 3, terms.get(name, 0.0)
        assert_close_to_fp64(name, got, theirs[name], truth[name], factor, dtype, of_sum)
    for name in ("y", "dq", "dz"):
        closed = ours[name][z == 0] if name == "dz" else ours[name][..., z == 0, :]
        assert (closed == 0).all(), f"{name}: closed heads are not 0"
    return ours


def padding(kind, batch, keys):
    """A key_mask [batch, keys]."""
    lengths = torch.tensor([keys - 4, 3])[:batch, None]
    key = torch.arange(keys)
    return {
        "left": key >= keys - lengths,
        "right": key < lengths,
        "holes": torch.rand(batch, keys, generator=torch.Generator().manual_seed(3)) < 0.5,
        "nothing": (key < 0).expand(batch, keys),
        "strided": (key < lengths).t().contiguous().t(),
    }[kind]


def make_varlen(dtype, lengths_q, lengths_k, device):
    """Inputs [T, H, D] and the settings that cut them into sequences."""
    inputs = make_inputs(dtype, sum(lengths_q), sum(lengths_k))
    inputs = {name: t if name == "z" else t[0] for name, t in inputs.items()}

    def starts(lengths):
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(device)

    return inputs, {
        "cu_seqlens_q": starts(lengths_q),
        "cu_seqlens_k": starts(lengths_k),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
    }
