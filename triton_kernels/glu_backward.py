"""Stage 2, kernels: the matmuls of a gated MLP's backward, over open channels.

    dh = dy Wd + v Ad                        or given; never stored when it is computed
    du = dh * z * act(a)                     da = dh * z * u * act'(a)
    dz = colsum(dh * act(a) u)               db = colsum(da), colsum(du)
    dx = da Wa + du Wu + v A                 one accumulator

Compact tensors and slots are those of glu_common. Column sums are added per tile of rows, then
over the tiles in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ._common import INTERPRET, dot, fp32_precision, offsets, round_to
from ._tma import program_count
from .glu_common import (
    activation,
    add_low_rank,
    by_descriptor,
    column_part,
    joined,
    load_tile,
    open_slots,
    slack_tiles,
    slot_gate,
    slot_place,
    slot_tile,
    strides_of,
)


@triton.jit
def _store_column_sums(ptr, values, pid_m, slot, C):
    """Sums over the rows of a tile, into row pid_m of fp32 [tiles_m, C]."""
    if ptr is not None:
        tl.store(ptr + pid_m.to(tl.int64) * C + slot, tl.sum(values, axis=0), mask=slot < C)


@triton.jit
def _store_glu_gradients(
    dh, pid_m, tile, dh_ptr, z_ptr, open_ptr, a_ptr, u_ptr, da_ptr, du_ptr, h_ptr, dz_ptr,
    db_a_ptr, db_u_ptr, T, F, C, stride_dhm, stride_dhn, ACT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """From dh of tile number `tile` of BLOCK slots to all that is made of it."""
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < T
    slot, lane, is_open = slot_tile(tile, open_ptr, F, C, BLOCK)
    at = offsets(row, C, slot, 1)
    mask = in_rows[:, None] & (slot < C)[None, :]
    if dh_ptr is not None:
        dh_ptrs = dh_ptr + offsets(row, stride_dhm, slot, stride_dhn)
        dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
    # A NaN in dy, or beside the open slots in dh, must not leak into slots that are not open.
    dh = tl.where(is_open[None, :], dh, 0.0)
    z = slot_gate(z_ptr, open_ptr, lane, is_open, F, C)[None, :]
    u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if a_ptr is None:
        g, slope = activation(u, ACT)
        du = dh * z * slope
    else:
        a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
        value, slope = activation(a, ACT)
        g = value * u
        du = dh * z * value
        da = dh * z * u * slope
        tl.store(da_ptr + at, round_to(da, da_ptr.dtype.element_ty, INTERPRETED), mask=mask)
        _store_column_sums(db_a_ptr, da, pid_m, slot, C)
    tl.store(du_ptr + at, round_to(du, du_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    _store_column_sums(db_u_ptr, du, pid_m, slot, C)
    if h_ptr is not None:
        tl.store(h_ptr + at, round_to(g * z, h_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    _store_column_sums(dz_ptr, dh * g, pid_m, slot, C)


@triton.jit
def _glu_bwd_dh_kernel(
    dy_ptr,  # [T, K], or None
    w_d_ptr,  # [F, K], beside dy
    dh_ptr,  # [T, C], or None: computed
    v_ptr,  # [T, RANK], dense, or None: s dy B of the down projection
    down_ptr,  # [RANK, F] or None: its A
    z_ptr,  # fp32 [F] or None
    open_ptr,
    a_ptr,  # [T, C], dense, or None: the two-matrix form
    u_ptr,  # [T, C], dense
    da_ptr,  # [T, C], dense, or None
    du_ptr,  # [T, C], dense
    h_ptr,  # [T, C], dense, or None
    dz_ptr,  # fp32 [tiles_m, C], dense, or None: column sums over each tile's rows
    db_a_ptr,  # likewise
    db_u_ptr,  # likewise
    T,
    F,
    K,
    C,
    stride_dym,
    stride_dyk,
    stride_wf,
    stride_wk,
    stride_dhm,
    stride_dhn,
    stride_downr,
    stride_downf,
    tiles_m,
    ACT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    FUSED: tl.constexpr = dy_ptr is not None
    LEVELS: tl.constexpr = (3 if BLOCK_N >= 256 else 2) if BLOCK_N >= 128 and FUSED else 0
    n_open = open_slots(open_ptr, F, C)
    open_n = tl.cdiv(n_open, BLOCK_N)
    tiles = tiles_m * slack_tiles(n_open, C, BLOCK_N)
    done = tl.program_id(0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n, is_work = slot_place(tile, tiles_m, open_n, GROUP_M)
        dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if FUSED:
            row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            in_rows = row < T
            _, lane, is_open = slot_tile(pid_n, open_ptr, F, C, BLOCK_N)
            for step in range(0, tl.where(is_work, tl.cdiv(K, BLOCK_K), 0)):
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                dy = load_tile(
                    dy_ptr, pid_m * BLOCK_M, row, in_rows, step * BLOCK_K, k, k < K,
                    stride_dym, stride_dyk, X_TMA,
                )  # fmt: skip
                w = load_tile(
                    w_d_ptr, pid_n * BLOCK_N, lane, is_open, step * BLOCK_K, k, k < K,
                    stride_wf, stride_wk, W_TMA,
                )  # fmt: skip
                dh = dot(dy, w.T, dh, PRECISION, INTERPRETED)
        # As in the forward: derived once more, not kept in registers.
        pid_m, pid_n, _ = slot_place(done, tiles_m, open_n, GROUP_M)
        done += tl.num_programs(0)
        if RANK:
            row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            _, lane, is_open = slot_tile(pid_n, open_ptr, F, C, BLOCK_N)
            dh = add_low_rank(
                dh, v_ptr, down_ptr, row, row < T, lane, is_open, stride_downf, stride_downr,
                0, RANK, RANK, PRECISION, INTERPRETED,
            )  # fmt: skip
        for part in tl.static_range(1 << LEVELS):
            _store_glu_gradients(
                column_part(dh, part, LEVELS), pid_m, (pid_n << LEVELS) + part, dh_ptr, z_ptr,
                open_ptr, a_ptr, u_ptr, da_ptr, du_ptr, h_ptr, dz_ptr, db_a_ptr, db_u_ptr, T, F, C,
                stride_dhm, stride_dhn, ACT, BLOCK_M, BLOCK_N >> LEVELS, INTERPRETED,
            )  # fmt: skip


@triton.jit
def _add_slots(
    acc, d_ptr, w_ptr, open_ptr, n_open, row_start, row, in_rows, col_start, col, in_cols, F, C,
    stride_wf, stride_wk, BLOCK_K: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + d w over the open slots; d [T, C] dense, w [F, K]."""
    _, lane, is_open = slot_tile(0, open_ptr, F, C, BLOCK_K)
    for step in range(0, tl.cdiv(n_open, BLOCK_K)):
        slot = step * BLOCK_K + tl.arange(0, BLOCK_K)
        # Slots past the open count hold zeros: a mask without the count keeps the loads wide.
        d = load_tile(d_ptr, row_start, row, in_rows, step * BLOCK_K, slot, slot < C, C, 1, X_TMA)
        w = load_tile(
            w_ptr, step * BLOCK_K, lane, is_open, col_start, col, in_cols, stride_wf, stride_wk,
            W_TMA,
        )  # fmt: skip
        # Lanes are read one step ahead: loads that wait for no load of their own step can fill all
        # pipeline stages.
        _, lane, is_open = slot_tile(step + 1, open_ptr, F, C, BLOCK_K)
        acc = dot(d, w, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit
def _glu_bwd_dx_kernel(
    da_ptr,  # [T, C], dense, or None
    du_ptr,  # [T, C], dense
    w_a_ptr,  # [F, K] or None
    w_u_ptr,  # [F, K]
    open_ptr,
    v_ptr,  # [T, RANK], dense, or None: s da Ba beside s du Bu
    down_ptr,  # [RANK, K] or None: Aa above Au
    dx_ptr,  # [T, K], dense
    T,
    F,
    K,
    C,
    stride_af,
    stride_ak,
    stride_uf,
    stride_uk,
    stride_downr,
    stride_downk,
    tiles_m,
    tiles_n,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    n_open = open_slots(open_ptr, F, C)
    done = tl.program_id(0)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n, _ = slot_place(tile, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if da_ptr is not None:
            dx = _add_slots(
                dx, da_ptr, w_a_ptr, open_ptr, n_open, pid_m * BLOCK_M, row, row < T,
                pid_n * BLOCK_N, col, col < K, F, C, stride_af, stride_ak, BLOCK_K, X_TMA, W_TMA,
                PRECISION, INTERPRETED,
            )  # fmt: skip
        dx = _add_slots(
            dx, du_ptr, w_u_ptr, open_ptr, n_open, pid_m * BLOCK_M, row, row < T,
            pid_n * BLOCK_N, col, col < K, F, C, stride_uf, stride_uk, BLOCK_K, X_TMA, W_TMA,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        pid_m, pid_n, _ = slot_place(done, tiles_m, tiles_n, GROUP_M)
        done += tl.num_programs(0)
        row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if RANK:
            dx = add_low_rank(
                dx, v_ptr, down_ptr, row, row < T, col, col < K, stride_downk, stride_downr,
                0, RANK, RANK, PRECISION, INTERPRETED,
            )  # fmt: skip
        if open_ptr is not None:
            # With C = 0 there is no slot whose da and du could carry the NaN.
            dx = tl.where(tl.load(open_ptr + F) > C, float("nan"), dx)
        mask = (row < T)[:, None] & (col < K)[None, :]
        dx_ptrs = dx_ptr + offsets(row, K, col, 1)
        tl.store(dx_ptrs, round_to(dx, dx_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _slot_sums_kernel(
    part_ptr,  # fp32 [tiles_m, C], dense
    sum_ptr,  # [F], dense: by channel
    z_ptr,  # fp32 [F] or None: 0 for channels whose gate is 0
    open_ptr,
    F,
    C,
    tiles_m,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = slot < F
    is_open = slot < open_slots(open_ptr, F, C)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles_m, ROWS):
        m = start + tl.arange(0, ROWS)
        mask = (m < tiles_m)[:, None] & is_open[None, :]
        total += tl.sum(tl.load(part_ptr + offsets(m, C, slot, 1), mask=mask, other=0.0), axis=0)
    lane = slot
    if open_ptr is not None:
        count = tl.load(open_ptr + F)
        total = tl.where((count > C) & (slot < count), float("nan"), total)
        lane = tl.load(open_ptr + slot, mask=in_range, other=0)
    if z_ptr is not None:
        total = tl.where(tl.load(z_ptr + lane, mask=in_range, other=0.0) != 0, total, 0.0)
    total = round_to(total, sum_ptr.dtype.element_ty, INTERPRETED)
    tl.store(sum_ptr + lane, total, mask=in_range)


def _sums_by_channel(partial, slots, like, gated=False):
    """Column sums [C] per tile of rows, added up and put in the places of the channels: [F]."""
    sums = torch.empty_like(like, memory_format=torch.contiguous_format)
    if sums.numel():
        _slot_sums_kernel[(triton.cdiv(sums.numel(), 64),)](
            partial, sums, slots.z if gated else None, slots.open_set, slots.channels,
            slots.capacity, partial.shape[0], ROWS=16, BLOCK=64, INTERPRETED=INTERPRET, num_warps=4,
        )  # fmt: skip
    return sums


def glu_gradients(slots, a, u, act, tile, needs, *, dh=None, dy=None, down=None, v=None):
    """Launch the dh kernel on the saved a [T, C] (or None) and u: what `needs` names, in a dict.

    da, du, h [T, C] (h as in the forward) and, by channel, dz fp32 [F], db_a, db_u [F]. The
    gradient of h is dh [T, C], or dy [T, K] through the Branch `down` and v = s dy B.
    """
    (t, c), f = u.shape, slots.channels
    tiles_m = triton.cdiv(t, tile.block_m)
    grads = {"da": None if a is None else torch.empty_like(u), "du": torch.empty_like(u)}
    grads["h"] = torch.empty_like(u) if "h" in needs else None
    partial = {
        name: u.new_empty(tiles_m, c, dtype=torch.float32) if name in needs else None
        for name in ("dz", "db_a", "db_u")
    }
    tiles = tiles_m * triton.cdiv(c, tile.block_n)
    if tiles:
        w = None if down is None else down.w.t()
        (dys,), x_tma = by_descriptor([dy], tile, tile.block_m, tile.block_k)
        ws, w_tma = w, False
        if slots.open_set is None:
            (ws,), w_tma = by_descriptor([w], tile, tile.block_n, tile.block_k)
        lora_a = None if v is None else down.lora_a
        _glu_bwd_dh_kernel[(program_count(tiles, tile.persistent, u.device),)](
            dys, ws, dh, v, lora_a, slots.z, slots.open_set, a, u, *grads.values(),
            *partial.values(), t, f, 0 if dy is None else dy.shape[1], c,
            *strides_of(dy, w, dh, lora_a), tiles_m,
            ACT=act, RANK=0 if v is None else v.shape[1],
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m, X_TMA=x_tma, W_TMA=w_tma,
            PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    for name, like in needs.items():
        if name in partial:
            grads[name] = _sums_by_channel(partial[name], slots, like, gated=name == "dz")
    return grads


def glu_dx(da, du, a, u, slots, v, tile):
    """Launch the dx kernel: da Wa + du Wu + v [Aa; Au], [T, K]; da is None with a.w."""
    (t, c), (f, k) = du.shape, u.w.shape
    dx = du.new_empty(t, k)
    tiles_m, tiles_n = triton.cdiv(t, tile.block_m), triton.cdiv(k, tile.block_n)
    if tiles_m * tiles_n:
        factors = [branch.lora_a for branch in (a, u) if branch.rank]
        lora_a = joined(factors)
        (das, dus), x_tma = by_descriptor([da, du], tile, tile.block_m, tile.block_k)
        ws, w_tma = [a.w, u.w], False
        if slots.open_set is None:
            ws, w_tma = by_descriptor(ws, tile, tile.block_k, tile.block_n)
        _glu_bwd_dx_kernel[(program_count(tiles_m * tiles_n, tile.persistent, du.device),)](
            das, dus, *ws, slots.open_set, v, lora_a, dx, t, f, k, c,
            *strides_of(a.w, u.w, lora_a), tiles_m, tiles_n,
            RANK=a.rank + u.rank,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m, X_TMA=x_tma, W_TMA=w_tma,
            PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dx
