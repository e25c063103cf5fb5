"""Stage 2, kernels: the two matmuls of gated layers, over the open lanes of their axes.

    gated_matmul   alpha * z_out * h,  h = W (z_in * x) + U u + b     [T, N]
    gated_outer    (z_out * dy)^T (z_in * x)                          [N, K]

An axis (open_sets.Axis) without a gate is dense. Closed lanes are neither read nor computed; where
they are in the result, it is exactly 0. The input gate multiplies x in fp32 and is rounded to the
dtype of x before the product, as torch would; the other gates multiply fp32 accumulators.

On a compact axis (open_sets.py) the activations x, dy, y, h and aux are [T, capacity] buffers of
open lanes, while W, dW, b, U and the gates keep their lanes: a down projection reads a compact x in
whole lines and gathers W [N, K], stored channel-major, by whole rows.

Each kernel loops over output tiles, those with work first: one per program, or, with
Tile.persistent, the share of a program that stays on its multiprocessor. Operands that a descriptor
can fetch (_tma.py) come through one then.
"""

import torch
import triton
import triton.language as tl

from ._common import INTERPRET, dot, fp32_precision, offsets, round_to
from ._dropout import kept_tile
from ._tma import consecutive, descriptor, has_tensor_memory, program_count
from .open_sets import (
    axis_tile,
    open_first,
    open_tiles,
    overflows,
    tile_columns,
    tile_start,
    tile_unit,
)


@triton.jit
def _gated_matmul_kernel(
    x_ptr,  # [T, columns_in]: a pointer, or a descriptor of tiles [BLOCK_M, BLOCK_K]
    w_ptr,  # [N, K]: a pointer, or a descriptor of W or of W^T, of tiles or of single rows
    bias_ptr,  # [N] or None
    z_in_ptr,  # fp32 [K / GROUP_IN] or None
    z_out_ptr,  # fp32 [N / GROUP_OUT] or None
    open_in_ptr,
    open_out_ptr,
    u_ptr,  # [T, RANK], dense, or None
    up_ptr,  # [N, RANK] or None
    aux_ptr,  # [T, columns_out] or None
    seed_ptr,  # int64 or None: dropout of z_in * x or, if there is a u, of up u
    y_ptr,  # [T, columns_out], dense, or None: alpha * z_out * h
    h_ptr,  # [T, columns_out], dense, or None: W (z_in * x) + up u + bias
    dot_ptr,  # fp32 [tiles_m, N], dense, or None: column sums of aux * h over each tile's rows
    T,
    N,
    K,
    columns_in,
    columns_out,
    alpha,
    dropout,
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
    COMPACT_IN: tl.constexpr,
    COMPACT_OUT: tl.constexpr,
    MASKED: tl.constexpr,  # up u + bias belong to y, outside of the gate, and not to h
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,  # None, "tiles" or "rows"
    W_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    DROP_X: tl.constexpr = seed_ptr is not None and u_ptr is None
    DROP_U: tl.constexpr = seed_ptr is not None and u_ptr is not None
    steps = open_tiles(open_in_ptr, K, GROUP_IN, BLOCK_K)
    open_n = tl.minimum(open_tiles(open_out_ptr, N, GROUP_OUT, BLOCK_N), tiles_n)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = open_first(tile, tiles_m, open_n, GROUP_M)
        row = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = row < T
        unit_n = tile_unit(pid_n, open_out_ptr, N, GROUP_OUT, BLOCK_N)
        col, in_cols, col_open, z_out = axis_tile(
            pid_n, unit_n, open_out_ptr, z_out_ptr, N, GROUP_OUT, BLOCK_N
        )
        if W_TMA is not None:
            n_start = tile_start(pid_n, unit_n, open_out_ptr, GROUP_OUT, BLOCK_N, False)

        h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        unit = tile_unit(0, open_in_ptr, K, GROUP_IN, BLOCK_K)
        for step in range(0, tl.where(pid_n < open_n, steps, 0)):
            k, in_k, k_open, z_in = axis_tile(
                step, unit, open_in_ptr, z_in_ptr, K, GROUP_IN, BLOCK_K
            )
            if X_TMA:
                start = tile_start(step, unit, open_in_ptr, GROUP_IN, BLOCK_K, COMPACT_IN)
                x = x_ptr.load([pid_m * BLOCK_M, start])
            else:
                x_col, _, x_read = tile_columns(
                    step, unit, k, in_k, k_open, open_in_ptr, columns_in, GROUP_IN, BLOCK_K,
                    COMPACT_IN
                )  # fmt: skip
                x_ptrs = x_ptr + offsets(row, stride_xm, x_col, stride_xk)
                x = tl.load(x_ptrs, mask=in_rows[:, None] & x_read[None, :], other=0.0)
            if W_TMA == "tiles":
                start = tile_start(step, unit, open_in_ptr, GROUP_IN, BLOCK_K, False)
                if W_TRANSPOSED:
                    w = w_ptr.load([start, n_start])
                else:
                    w = w_ptr.load([n_start, start]).T
            elif W_TMA == "rows":  # closed rows are read as rows outside of W: 0
                if W_TRANSPOSED:
                    w = w_ptr.gather(tl.where(k_open, k, K).to(tl.int32), n_start)
                else:
                    start = tile_start(step, unit, open_in_ptr, GROUP_IN, BLOCK_K, False)
                    w = w_ptr.gather(tl.where(col_open, col, N).to(tl.int32), start).T
            else:
                w_ptrs = w_ptr + offsets(k, stride_wk, col, stride_wn)
                w = tl.load(w_ptrs, mask=k_open[:, None] & col_open[None, :], other=0.0)
            unit = tile_unit(step + 1, open_in_ptr, K, GROUP_IN, BLOCK_K)
            if z_in_ptr is not None:
                x = round_to(x.to(tl.float32) * z_in[None, :], x.dtype, INTERPRETED)
            if DROP_X:
                x = tl.where(kept_tile(seed_ptr, dropout, pid_m * BLOCK_M, k, BLOCK_M), x, 0.0)
            h = dot(x, w, h, PRECISION, INTERPRETED)

        added_open = in_cols if MASKED else col_open
        added = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if MASKED or DROP_U else h
        if u_ptr is not None:
            for start in tl.range(0, RANK, BLOCK_R, num_stages=1):
                r = start + tl.arange(0, BLOCK_R)
                u_mask = in_rows[:, None] & (r < RANK)[None, :]
                u = tl.load(u_ptr + offsets(row, RANK, r, 1), mask=u_mask, other=0.0)
                up_mask = (r < RANK)[:, None] & added_open[None, :]
                up_ptrs = up_ptr + offsets(r, stride_upr, col, stride_upn)
                added = dot(
                    u, tl.load(up_ptrs, mask=up_mask, other=0.0), added, PRECISION, INTERPRETED
                )
        if DROP_U:
            kept = kept_tile(seed_ptr, dropout, pid_m * BLOCK_M, col, BLOCK_M)
            added = tl.where(kept, added, 0.0)
        if bias_ptr is not None:
            added += tl.load(bias_ptr + col, mask=added_open, other=0.0).to(tl.float32)[None, :]
        if not MASKED:
            h = h + added if DROP_U else added

        # A NaN in x or u must not leak into closed columns through 0 * NaN.
        h = tl.where(col_open[None, :], h, 0.0)
        if COMPACT_IN:
            h = tl.where(overflows(open_in_ptr, K, columns_in, GROUP_IN), float("nan"), h)
        if COMPACT_OUT:
            h = tl.where(overflows(open_out_ptr, N, columns_out, GROUP_OUT), float("nan"), h)
        out_col, in_out, out_read = tile_columns(
            pid_n, unit_n, col, in_cols, col_open, open_out_ptr, columns_out, GROUP_OUT, BLOCK_N,
            COMPACT_OUT
        )  # fmt: skip
        if dot_ptr is not None:
            aux_mask = in_rows[:, None] & out_read[None, :] & (pid_n < open_n)
            aux_ptrs = aux_ptr + offsets(row, stride_am, out_col, stride_an)
            aux = tl.load(aux_ptrs, mask=aux_mask, other=0.0).to(tl.float32)
            dot_ptrs = dot_ptr + pid_m.to(tl.int64) * N + col
            tl.store(dot_ptrs, tl.sum(h * aux, axis=0), mask=in_cols)
        out_mask = in_rows[:, None] & in_out[None, :]
        out = offsets(row, columns_out, out_col, 1)
        if h_ptr is not None:
            tl.store(h_ptr + out, round_to(h, h_ptr.dtype.element_ty, INTERPRETED), mask=out_mask)
        if y_ptr is not None:
            y = h * (z_out * alpha)[None, :]
            if MASKED:
                y += added
            tl.store(y_ptr + out, round_to(y, y_ptr.dtype.element_ty, INTERPRETED), mask=out_mask)


@triton.jit
def _gated_outer_kernel(
    dy_ptr,  # [T, columns_out]: a pointer, or a descriptor of tiles [BLOCK_T, BLOCK_N]
    x_ptr,  # [T, columns_in]: a pointer, or a descriptor of tiles [BLOCK_T, BLOCK_K]
    z_in_ptr,  # fp32 [K / GROUP_IN] or None
    z_out_ptr,  # fp32 [N / GROUP_OUT] or None
    open_in_ptr,
    open_out_ptr,
    seed_ptr,  # int64 or None: dropout of dy
    dw_ptr,  # [N, K]: z_out[n] * z_in[k] * sum_t dy[t, n] * x[t, k]
    T,
    N,
    K,
    columns_in,
    columns_out,
    dropout,
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
    COMPACT_IN: tl.constexpr,
    COMPACT_OUT: tl.constexpr,
    DY_TMA: tl.constexpr,
    X_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    open_n = open_tiles(open_out_ptr, N, GROUP_OUT, BLOCK_N)
    open_k = open_tiles(open_in_ptr, K, GROUP_IN, BLOCK_K)
    for tile in range(tl.program_id(0), tiles_n * tiles_k, tl.num_programs(0)):
        if tile < open_n * tiles_k:
            pid_n, pid_k = open_first(tile, open_n, open_k, GROUP_M)
        else:
            pid_n, pid_k = tile // tiles_k, tile % tiles_k
        unit_n = tile_unit(pid_n, open_out_ptr, N, GROUP_OUT, BLOCK_N)
        n, in_n, n_open, z_out = axis_tile(
            pid_n, unit_n, open_out_ptr, z_out_ptr, N, GROUP_OUT, BLOCK_N
        )
        unit_k = tile_unit(pid_k, open_in_ptr, K, GROUP_IN, BLOCK_K)
        k, in_k, k_open, z_in = axis_tile(
            pid_k, unit_k, open_in_ptr, z_in_ptr, K, GROUP_IN, BLOCK_K
        )
        dy_col, _, dy_read = tile_columns(
            pid_n, unit_n, n, in_n, n_open, open_out_ptr, columns_out, GROUP_OUT, BLOCK_N,
            COMPACT_OUT
        )  # fmt: skip
        x_col, _, x_read = tile_columns(
            pid_k, unit_k, k, in_k, k_open, open_in_ptr, columns_in, GROUP_IN, BLOCK_K, COMPACT_IN
        )
        if DY_TMA:
            dy_start = tile_start(pid_n, unit_n, open_out_ptr, GROUP_OUT, BLOCK_N, COMPACT_OUT)
        if X_TMA:
            x_start = tile_start(pid_k, unit_k, open_in_ptr, GROUP_IN, BLOCK_K, COMPACT_IN)

        dw = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        is_work = (pid_n < open_n) & (pid_k < open_k)
        for step in range(0, tl.where(is_work, tl.cdiv(T, BLOCK_T), 0)):
            t = step * BLOCK_T + tl.arange(0, BLOCK_T)
            if DY_TMA:
                dy = dy_ptr.load([step * BLOCK_T, dy_start]).T
            else:
                dy_ptrs = dy_ptr + offsets(dy_col, stride_dyn, t, stride_dym)
                dy = tl.load(dy_ptrs, mask=dy_read[:, None] & (t < T)[None, :], other=0.0)
            if X_TMA:
                x = x_ptr.load([step * BLOCK_T, x_start])
            else:
                x_ptrs = x_ptr + offsets(t, stride_xm, x_col, stride_xk)
                x = tl.load(x_ptrs, mask=(t < T)[:, None] & x_read[None, :], other=0.0)
            if seed_ptr is not None:
                kept = kept_tile(seed_ptr, dropout, step * BLOCK_T, n, BLOCK_T)
                dy = tl.where(kept.T, dy, 0.0)
            dw = dot(dy, x, dw, PRECISION, INTERPRETED)

        dw = dw * z_out[:, None] * z_in[None, :]
        dw = tl.where(n_open[:, None] & k_open[None, :], dw, 0.0)
        if COMPACT_IN:
            dw = tl.where(overflows(open_in_ptr, K, columns_in, GROUP_IN), float("nan"), dw)
        if COMPACT_OUT:
            dw = tl.where(overflows(open_out_ptr, N, columns_out, GROUP_OUT), float("nan"), dw)
        dw = round_to(dw, dw_ptr.dtype.element_ty, INTERPRETED)
        dw_ptrs = dw_ptr + offsets(n, stride_dwn, k, stride_dwk)
        tl.store(dw_ptrs, dw, mask=in_n[:, None] & in_k[None, :])


def _operand(x, axis, tile, rows, columns):
    """(x [T, columns of axis] or its descriptor for tiles [rows, columns], whether it is one)."""
    if tile.persistent and consecutive(axis, columns, in_buffer=True):
        described = descriptor(x, rows, columns)
        if described is not None:
            return described, True
    return x, False


def _weight_operand(w, outs, ins, tile, block_n, block_k):
    """(w [N, K] or a descriptor of W or W^T, how it is read: None, "tiles" or "rows", of W^T?)."""
    transposed = w.stride(1) != 1
    matrix, sides = w, ((outs, block_n), (ins, block_k))
    if transposed:
        matrix, sides = w.t(), sides[::-1]
    (row_axis, rows), (column_axis, columns) = sides
    how = "tiles" if consecutive(row_axis, rows) else "rows"
    if tile.persistent and consecutive(column_axis, columns):
        if how == "tiles" or has_tensor_memory(w.device) or INTERPRET:
            described = descriptor(matrix, rows if how == "tiles" else 1, columns)
            if described is not None:
                return described, how, transposed
    return w, None, transposed


def gated_matmul(
    x, w, ins, outs, tile, *, bias=None, u=None, up=None, aux=None, drop=None, alpha=1.0,
    form="gated", keep="y"
):  # fmt: skip
    """Launch the matmul kernel: x [T, K], w [N, K], ins and outs the axes of K and N.

    Gives (y, h, dot): those of y and h [T, N] that `keep` names, and, if aux [T, N] is given,
    the column sums of aux * h, fp32 [N]. x, and y, h and aux, are compact where their axis is.
    form "masked": y = alpha * z_out * h + U u + b, h = W (z_in * x). drop (a _dropout.Dropout) acts
    on z_in * x or, if there is a u, on U u.
    """
    t, n = x.shape[0], outs.size
    block_m, block_n, block_k = tile.block_m, outs.width(tile.block_n), ins.width(tile.block_k)
    if (ins.z is not None and ins.gathered) or (u is not None and has_tensor_memory(x.device)):
        block_n = min(block_n, 128)  # wider, addresses spill; or x and two sums overflow the memory
    by_pointers = ins.gathered and not ins.compact
    if tile.persistent and by_pointers and ins.z is not None and not has_tensor_memory(x.device):
        block_k = min(block_k, 32)  # x is gated in registers: wider, Triton 3.6 spills 512 bytes
    warps = tile.num_warps
    if not keep and has_tensor_memory(x.device):
        warps = min(warps, 4)  # at 8, ptxas aims at 128 registers here and spills one
    # The column sums have a place for every lane, also for those past a compact buffer's end.
    tiles_m = triton.cdiv(t, block_m)
    tiles_n = outs.tiles(block_n, n if aux is not None else outs.columns)
    y = x.new_empty(t, outs.columns) if "y" in keep else None
    h = x.new_empty(t, outs.columns) if "h" in keep else None
    dot = x.new_empty(tiles_m, n, dtype=torch.float32) if aux is not None else None
    rank = 0 if u is None else u.shape[1]
    if tiles_m * tiles_n:
        xs, x_tma = _operand(x, ins, tile, block_m, block_k)
        ws, w_tma, w_transposed = _weight_operand(w, outs, ins, tile, block_n, block_k)
        _gated_matmul_kernel[(program_count(tiles_m * tiles_n, tile.persistent, x.device),)](
            xs, ws, bias, ins.z, outs.z, ins.open_set, outs.open_set, u, up, aux,
            None if drop is None else drop.seed, y, h, dot,
            t, n, ins.size, ins.columns, outs.columns, alpha, 0.0 if drop is None else drop.p,
            *x.stride(), *w.stride(),
            *(up.stride() if rank else (0, 0)), *((0, 0) if aux is None else aux.stride()),
            tiles_m, tiles_n,
            RANK=rank, GROUP_IN=ins.group, GROUP_OUT=outs.group,
            COMPACT_IN=ins.compact, COMPACT_OUT=outs.compact, MASKED=form == "masked",
            X_TMA=x_tma, W_TMA=w_tma, W_TRANSPOSED=w_transposed,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            BLOCK_R=min(64, max(16, triton.next_power_of_2(rank))), GROUP_M=tile.group_m,
            PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
            num_warps=warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y, h, None if dot is None else dot.sum(0)


def gated_outer(dy, x, outs, ins, tile, like, *, drop=None):
    """Launch the weight-gradient kernel: (z_out dy)^T (z_in x), laid out as `like` [N, K].

    dy [T, N] and x [T, K] are compact where their axis is; closed rows and columns are 0. drop
    (a _dropout.Dropout) acts on dy.
    """
    dw = torch.empty_like(like)
    block_n, block_k, block_t = outs.width(tile.block_m), ins.width(tile.block_n), tile.block_k
    tiles_n, tiles_k = outs.tiles(block_n), ins.tiles(block_k)
    if tiles_n * tiles_k:
        dys, dy_tma = _operand(dy, outs, tile, block_t, block_n)
        xs, x_tma = _operand(x, ins, tile, block_t, block_k)
        _gated_outer_kernel[(program_count(tiles_n * tiles_k, tile.persistent, x.device),)](
            dys, xs, ins.z, outs.z, ins.open_set, outs.open_set,
            None if drop is None else drop.seed, dw,
            dy.shape[0], outs.size, ins.size, ins.columns, outs.columns,
            0.0 if drop is None else drop.p, *dy.stride(), *x.stride(), *dw.stride(),
            tiles_n, tiles_k,
            GROUP_IN=ins.group, GROUP_OUT=outs.group,
            COMPACT_IN=ins.compact, COMPACT_OUT=outs.compact, DY_TMA=dy_tma, X_TMA=x_tma,
            BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_T=block_t, GROUP_M=tile.group_m,
            PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dw
