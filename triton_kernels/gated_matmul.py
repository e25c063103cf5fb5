"""Stage 2, kernels: the two matmuls of gated layers, over the open lanes of their axes.

    gated_matmul   alpha * z_out * h,  h = W (z_in * x) + U u + b     [T, N]
    gated_outer    (z_out * dy)^T (z_in * x)                          [N, K]

An axis (open_sets.Axis) without a gate is dense. Closed lanes are neither read nor computed; where
they are in the result, it is exactly 0. The input gate multiplies x in fp32 and is rounded to the
dtype of x before the product, as torch would; the other gates multiply fp32 accumulators.
"""

import torch
import triton
import triton.language as tl

from ._common import INTERPRET, dot, fp32_precision, round_to
from .open_sets import axis_tile, open_tiles, tile_unit


@triton.jit
def _gated_matmul_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    z_in_ptr,  # fp32 [K / GROUP_IN] or None
    z_out_ptr,  # fp32 [N / GROUP_OUT] or None
    open_in_ptr,
    open_out_ptr,
    u_ptr,  # [T, RANK], dense, or None
    up_ptr,  # [N, RANK] or None
    aux_ptr,  # [T, N] or None
    y_ptr,  # [T, N], dense, or None: alpha * z_out * h
    h_ptr,  # [T, N], dense, or None: W (z_in * x) + up u + bias
    dot_ptr,  # fp32 [tiles_m, N], dense, or None: column sums of aux * h over each tile's rows
    T,
    N,
    K,
    alpha,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_upn,
    stride_upr,
    stride_am,
    stride_an,
    tiles_m,
    tiles_n,
    RANK: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP_M)
    row = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    in_rows = row < T
    unit = tile_unit(pid_n, open_out_ptr, GROUP_OUT, BLOCK_N)
    col, in_cols, col_open, z_out = axis_tile(
        pid_n, unit, open_out_ptr, z_out_ptr, N, GROUP_OUT, BLOCK_N
    )
    steps = open_tiles(open_in_ptr, K, GROUP_IN, BLOCK_K)
    if open_out_ptr is not None:
        steps = tl.where(pid_n < open_tiles(open_out_ptr, N, GROUP_OUT, BLOCK_N), steps, 0)

    x_rows = x_ptr + row[:, None] * stride_xm
    w_cols = w_ptr + col[None, :] * stride_wn
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    unit = tile_unit(0, open_in_ptr, GROUP_IN, BLOCK_K)
    for step in range(0, steps):
        k, _, k_open, z_in = axis_tile(step, unit, open_in_ptr, z_in_ptr, K, GROUP_IN, BLOCK_K)
        unit = tile_unit(step + 1, open_in_ptr, GROUP_IN, BLOCK_K)
        x_mask = in_rows[:, None] & k_open[None, :]
        x = tl.load(x_rows + k[None, :] * stride_xk, mask=x_mask, other=0.0)
        w_mask = k_open[:, None] & col_open[None, :]
        w = tl.load(w_cols + k[:, None] * stride_wk, mask=w_mask, other=0.0)
        if z_in_ptr is not None:
            x = round_to(x.to(tl.float32) * z_in[None, :], x.dtype, INTERPRETED)
        h = dot(x, w, h, PRECISION, INTERPRETED)

    if u_ptr is not None:
        for start in tl.range(0, RANK, BLOCK_R, num_stages=1):
            r = start + tl.arange(0, BLOCK_R)
            u_mask = in_rows[:, None] & (r < RANK)[None, :]
            u = tl.load(u_ptr + row[:, None] * RANK + r[None, :], mask=u_mask, other=0.0)
            up_mask = (r < RANK)[:, None] & col_open[None, :]
            up_ptrs = up_ptr + r[:, None].to(tl.int64) * stride_upr + col[None, :] * stride_upn
            up = tl.load(up_ptrs, mask=up_mask, other=0.0)
            h = dot(u, up, h, PRECISION, INTERPRETED)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + col, mask=col_open, other=0.0).to(tl.float32)[None, :]

    # A NaN in x or u must not leak into closed columns through 0 * NaN.
    h = tl.where(col_open[None, :], h, 0.0)
    out_mask = in_rows[:, None] & in_cols[None, :]
    out = row[:, None] * N + col[None, :]
    if dot_ptr is not None:
        aux_mask = in_rows[:, None] & col_open[None, :]
        aux_ptrs = aux_ptr + row[:, None] * stride_am + col[None, :] * stride_an
        aux = tl.load(aux_ptrs, mask=aux_mask, other=0.0).to(tl.float32)
        tl.store(dot_ptr + pid_m.to(tl.int64) * N + col, tl.sum(h * aux, axis=0), mask=in_cols)
    if h_ptr is not None:
        tl.store(h_ptr + out, round_to(h, h_ptr.dtype.element_ty, INTERPRETED), mask=out_mask)
    if y_ptr is not None:
        y = h * (z_out * alpha)[None, :]
        tl.store(y_ptr + out, round_to(y, y_ptr.dtype.element_ty, INTERPRETED), mask=out_mask)


@triton.jit
def _gated_outer_kernel(
    dy_ptr,  # [T, N]
    x_ptr,  # [T, K]
    z_in_ptr,  # fp32 [K / GROUP_IN] or None
    z_out_ptr,  # fp32 [N / GROUP_OUT] or None
    open_in_ptr,
    open_out_ptr,
    dw_ptr,  # [N, K]: z_out[n] * z_in[k] * sum_t dy[t, n] * x[t, k]
    T,
    N,
    K,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_dwn,
    stride_dwk,
    tiles_n,
    tiles_k,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_n, pid_k = tl.swizzle2d(pid // tiles_k, pid % tiles_k, tiles_n, tiles_k, GROUP_M)
    unit_n = tile_unit(pid_n, open_out_ptr, GROUP_OUT, BLOCK_N)
    n, in_n, n_open, z_out = axis_tile(
        pid_n, unit_n, open_out_ptr, z_out_ptr, N, GROUP_OUT, BLOCK_N
    )
    unit_k = tile_unit(pid_k, open_in_ptr, GROUP_IN, BLOCK_K)
    k, in_k, k_open, z_in = axis_tile(pid_k, unit_k, open_in_ptr, z_in_ptr, K, GROUP_IN, BLOCK_K)
    steps = tl.cdiv(T, BLOCK_T)
    if open_out_ptr is not None:
        steps = tl.where(pid_n < open_tiles(open_out_ptr, N, GROUP_OUT, BLOCK_N), steps, 0)
    if open_in_ptr is not None:
        steps = tl.where(pid_k < open_tiles(open_in_ptr, K, GROUP_IN, BLOCK_K), steps, 0)

    dy_cols = dy_ptr + n[:, None] * stride_dyn
    x_cols = x_ptr + k[None, :] * stride_xk
    dw = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in range(0, steps):
        t = (step * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        dy_mask = n_open[:, None] & (t < T)[None, :]
        dy = tl.load(dy_cols + t[None, :] * stride_dym, mask=dy_mask, other=0.0)
        x_mask = (t < T)[:, None] & k_open[None, :]
        x = tl.load(x_cols + t[:, None] * stride_xm, mask=x_mask, other=0.0)
        dw = dot(dy, x, dw, PRECISION, INTERPRETED)

    dw = dw * z_out[:, None] * z_in[None, :]
    dw = tl.where(n_open[:, None] & k_open[None, :], dw, 0.0)
    dw_ptrs = dw_ptr + n[:, None] * stride_dwn + k[None, :] * stride_dwk
    tl.store(
        dw_ptrs,
        round_to(dw, dw_ptr.dtype.element_ty, INTERPRETED),
        mask=in_n[:, None] & in_k[None, :],
    )


def gated_matmul(
    x, w, ins, outs, tile, *, bias=None, u=None, up=None, aux=None, alpha=1.0, keep="y"
):
    """Launch the matmul kernel: x [T, K], w [N, K], ins and outs the axes of K and N.

    Gives (y, h, dot): those of y and h that `keep` names, and column sums [N] fp32 if aux is given.
    """
    t, n = x.shape[0], outs.size
    block_n, block_k = outs.width(tile.block_n), ins.width(tile.block_k)
    tiles_m, tiles_n = triton.cdiv(t, tile.block_m), outs.tiles(block_n)
    y = x.new_empty(t, n) if "y" in keep else None
    h = x.new_empty(t, n) if "h" in keep else None
    dot = x.new_empty(tiles_m, n, dtype=torch.float32) if aux is not None else None
    rank = 0 if u is None else u.shape[1]
    if tiles_m * tiles_n:
        _gated_matmul_kernel[(tiles_m * tiles_n,)](
            x, w, bias, ins.z, outs.z, ins.open_set, outs.open_set, u, up, aux, y, h, dot,
            t, n, ins.size, alpha, *x.stride(), *w.stride(),
            *(up.stride() if rank else (0, 0)), *((0, 0) if aux is None else aux.stride()),
            tiles_m, tiles_n,
            RANK=rank, GROUP_IN=ins.group, GROUP_OUT=outs.group,
            BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            BLOCK_R=min(64, max(16, triton.next_power_of_2(rank))), GROUP_M=tile.group_m,
            PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y, h, None if dot is None else dot.sum(0)


def gated_outer(dy, x, outs, ins, tile, like):
    """Launch the weight-gradient kernel: (z_out dy)^T (z_in x), laid out as `like` [N, K]."""
    dw = torch.empty_like(like)
    block_n, block_k = outs.width(tile.block_m), ins.width(tile.block_n)
    tiles_n, tiles_k = outs.tiles(block_n), ins.tiles(block_k)
    if tiles_n * tiles_k:
        _gated_outer_kernel[(tiles_n * tiles_k,)](
            dy, x, ins.z, outs.z, ins.open_set, outs.open_set, dw,
            dy.shape[0], outs.size, ins.size, *dy.stride(), *x.stride(), *dw.stride(),
            tiles_n, tiles_k,
            GROUP_IN=ins.group, GROUP_OUT=outs.group,
            BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_T=tile.block_k, GROUP_M=tile.group_m,
            PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dw
