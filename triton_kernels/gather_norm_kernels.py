"""Stage 2, kernels: the kernels of gather_norm, for one to three consumers.

A consumer is an open set, or the slots made from it (scatter_add.slots_of), with an optional gate.
Those numbered 1 and 2 may be None. gather_norm.py has the formulas.
"""

import triton
import triton.language as tl

from ._common import offsets, round_to


@triton.jit
def _gather(
    t, mean, rstd, x_ptr, w_ptr, b_ptr, open_ptr, z_ptr, y_ptr, capacity, T, D, stride_xt,
    stride_xd, LAYER: tl.constexpr, BLOCK_S: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write one consumer's y [T, capacity] in the rows t."""
    count = tl.minimum(tl.load(open_ptr + D), capacity)
    in_t = (t < T)[:, None]
    for start in range(0, capacity, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        is_open = slot < count
        d = tl.load(open_ptr + slot, mask=is_open, other=0)
        x_mask = in_t & is_open[None, :]
        x = tl.load(x_ptr + offsets(t, stride_xt, d, stride_xd), mask=x_mask, other=0.0)
        y = _normed(x, mean, rstd, d, is_open, w_ptr, b_ptr, LAYER, INTERPRETED)
        if z_ptr is not None:
            y *= tl.load(z_ptr + d, mask=is_open, other=0.0)[None, :]
        y = round_to(tl.where(is_open[None, :], y, 0.0), y_ptr.dtype.element_ty, INTERPRETED)
        y_mask = in_t & (slot < capacity)[None, :]
        tl.store(y_ptr + offsets(t, capacity, slot, 1), y, mask=y_mask)


@triton.jit
def _scaled(x, mean, rstd, LAYER: tl.constexpr, INTERPRETED: tl.constexpr):
    """v fp32; for rms rounded to the dtype of x, as the weight meets it."""
    if LAYER:
        v = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    else:
        v = round_to(x.to(tl.float32) * rstd[:, None], x.dtype, INTERPRETED).to(tl.float32)
    return v


@triton.jit
def _normed(x, mean, rstd, d, in_d, w_ptr, b_ptr, LAYER: tl.constexpr, INTERPRETED: tl.constexpr):
    """w v + b fp32 at columns d."""
    y = _scaled(x, mean, rstd, LAYER, INTERPRETED)
    if w_ptr is not None:
        y *= tl.load(w_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _gather_norm_fwd_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [D] or None
    b_ptr,  # [D] or None
    open_0_ptr,  # int32 [D + 1]; 1 and 2 may be None, here and below
    open_1_ptr,
    open_2_ptr,
    z_0_ptr,  # fp32 [D] or None
    z_1_ptr,
    z_2_ptr,
    y_0_ptr,  # [T, capacity], dense
    y_1_ptr,
    y_2_ptr,
    mean_ptr,  # fp32 [T]: 0 for rms
    rstd_ptr,  # fp32 [T]
    capacity_0,
    capacity_1,
    capacity_2,
    T,
    D,
    eps,
    stride_xt,
    stride_xd,
    LAYER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + offsets(t, stride_xt, d, stride_xd), mask=mask, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_T], tl.float32)
    if LAYER:
        mean = tl.sum(x, axis=1) / D
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(mean_ptr + t, mean, mask=t < T)
    tl.store(rstd_ptr + t, rstd, mask=t < T)
    _gather(
        t, mean, rstd, x_ptr, w_ptr, b_ptr, open_0_ptr, z_0_ptr, y_0_ptr, capacity_0, T, D,
        stride_xt, stride_xd, LAYER, BLOCK_S, INTERPRETED,
    )  # fmt: skip
    if open_1_ptr is not None:
        _gather(
            t, mean, rstd, x_ptr, w_ptr, b_ptr, open_1_ptr, z_1_ptr, y_1_ptr, capacity_1, T, D,
            stride_xt, stride_xd, LAYER, BLOCK_S, INTERPRETED,
        )  # fmt: skip
    if open_2_ptr is not None:
        _gather(
            t, mean, rstd, x_ptr, w_ptr, b_ptr, open_2_ptr, z_2_ptr, y_2_ptr, capacity_2, T, D,
            stride_xt, stride_xd, LAYER, BLOCK_S, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _slot_and_gate(d, in_d, slots_ptr, z_ptr):
    """Where columns d are in one consumer's dy, -1 for nowhere, and their gates, fp32."""
    slot = tl.load(slots_ptr + d, mask=in_d, other=-1)
    z = tl.full(slot.shape, 1.0, tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + d, mask=slot >= 0, other=0.0)
    return slot, z


@triton.jit
def _spread(t, in_t, slot, dy_ptr, stride_t, stride_s):
    """g_m: one consumer's dy at its columns, fp32 [rows, columns], 0 where there is no slot."""
    mask = in_t[:, None] & (slot >= 0)[None, :]
    return tl.load(dy_ptr + offsets(t, stride_t, slot, stride_s), mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _upstream(
    t, in_t, d, in_d, w_ptr, slots_0_ptr, slots_1_ptr, slots_2_ptr, z_0_ptr, z_1_ptr, z_2_ptr,
    dy_0_ptr, dy_1_ptr, dy_2_ptr, stride_0t, stride_0s, stride_1t, stride_1s, stride_2t, stride_2s,
):  # fmt: skip
    """w sum_m z_m g_m at columns d."""
    slot, z = _slot_and_gate(d, in_d, slots_0_ptr, z_0_ptr)
    g = z[None, :] * _spread(t, in_t, slot, dy_0_ptr, stride_0t, stride_0s)
    if dy_1_ptr is not None:
        slot, z = _slot_and_gate(d, in_d, slots_1_ptr, z_1_ptr)
        g += z[None, :] * _spread(t, in_t, slot, dy_1_ptr, stride_1t, stride_1s)
    if dy_2_ptr is not None:
        slot, z = _slot_and_gate(d, in_d, slots_2_ptr, z_2_ptr)
        g += z[None, :] * _spread(t, in_t, slot, dy_2_ptr, stride_2t, stride_2s)
    if w_ptr is not None:
        g *= tl.load(w_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    return g


@triton.jit
def _gather_norm_bwd_dx_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [D] or None
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    slots_0_ptr,  # int32 [D]; 1 and 2 may be None, here and below
    slots_1_ptr,
    slots_2_ptr,
    z_0_ptr,  # fp32 [D] or None
    z_1_ptr,
    z_2_ptr,
    dy_0_ptr,  # [T, capacity]
    dy_1_ptr,
    dy_2_ptr,
    dx_ptr,  # [T, D], dense
    T,
    D,
    stride_xt,
    stride_xd,
    stride_0t,
    stride_0s,
    stride_1t,
    stride_1s,
    stride_2t,
    stride_2s,
    LAYER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = t < T
    mean = tl.load(mean_ptr + t, mask=in_t, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + t, mask=in_t, other=0.0)[:, None]
    along = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        mask = in_t[:, None] & in_d[None, :]
        x = tl.load(x_ptr + offsets(t, stride_xt, d, stride_xd), mask=mask, other=0.0)
        g = _upstream(
            t, in_t, d, in_d, w_ptr, slots_0_ptr, slots_1_ptr, slots_2_ptr, z_0_ptr, z_1_ptr,
            z_2_ptr, dy_0_ptr, dy_1_ptr, dy_2_ptr, stride_0t, stride_0s, stride_1t, stride_1s,
            stride_2t, stride_2s,
        )  # fmt: skip
        along += g * (x.to(tl.float32) - mean) * rstd
        total += g
    along = (tl.sum(along, axis=1) / D)[:, None]
    total = (tl.sum(total, axis=1) / D)[:, None]
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        mask = in_t[:, None] & in_d[None, :]
        x = tl.load(x_ptr + offsets(t, stride_xt, d, stride_xd), mask=mask, other=0.0)
        g = _upstream(
            t, in_t, d, in_d, w_ptr, slots_0_ptr, slots_1_ptr, slots_2_ptr, z_0_ptr, z_1_ptr,
            z_2_ptr, dy_0_ptr, dy_1_ptr, dy_2_ptr, stride_0t, stride_0s, stride_1t, stride_1s,
            stride_2t, stride_2s,
        )  # fmt: skip
        dx = g - (x.to(tl.float32) - mean) * rstd * along
        if LAYER:
            dx -= total
        dx = round_to(dx * rstd, dx_ptr.dtype.element_ty, INTERPRETED)
        tl.store(dx_ptr + offsets(t, D, d, 1), dx, mask=mask)


@triton.jit
def _gather_norm_bwd_columns_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [D] or None
    b_ptr,  # [D] or None
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    slots_0_ptr,  # int32 [D]; 1 and 2 may be None, here and below
    slots_1_ptr,
    slots_2_ptr,
    z_0_ptr,  # fp32 [D] or None
    z_1_ptr,
    z_2_ptr,
    dy_0_ptr,  # [T, capacity]
    dy_1_ptr,
    dy_2_ptr,
    dw_ptr,  # fp32 [splits, D] or None, and so are those below: sums over SPAN rows
    db_ptr,
    dz_0_ptr,
    dz_1_ptr,
    dz_2_ptr,
    T,
    D,
    stride_xt,
    stride_xd,
    stride_0t,
    stride_0s,
    stride_1t,
    stride_1s,
    stride_2t,
    stride_2s,
    tiles_d,
    LAYER: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    split = (tl.program_id(0) // tiles_d).to(tl.int64)
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    slot_0, z_0 = _slot_and_gate(d, in_d, slots_0_ptr, z_0_ptr)
    if dy_1_ptr is not None:
        slot_1, z_1 = _slot_and_gate(d, in_d, slots_1_ptr, z_1_ptr)
    if dy_2_ptr is not None:
        slot_2, z_2 = _slot_and_gate(d, in_d, slots_2_ptr, z_2_ptr)
    dw = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dz_0 = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dz_1 = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dz_2 = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(split * SPAN, tl.minimum(T, split * SPAN + SPAN), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        in_t = t < T
        mask = in_t[:, None] & in_d[None, :]
        x = tl.load(x_ptr + offsets(t, stride_xt, d, stride_xd), mask=mask, other=0.0)
        mean = tl.load(mean_ptr + t, mask=in_t, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=in_t, other=0.0)
        v = _scaled(x, mean, rstd, LAYER, INTERPRETED)
        y = _normed(x, mean, rstd, d, in_d, w_ptr, b_ptr, LAYER, INTERPRETED)
        g_m = _spread(t, in_t, slot_0, dy_0_ptr, stride_0t, stride_0s)
        dz_0 += g_m * y
        g = z_0[None, :] * g_m
        if dy_1_ptr is not None:
            g_m = _spread(t, in_t, slot_1, dy_1_ptr, stride_1t, stride_1s)
            dz_1 += g_m * y
            g += z_1[None, :] * g_m
        if dy_2_ptr is not None:
            g_m = _spread(t, in_t, slot_2, dy_2_ptr, stride_2t, stride_2s)
            dz_2 += g_m * y
            g += z_2[None, :] * g_m
        dw += g * v
        db += g
    out = split * D + d
    if dw_ptr is not None:
        tl.store(dw_ptr + out, tl.sum(dw, axis=0), mask=in_d)
    if db_ptr is not None:
        tl.store(db_ptr + out, tl.sum(db, axis=0), mask=in_d)
    if dz_0_ptr is not None:
        tl.store(dz_0_ptr + out, tl.sum(dz_0, axis=0), mask=in_d)
    if dz_1_ptr is not None:
        tl.store(dz_1_ptr + out, tl.sum(dz_1, axis=0), mask=in_d)
    if dz_2_ptr is not None:
        tl.store(dz_2_ptr + out, tl.sum(dz_2, axis=0), mask=in_d)
