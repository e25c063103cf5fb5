"""Stage 2, kernels: the first half of a gated MLP, two matmuls that end in the activation.

    a = Wa x + s Ba (Aa x) + ba      u likewise      h = act(a) * u * z      (or h = act(u) * z)

Both products share each tile of x. Compact tensors and slots are those of glu_common.
"""

import triton
import triton.language as tl

from ._common import INTERPRET, dot, fp32_precision, offsets, round_to
from ._tma import program_count
from .glu_common import (
    activation,
    add_low_rank,
    by_descriptor,
    column_part,
    load_tile,
    open_slots,
    slack_tiles,
    slot_gate,
    slot_place,
    slot_tile,
    strides_of,
)


@triton.jit
def _store_glu(
    a, u, pid_m, tile, w_a_ptr, bias_a_ptr, bias_u_ptr, z_ptr, open_ptr, h_ptr, a_ptr, u_ptr, T, F,
    C, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Finish and store tile number `tile` of BLOCK slots."""
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < T
    slot, lane, is_open = slot_tile(tile, open_ptr, F, C, BLOCK)
    out = offsets(row, C, slot, 1)
    mask = in_rows[:, None] & (slot < C)[None, :]
    if bias_u_ptr is not None:
        u += tl.load(bias_u_ptr + lane, mask=is_open, other=0.0).to(tl.float32)[None, :]
    # A NaN in x must not leak into slots that are not open through 0 * NaN.
    u = tl.where(is_open[None, :], u, 0.0)
    if w_a_ptr is None:
        h, _ = activation(u, ACT)
    else:
        if bias_a_ptr is not None:
            a += tl.load(bias_a_ptr + lane, mask=is_open, other=0.0).to(tl.float32)[None, :]
        a = tl.where(is_open[None, :], a, 0.0)
        if a_ptr is not None:
            tl.store(a_ptr + out, round_to(a, a_ptr.dtype.element_ty, INTERPRETED), mask=mask)
        h, _ = activation(a, ACT)
        h *= u
    if h_ptr is not None:
        z = slot_gate(z_ptr, open_ptr, lane, is_open, F, C)
        h = tl.where(is_open[None, :], h * z[None, :], 0.0)
        tl.store(h_ptr + out, round_to(h, h_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    if u_ptr is not None:
        tl.store(u_ptr + out, round_to(u, u_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _glu_fwd_kernel(
    x_ptr,  # [T, K]
    w_a_ptr,  # [F, K], or None: h = act(u) * z
    w_u_ptr,  # [F, K]
    bias_a_ptr,  # [F] or None
    bias_u_ptr,  # [F] or None
    z_ptr,  # fp32 [F] or None
    open_ptr,
    p_ptr,  # [T, RANK_A + RANK_U], dense, or None: s x A^T of both branches
    up_a_ptr,  # [F, RANK_A] or None
    up_u_ptr,  # [F, RANK_U] or None
    h_ptr,  # [T, C], dense, or None
    a_ptr,  # [T, C], dense, or None
    u_ptr,  # [T, C], dense, or None
    T,
    F,
    K,
    C,
    stride_xm,
    stride_xk,
    stride_an,
    stride_ak,
    stride_un,
    stride_uk,
    stride_upan,
    stride_upar,
    stride_upun,
    stride_upur,
    tiles_m,
    tiles_n,
    ACT: tl.constexpr,
    FILL: tl.constexpr,  # write zeros into all slots that are not open
    RANK_A: tl.constexpr,
    RANK_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # The epilogue of a wide tile goes through it in parts, for which the registers suffice.
    LEVELS: tl.constexpr = 2 if BLOCK_N >= 128 else 0
    n_open = open_slots(open_ptr, F, C)
    open_n = tl.cdiv(n_open, BLOCK_N)
    written_n = tiles_n if FILL else slack_tiles(n_open, C, BLOCK_N)
    tiles = tiles_m * written_n
    done = tl.program_id(0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n, is_work = slot_place(tile, tiles_m, open_n, GROUP_M)
        row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = row < T
        _, lane, is_open = slot_tile(pid_n, open_ptr, F, C, BLOCK_N)
        a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, tl.where(is_work, tl.cdiv(K, BLOCK_K), 0)):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            x = load_tile(
                x_ptr, pid_m * BLOCK_M, row, in_rows, step * BLOCK_K, k, k < K,
                stride_xm, stride_xk, X_TMA,
            )  # fmt: skip
            if w_a_ptr is not None:
                w = load_tile(
                    w_a_ptr, pid_n * BLOCK_N, lane, is_open, step * BLOCK_K, k, k < K,
                    stride_an, stride_ak, W_TMA,
                )  # fmt: skip
                a = dot(x, w.T, a, PRECISION, INTERPRETED)
            w = load_tile(
                w_u_ptr, pid_n * BLOCK_N, lane, is_open, step * BLOCK_K, k, k < K,
                stride_un, stride_uk, W_TMA,
            )  # fmt: skip
            u = dot(x, w.T, u, PRECISION, INTERPRETED)
        # `done` equals `tile`, but the compiler cannot know: rows and lanes are derived once more,
        # instead of being kept in registers during the loop.
        pid_m, pid_n, _ = slot_place(done, tiles_m, open_n, GROUP_M)
        done += tl.num_programs(0)
        if RANK_A + RANK_U:
            row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            in_rows = row < T
            _, lane, is_open = slot_tile(pid_n, open_ptr, F, C, BLOCK_N)
        if RANK_A:
            a = add_low_rank(
                a, p_ptr, up_a_ptr, row, in_rows, lane, is_open, stride_upan, stride_upar,
                0, RANK_A, RANK_A + RANK_U, PRECISION, INTERPRETED,
            )  # fmt: skip
        if RANK_U:
            u = add_low_rank(
                u, p_ptr, up_u_ptr, row, in_rows, lane, is_open, stride_upun, stride_upur,
                RANK_A, RANK_U, RANK_A + RANK_U, PRECISION, INTERPRETED,
            )  # fmt: skip
        for part in tl.static_range(1 << LEVELS):
            _store_glu(
                column_part(a, part, LEVELS), column_part(u, part, LEVELS), pid_m,
                (pid_n << LEVELS) + part, w_a_ptr, bias_a_ptr, bias_u_ptr, z_ptr, open_ptr, h_ptr,
                a_ptr, u_ptr, T, F, C, ACT, BLOCK_M, BLOCK_N >> LEVELS, INTERPRETED,
            )  # fmt: skip


def glu_forward(x, a, u, slots, p, act, tile, keep, fill=False):
    """Launch the forward kernel on x [T, K]: (h, a, u) [T, C], None where `keep` lacks the letter.

    a, u: Branch; a.w None gives the two-matrix form. p: project(x, (a, u)). fill: all slots that
    are not open are set to 0.
    """
    (t, k), (f, c) = x.shape, slots[:2]
    h, out_a, out_u = (
        x.new_empty(t, c) if name in keep and not (name == "a" and a.w is None) else None
        for name in "hau"
    )
    tiles_m, tiles_n = triton.cdiv(t, tile.block_m), triton.cdiv(c, tile.block_n)
    if tiles_m * tiles_n:
        (xs,), x_tma = by_descriptor([x], tile, tile.block_m, tile.block_k)
        ws, w_tma = [a.w, u.w], False
        if slots.open_set is None:
            ws, w_tma = by_descriptor(ws, tile, tile.block_n, tile.block_k)
        _glu_fwd_kernel[(program_count(tiles_m * tiles_n, tile.persistent, x.device),)](
            xs, *ws, a.bias, u.bias, slots.z, slots.open_set, p, a.lora_b, u.lora_b, h, out_a,
            out_u, t, f, k, c, *strides_of(x, a.w, u.w, a.lora_b, u.lora_b), tiles_m, tiles_n,
            ACT=act, FILL=fill, RANK_A=a.rank, RANK_U=u.rank,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m, X_TMA=x_tma, W_TMA=w_tma,
            PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return h, out_a, out_u
