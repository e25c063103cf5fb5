"""Stage 2, kernels: attention over open heads, with the gate of each head on its output.

    o[i, h] = z_h * sum_j p[i, j] v[j],    p = softmax_j(scale q[i, h] . k[j] + mask)

k and v belong to kv head h // g where g query heads share one. Closed heads (z exactly 0) are
neither read nor computed, forward and backward; their part of o is 0. With h = p v (so o = z_h h),
delta = rowsum(do * h) and ds = p * (do v^T - delta), the gradients are

    dz_h = sum(delta)                   dq = z_h scale ds k
    dv   = sum_h z_h p^T do             dk = sum_h z_h scale ds^T q

with the sums over the open heads of a group; a kv head whose group is closed gets 0, unread. dz of
a closed head is defined as 0: a clamped gate has no gradient there. delta is what every flash
backward needs, so dz costs nothing: delta = rowsum(do * o) / z_h for fp32 and bf16, and fp16 keeps
h, since z_h * h can fall below its smallest number. p is recomputed from lse, one fp32 per query.

Every sum has a fixed order, there are no atomics: the same input gives the same bits.

Source: FlashAttention-2, arXiv 2307.08691; gates on heads as FineGates, arXiv 2412.12951.
"""

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._common import (
    DTYPES,
    INTERPRET,
    check_device,
    config_of,
    expect,
    fp32_precision,
    refuse_second_derivative,
)
from ._configs import GatedAttentionConfig
from .attention_kernels import (
    _gated_attention_bwd_dkv_kernel,
    _gated_attention_bwd_dq_kernel,
    _gated_attention_fwd_kernel,
    _key_bounds_kernel,
)
from .open_sets import open_set


def gated_attention_ref(
    q, k, v, z=None, *, causal=True, scale=None, key_mask=None, cu_seqlens_q=None,
    cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, window=None
):  # fmt: skip
    """z_h * softmax(scale q k^T + mask) v in plain torch, in the dtype of q.

    Same arguments and gradients as gated_attention_fn, any floating dtype; fp64 makes it the truth.
    fp16 and bf16 are computed in fp32 and rounded at the end, as torch's attention does.
    """
    if cu_seqlens_q is not None:
        cuts = (torch.diff(cu).tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k))
        sequences = zip(*(x.split(n) for x, n in zip((q, k, v), cuts, strict=True)), strict=True)
        settings = {"causal": causal, "scale": scale, "window": window}
        parts = [
            gated_attention_ref(*(x[None] for x in sequence), z, **settings)[0]
            for sequence in list(sequences) or [(q, k, v)]
        ]
        return torch.cat(parts)
    queries, keys = q.shape[1], k.shape[1]
    position = torch.arange(queries, device=q.device)[:, None] + keys - queries
    key = torch.arange(keys, device=q.device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen = key <= position
    if window is not None:
        seen = seen & (key > position - window)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    # Without heads, enable_gqa divides by zero in torch 2.9 and ends the process.
    grouped = q.shape[2] != k.shape[2]
    with sdpa_kernel(SDPBackend.MATH):
        o = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), seen, scale=scale, enable_gqa=grouped
        ).transpose(1, 2)
    return o if z is None else o * torch.where(z != 0, z, 0.0).to(o.dtype)[:, None]


def _check(q, k, v, z, key_mask, cu_q, cu_k, max_q, max_k, causal, scale, window):
    """Raise ValueError naming the argument, what was expected and what came."""

    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected dtype float32, bfloat16 or float16, got {q.dtype}")
    dims, layout = (4, "[B, S, H, D]") if cu_q is None else (3, "[T, H, D] with cu_seqlens_q")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions as q {layout}, got {x.dim()}")
    heads, kv_heads, lanes = q.shape[-2], k.shape[-2], q.shape[-1]
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= 256:
            raise ValueError(f"{name}: expected a head_dim of 1 to 256, got {x.shape[-1]}")
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"k: expected a number of heads that divides {heads}, got {kv_heads}")
    expect("k", k, (*q.shape[: dims - 3], k.shape[-3], kv_heads, lanes), q.dtype, q, "q")
    expect("v", v, (*k.shape[:-1], v.shape[-1]), q.dtype, q, "q")
    expect("z", z, (heads,), torch.float32, q, "q")
    if (cu_q is None) != (cu_k is None):
        missing = "cu_seqlens_q" if cu_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: expected a tensor beside the other cu_seqlens, got None")
    if cu_q is not None:
        if cu_q.dim() != 1 or cu_q.shape[0] < 1:
            raise ValueError(f"cu_seqlens_q: expected shape (B + 1,), got {tuple(cu_q.shape)}")
        expect("cu_seqlens_q", cu_q, (cu_q.shape[0],), torch.int32, q, "q")
        expect("cu_seqlens_k", cu_k, (cu_q.shape[0],), torch.int32, q, "q")
        if key_mask is not None:
            raise ValueError("key_mask: expected None beside cu_seqlens, got a tensor")
    for name, length in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if (length is None) != (cu_q is None):
            expected = "None without cu_seqlens" if cu_q is None else "the longest length"
            raise ValueError(f"{name}: expected {expected}, got {length}")
    if key_mask is not None:
        expect("key_mask", key_mask, tuple(k.shape[:2]), torch.bool, q, "q")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if window is not None and (window < 1 or not causal):
        expected = "at least 1" if causal else "None without causal"
        raise ValueError(f"window: expected {expected}, got {window}")


def _strides(x):
    """(batch, token, head, lane) strides; a varlen tensor has no batch."""
    return x.stride() if x.dim() == 4 else (0, *x.stride())


def _lse_strides(lse):
    return lse.stride()[:-1] if lse.dim() == 3 else (0, lse.stride(0))


def _lse_shape(q):
    """[B, H, S], for varlen [H, T]."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _settings(q, k, v, causal, window):
    """The constants that all kernels share."""
    heads, kv_heads, lanes, v_lanes = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    return {
        "GROUP": heads // max(1, kv_heads),
        "D": lanes,
        "DV": v_lanes,
        "BLOCK_D": max(16, triton.next_power_of_2(lanes)),
        "BLOCK_DV": max(16, triton.next_power_of_2(v_lanes)),
        "CAUSAL": causal,
        "WINDOW": window or 0,
        "PRECISION": fp32_precision(),
        "INTERPRETED": INTERPRET,
    }


def _sizes(q, k, cu_q, max_q, max_k):
    """B, S, Skv: for varlen the number of sequences and the longest ones."""
    if cu_q is None:
        return q.shape[0], q.shape[1], k.shape[1]
    return cu_q.shape[0] - 1, max_q, max_k


def _tiles(config, q, v, queries, keys):
    shape = (queries, keys, q.shape[-1], v.shape[-1])
    return config_of(GatedAttentionConfig, "gated_attention", config, shape, q.dtype, q.device)


def _masks(key_mask, cu_seqlens_q, cu_seqlens_k):
    """The mask's bytes, the range of keys outside of which it hides all, sequences; the strides."""
    if cu_seqlens_q is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    if key_mask is None:
        return (None, None, cu_seqlens_q, cu_seqlens_k), (0, 0)
    key_mask = key_mask.view(torch.uint8)
    bounds = key_mask.new_empty(key_mask.shape[0], 2, dtype=torch.int32)
    if key_mask.shape[0]:
        _key_bounds_kernel[(key_mask.shape[0],)](
            key_mask, bounds, key_mask.shape[1], *key_mask.stride(), BLOCK=2048, num_warps=4
        )
    return (key_mask, bounds, cu_seqlens_q, cu_seqlens_k), key_mask.stride()


_MASKS = (
    "Tensor? z, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, bool causal, float? scale, int? window"
)
_FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, {_MASKS}, bool keep_h, int[] config) "
    "-> (Tensor o, Tensor h, Tensor lse, Tensor open)"
)
_BACKWARD = (
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor h, Tensor lse, Tensor? open, {_MASKS}, "
    "bool h_is_o, bool[] needs, int[] config) -> Tensor[]"
)


@torch.library.custom_op("gatepack::gated_attention", mutates_args=(), schema=_FORWARD)
def _gated_attention(
    q, k, v, z, key_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale,
    window, keep_h, config,
):  # fmt: skip
    """o, and what the backward needs: h (empty if o serves), lse, the open set of z."""
    _check(
        q, k, v, z, key_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
        scale, window,
    )  # fmt: skip
    check_device("gated_attention", q)
    with torch.cuda.device_of(q):
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        h = torch.empty_like(o) if keep_h else None
        lse = q.new_empty(_lse_shape(q), dtype=torch.float32)
        opened = q.new_empty(0, dtype=torch.int32) if z is None else open_set(z)
        batch, queries, keys = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
        tile = _tiles(config, q, v, queries, keys).fwd
        tiles_q = triton.cdiv(queries, tile.block_q)
        masks, mask_strides = _masks(key_mask, cu_seqlens_q, cu_seqlens_k)
        if batch * q.shape[-2] * tiles_q:
            _gated_attention_fwd_kernel[(batch * q.shape[-2] * tiles_q,)](
                q, k, v, None if z is None else z.contiguous(), None if z is None else opened,
                *masks, o, h, lse, queries, keys, q.shape[-2], tiles_q,
                scale or q.shape[-1] ** -0.5,
                *_strides(q), *_strides(k), *_strides(v), *_strides(o)[:3], *_lse_strides(lse),
                *mask_strides,
                BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, **_settings(q, k, v, causal, window),
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        return o, q.new_empty(0) if h is None else h, lse, opened


@_gated_attention.register_fake
def _(
    q, k, v, z, key_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale,
    window, keep_h, config,
):  # fmt: skip
    _check(
        q, k, v, z, key_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
        scale, window,
    )  # fmt: skip
    shape = (*q.shape[:-1], v.shape[-1])
    return (
        q.new_empty(shape),
        q.new_empty(shape if keep_h else 0),
        q.new_empty(_lse_shape(q), dtype=torch.float32),
        q.new_empty(0 if z is None else z.shape[0] + 1, dtype=torch.int32),
    )


@torch.library.custom_op("gatepack::gated_attention_backward", mutates_args=(), schema=_BACKWARD)
def _gated_attention_backward(
    do, q, k, v, h, lse, opened, z, key_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, causal, scale, window, h_is_o, needs, config,
):  # fmt: skip
    """The gradients that `needs` asks for, in the order q, k, v, z."""
    need_q, need_k, need_v, need_z = needs
    with torch.cuda.device_of(do):
        z = None if z is None else z.contiguous()
        batch, queries, keys = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
        heads, kv_heads = q.shape[-2], k.shape[-2]
        tiles = _tiles(config, q, v, queries, keys)
        masks, mask_strides = _masks(key_mask, cu_seqlens_q, cu_seqlens_k)
        scale = scale or q.shape[-1] ** -0.5
        settings = _settings(q, k, v, causal, window)
        inputs = (*_strides(do), *_strides(q), *_strides(k), *_strides(v))

        tile = tiles.dq
        tiles_q = triton.cdiv(queries, tile.block_q)
        dq = torch.empty_like(q) if need_q else None
        delta = torch.empty_like(lse)
        dz = lse.new_empty(heads, batch * tiles_q) if need_z else None
        if batch * heads * tiles_q:
            _gated_attention_bwd_dq_kernel[(batch * heads * tiles_q,)](
                do, q, k, v, z, opened, *masks, h, lse, delta, dz, dq,
                queries, keys, heads, tiles_q, batch * tiles_q, scale,
                *inputs, *_strides(h)[:3], *((0,) * 4 if dq is None else _strides(dq)),
                *_lse_strides(lse), *mask_strides,
                BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, H_IS_O=h_is_o and z is not None,
                **settings, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

        tile = tiles.dkv
        tiles_k = triton.cdiv(keys, tile.block_k)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        if (need_k or need_v) and batch * kv_heads * tiles_k:
            _gated_attention_bwd_dkv_kernel[(batch * kv_heads * tiles_k,)](
                do, q, k, v, z, opened, *masks, lse, delta, dk, dv,
                queries, keys, heads, kv_heads, tiles_k, scale,
                *inputs, *_strides(dk), *_strides(dv), *_lse_strides(lse), *mask_strides,
                BLOCK_H=max(16, triton.next_power_of_2(heads)), BLOCK_Q=tile.block_q,
                BLOCK_K=tile.block_k, **settings, num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )  # fmt: skip
        grads = (dq, dk, dv, None if dz is None else dz.sum(1))
        return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


@_gated_attention_backward.register_fake
def _(
    do, q, k, v, h, lse, opened, z, key_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, causal, scale, window, h_is_o, needs, config,
):  # fmt: skip
    inputs = (q, k, v, z)
    return [torch.empty_like(x) for x, needed in zip(inputs, needs, strict=True) if needed]


def _save_for_backward(ctx, inputs, output):
    q, k, v, z, key_mask, cu_seqlens_q, cu_seqlens_k, *settings, keep_h, config = inputs
    o, h, lse, opened = output
    ctx.mark_non_differentiable(h, lse, opened)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        q, k, v, h if keep_h else o, lse, None if z is None else opened, z, key_mask,
        cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    needs = [x is not None and ctx.needs_input_grad[i] for i, x in enumerate((q, k, v, z))]
    ctx.args = *settings, not keep_h, needs, config


def _backward(ctx, do, *_):
    if do is None:
        return (None,) * 14
    grads = torch.ops.gatepack.gated_attention_backward(do, *ctx.saved_tensors, *ctx.args)
    grads = iter(grads)
    needs = ctx.args[-2]
    return *(next(grads) if needed else None for needed in needs), *(None,) * 10


_gated_attention.register_autograd(_backward, setup_context=_save_for_backward)
_gated_attention_backward.register_autograd(refuse_second_derivative("gated_attention"))


def gated_attention_fn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window: int | None = None,
    config: GatedAttentionConfig | None = None,
) -> torch.Tensor:
    """o = z_h * softmax(scale q k^T + mask) v, closed heads skipped.

    q [B, S, H, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv]: fp32, bf16 or fp16, one dtype for all,
    any strides; D and Dv up to 256. H = g * Hkv: query head h reads kv head h // g. z fp32 [H], or
    None for all open. o [B, S, H, Dv] contiguous, in q.dtype; its closed heads are exactly 0.

    causal: the last query stands at the last key, so query i of S sees the keys up to
    i + Skv - S (as flash-attention, and unlike torch's is_causal, where S != Skv); window W leaves
    the last W of those. key_mask bool [B, Skv], any strides: True = attend; what it hides is not
    read. A query that sees no key gives 0. scale: 1 / sqrt(D) by default.

    Sequences of different lengths without padding: q [T, H, D], k [Tkv, Hkv, D], v, o alike, where
    sequence b is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 of q and o, and cu_seqlens_k of k
    and v, both int32 [B + 1] on the device from 0 to T (Tkv); max_seqlen_q and max_seqlen_k are the
    longest lengths or more. The values are not checked: that would make the host wait.

    Gradients flow to q, k, v, z; dk and dv sum over the open heads of a group, dz is fp32, 0 for
    closed heads. o is kept for them (for fp16 with gates and a gradient of q, k or z, a second
    tensor of its size): do not change it in place. fp32 products follow
    torch.get_float32_matmul_precision(). config None takes the tiles of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, a head_dim beyond 256, a
    scale that is not positive, a window without causal, key_mask beside cu_seqlens, cu_seqlens
    without their max_seqlen, CPU tensors outside Triton's interpreter. RuntimeError: a second
    derivative.
    """
    reads_h = q.dtype == torch.float16 and z is not None and torch.is_grad_enabled()
    keep_h = reads_h and any(t.requires_grad for t in (q, k, z))
    ints = [] if config is None else config.to_ints()
    return torch.ops.gatepack.gated_attention(
        q, k, v, z, key_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
        scale, window, keep_h, ints,
    )[0]  # fmt: skip
