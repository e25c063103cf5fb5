"""Stage 2, kernels: attention over open heads, forward and backward, a tile of scores at a time.

    forward     o = z_h * h,  h = softmax(scale q k^T + mask) v      one program: head, query block
    dq          delta = rowsum(do * h),  dz_h = sum(delta),  dq      one program: head, query block
    dk, dv      sums over the open query heads of a kv head          one program: kv head, key block

With p the probabilities and dp = do v^T, ds = p * (dp - delta) before the gate, so that

    dq = z_h scale ds k        dk = sum_h z_h scale ds^T q        dv = sum_h z_h p^T do

Queries are numbered so that the last query stands at the last key: query i of S at position
i + Skv - S. Causal attention shows it the keys up to that position, a window of W only the last W
of those. Blocks of keys (for dk, dv: of queries) that nobody sees are left out, blocks that
everybody sees are computed without a mask; both come from the ranges below.

Statistics are fp32 in base 2: lse = log2(sum exp2(log2(e) scale q k^T)), +inf for a query without
keys, which makes its output and its part of every gradient 0. Every sum has a fixed order.
"""

import triton
import triton.language as tl

from ._common import dot, offsets, round_to

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _key_bounds_kernel(
    key_mask_ptr,  # uint8 [B, Skv]
    bounds_ptr,  # int32 [B, 2]: first attended key, last one + 1; (Skv, 0) if there is none
    SKV,
    stride_mb,
    stride_mk,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    first = tl.full([], SKV, tl.int32)
    last = tl.full([], 0, tl.int32)
    for start in range(0, SKV, BLOCK):
        key = start + tl.arange(0, BLOCK)
        ptrs = key_mask_ptr + b.to(tl.int64) * stride_mb + key.to(tl.int64) * stride_mk
        attended = tl.load(ptrs, mask=key < SKV, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(attended, key, SKV), axis=0))
        last = tl.maximum(last, tl.max(tl.where(attended, key + 1, 0), axis=0))
    tl.store(bounds_ptr + 2 * b, first)
    tl.store(bounds_ptr + 2 * b + 1, last)


@triton.jit
def _open_head(slot, open_ptr):
    """The head in a slot of the open set, int64; one slot past the last is still inside."""
    head = slot
    if open_ptr is not None:
        head = tl.load(open_ptr + slot)
    return head.to(tl.int64)


@triton.jit
def _query_program(tiles_q, H, open_ptr, z_ptr):
    """What this program computes: a block of queries, a head and a sequence; whether the head is
    open, and its gate. Slots past the last open head have programs too, with nothing to do."""
    pid = tl.program_id(0)
    # Under causal the last block of queries sees the most keys: it starts first.
    tile = tiles_q - 1 - pid % tiles_q
    slot = pid // tiles_q % H
    head = _open_head(slot, open_ptr)
    is_open = slot >= 0
    z = 1.0
    if open_ptr is not None:
        is_open = slot < tl.load(open_ptr + H)
        z = tl.load(z_ptr + head)
    return tile, head, pid // tiles_q // H, is_open, z


@triton.jit
def _open_group(head0, z_ptr, H, GROUP: tl.constexpr, BLOCK_H: tl.constexpr):
    """Heads head0 .. head0 + GROUP - 1: where they begin in the open set, how many are open, and
    their largest gate (1 if none is open)."""
    slot = head0
    n_open = head0 * 0 + GROUP
    top_z = 1.0
    if z_ptr is not None:
        head = tl.arange(0, BLOCK_H)
        z = tl.load(z_ptr + head, mask=head < H, other=0.0)
        in_group = (head >= head0) & (head < head0 + GROUP)
        slot = tl.sum(((z != 0) & (head < head0)).to(tl.int32), axis=0)
        n_open = tl.sum(((z != 0) & in_group).to(tl.int32), axis=0)
        top_z = tl.max(tl.where(in_group, tl.abs(z), 0.0), axis=0)
        top_z = tl.where(top_z > 0, top_z, 1.0)
    return slot, n_open, top_z


@triton.jit
def _sequence(b, cu_ptr, size):
    """First token of sequence b in its tensor (0 where sequences have an own dimension), length."""
    start = b * 0
    if cu_ptr is not None:
        start = tl.load(cu_ptr + b)
        size = tl.load(cu_ptr + b + 1) - start
    return start.to(tl.int64), size


@triton.jit
def _bounds(b, bounds_ptr, key_len):
    """Range of keys outside of which the key mask hides all."""
    first = b * 0
    last = first + key_len
    if bounds_ptr is not None:
        first = tl.load(bounds_ptr + 2 * b)
        last = tl.load(bounds_ptr + 2 * b + 1)
    return first, last


@triton.jit
def _key_range(
    row0, offset, first, last, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK_ALL: tl.constexpr
):  # fmt: skip
    """(start, full, stop): of the keys first .. last - 1, those that a row in row0 .. row0 +
    BLOCK_Q - 1 sees are in start .. stop - 1, and all rows see start .. full - 1. start and full
    are multiples of BLOCK_K; with MASK_ALL they are equal."""
    start = first
    full = last
    stop = last
    if CAUSAL:
        full = tl.minimum(full, tl.maximum(row0 + offset + 1, 0))
        stop = tl.minimum(stop, tl.maximum(row0 + offset + BLOCK_Q, 0))
    if WINDOW:
        start = tl.maximum(start, row0 + offset + 1 - WINDOW)
    start = start // BLOCK_K * BLOCK_K
    full = start if MASK_ALL else tl.maximum(full // BLOCK_K * BLOCK_K, start)
    return start, full, stop


@triton.jit
def _query_range(
    key0, offset, q_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr
):  # fmt: skip
    """(start, full, stop): the queries that see one of the keys key0 .. key0 + BLOCK_K - 1 are in
    start .. stop - 1, and full .. stop - 1 see all. start and full are multiples of BLOCK_Q; with
    a window full is stop."""
    start = key0 * 0
    full = start
    stop = start + q_len
    if CAUSAL:
        start = tl.maximum(key0 - offset, 0) // BLOCK_Q * BLOCK_Q
        full = tl.cdiv(tl.maximum(key0 + BLOCK_K - 1 - offset, 0), BLOCK_Q) * BLOCK_Q
    if WINDOW:
        stop = tl.minimum(stop, tl.maximum(key0 + BLOCK_K - 1 + WINDOW - offset, 0))
        full = stop
    return start, full, stop


@triton.jit
def _visible(position, key, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query at `position` sees `key`; both broadcast against each other."""
    seen = key >= 0
    if WINDOW:
        seen = (position - key).to(tl.uint32, bitcast=True) < WINDOW
    elif CAUSAL:
        seen = key <= position
    return seen


@triton.jit
def _load_keys(
    k_base, v_base, key, key_mask_base, k_len, stride_ks, stride_kd, stride_vs, stride_vd,
    stride_mk, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """k [BLOCK_K, BLOCK_D], v [BLOCK_K, BLOCK_DV], attended [BLOCK_K]; hidden keys are 0."""
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    k_mask = (d < D)[None, :]
    v_mask = (d_v < DV)[None, :]
    attended = key < k_len
    if MASKED:
        if key_mask_base is not None:
            mask_ptrs = key_mask_base + key.to(tl.int64) * stride_mk
            attended = tl.load(mask_ptrs, mask=attended, other=0) != 0
        k_mask = k_mask & attended[:, None]
        v_mask = v_mask & attended[:, None]
    k = tl.load(k_base + offsets(key, stride_ks, d, stride_kd), mask=k_mask, other=0.0)
    v = tl.load(v_base + offsets(key, stride_vs, d_v, stride_vd), mask=v_mask, other=0.0)
    return k, v, attended


@triton.jit
def _gated_attention_fwd_kernel(
    q_ptr,  # [B, S, H, D]; with cu_q_ptr [T, H, D]
    k_ptr,  # [B, Skv, Hkv, D]; with cu_k_ptr [Tkv, Hkv, D]
    v_ptr,  # as k, with DV lanes
    z_ptr,  # fp32 [H] or None
    open_ptr,  # open set of z
    key_mask_ptr,  # uint8 [B, Skv] or None: not 0 = attend
    bounds_ptr,  # int32 [B, 2]: range of the keys that the mask shows
    cu_q_ptr,  # int32 [B + 1] or None: first token of each sequence
    cu_k_ptr,
    o_ptr,  # as q, with DV lanes: z_h * h
    h_ptr,  # as o, or None
    lse_ptr,  # fp32 [B, H, S]; with cu_q_ptr [H, T]
    S, SKV, H, tiles_q, scale,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh,
    stride_lb, stride_lh,
    stride_mb, stride_mk,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile, head, b, is_open, z = _query_program(tiles_q, H, open_ptr, z_ptr)
    batch = b.to(tl.int64)
    q_start, q_len = _sequence(b, cu_q_ptr, S)
    k_start, k_len = _sequence(b, cu_k_ptr, SKV)
    first, last = _bounds(b, bounds_ptr, k_len)

    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_rows = row < q_len
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    MASK_ALL: tl.constexpr = WINDOW > 0 or key_mask_ptr is not None
    start, full, stop = _key_range(
        tile * BLOCK_Q, k_len - q_len, first, last, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K, MASK_ALL
    )
    stop = tl.where(is_open & (tile * BLOCK_Q < q_len), stop, 0)
    position = row + (k_len - q_len)
    q_base = q_ptr + batch * stride_qb + q_start * stride_qs + head * stride_qh
    k_base = k_ptr + batch * stride_kb + k_start * stride_ks + head // GROUP * stride_kh
    v_base = v_ptr + batch * stride_vb + k_start * stride_vs + head // GROUP * stride_vh
    key_mask_base = None if key_mask_ptr is None else key_mask_ptr + batch * stride_mb
    q_mask = (in_rows & is_open)[:, None] & (d < D)[None, :]
    q = tl.load(q_base + offsets(row, stride_qs, d, stride_qd), mask=q_mask, other=0.0)

    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    scale2 = scale * LOG2E
    for masked in tl.static_range(2):
        if masked or not MASK_ALL:
            begin = full if masked else start
            end = stop if masked else tl.minimum(full, stop)
            for key0 in range(begin, end, BLOCK_K):
                key = key0 + tl.arange(0, BLOCK_K)
                k, v, attended = _load_keys(
                    k_base, v_base, key, key_mask_base, k_len, stride_ks, stride_kd, stride_vs,
                    stride_vd, stride_mk, D, DV, BLOCK_D, BLOCK_DV, masked == 1,
                )  # fmt: skip
                scores = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
                scores = dot(q, tl.trans(k), scores, PRECISION, INTERPRETED)
                if masked:
                    seen = _visible(position[:, None], key[None, :], CAUSAL, WINDOW)
                    scores = tl.where(seen & attended[None, :], scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, axis=1) * scale2)
                shift = new_top
                if masked:
                    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2(scores * scale2 - shift[:, None])
                decay = tl.exp2(top - shift)
                total = total * decay + tl.sum(p, axis=1)
                p = round_to(p, v.dtype, INTERPRETED)
                acc = dot(p, v, acc * decay[:, None], PRECISION, INTERPRETED)
                top = new_top

    keyless = total == 0
    total = tl.where(keyless, 1.0, total)
    h = acc / total[:, None]
    lse = tl.where(keyless, float("inf"), top + tl.log2(total))
    lse_base = lse_ptr + batch * stride_lb + head * stride_lh + q_start
    tl.store(lse_base + row, lse, mask=in_rows)
    out = batch * stride_ob + q_start * stride_os + head * stride_oh
    out += offsets(row, stride_os, d_v, 1)
    out_mask = in_rows[:, None] & (d_v < DV)[None, :]
    tl.store(o_ptr + out, round_to(h * z, o_ptr.dtype.element_ty, INTERPRETED), mask=out_mask)
    if h_ptr is not None:
        tl.store(h_ptr + out, round_to(h, h_ptr.dtype.element_ty, INTERPRETED), mask=out_mask)


@triton.jit
def _gated_attention_bwd_dq_kernel(
    do_ptr,  # as o
    q_ptr,
    k_ptr,
    v_ptr,
    z_ptr,
    open_ptr,
    key_mask_ptr,
    bounds_ptr,
    cu_q_ptr,
    cu_k_ptr,
    h_ptr,  # dense, as o: h, or with H_IS_O z_h * h
    lse_ptr,
    delta_ptr,  # as lse: rowsum(do * h), written for open heads
    dz_ptr,  # fp32 [H, B * tiles_q] or None: sum of delta over the rows of each block
    dq_ptr,  # as q, or None
    S, SKV, H, tiles_q,
    blocks,  # B * tiles_q
    scale,
    stride_dob, stride_dos, stride_doh, stride_dod,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh,
    stride_dqb, stride_dqs, stride_dqh, stride_dqd,
    stride_lb, stride_lh,
    stride_mb, stride_mk,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, H_IS_O: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile, head, b, is_open, z = _query_program(tiles_q, H, open_ptr, z_ptr)
    batch = b.to(tl.int64)
    q_start, q_len = _sequence(b, cu_q_ptr, S)
    k_start, k_len = _sequence(b, cu_k_ptr, SKV)

    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_rows = row < q_len
    live = (in_rows & is_open)[:, None]
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    do_base = do_ptr + batch * stride_dob + q_start * stride_dos + head * stride_doh
    do_mask = live & (d_v < DV)[None, :]
    do = tl.load(do_base + offsets(row, stride_dos, d_v, stride_dod), mask=do_mask, other=0.0)
    h_base = h_ptr + batch * stride_ob + q_start * stride_os + head * stride_oh
    h = tl.load(h_base + offsets(row, stride_os, d_v, 1), mask=do_mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * h.to(tl.float32), axis=1)
    if H_IS_O:
        delta = delta / tl.where(is_open, z, 1.0)
    stats = batch * stride_lb + head * stride_lh + q_start + row
    tl.store(delta_ptr + stats, delta, mask=in_rows)
    if dz_ptr is not None:
        dz_ptrs = dz_ptr + head * blocks + batch * tiles_q + tile
        tl.store(dz_ptrs, tl.sum(delta, axis=0))

    if dq_ptr is not None:
        first, last = _bounds(b, bounds_ptr, k_len)
        MASK_ALL: tl.constexpr = WINDOW > 0 or key_mask_ptr is not None
        start, full, stop = _key_range(
            tile * BLOCK_Q, k_len - q_len, first, last, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K, MASK_ALL
        )
        stop = tl.where(is_open & (tile * BLOCK_Q < q_len), stop, 0)
        position = row + (k_len - q_len)
        q_base = q_ptr + batch * stride_qb + q_start * stride_qs + head * stride_qh
        k_base = k_ptr + batch * stride_kb + k_start * stride_ks + head // GROUP * stride_kh
        v_base = v_ptr + batch * stride_vb + k_start * stride_vs + head // GROUP * stride_vh
        key_mask_base = None if key_mask_ptr is None else key_mask_ptr + batch * stride_mb
        q_mask = live & (d < D)[None, :]
        q = tl.load(q_base + offsets(row, stride_qs, d, stride_qd), mask=q_mask, other=0.0)
        lse = tl.load(lse_ptr + stats, mask=in_rows, other=float("inf"))

        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        scale2 = scale * LOG2E
        for masked in tl.static_range(2):
            if masked or not MASK_ALL:
                begin = full if masked else start
                end = stop if masked else tl.minimum(full, stop)
                for key0 in range(begin, end, BLOCK_K):
                    key = key0 + tl.arange(0, BLOCK_K)
                    k, v, attended = _load_keys(
                        k_base, v_base, key, key_mask_base, k_len, stride_ks, stride_kd, stride_vs,
                        stride_vd, stride_mk, D, DV, BLOCK_D, BLOCK_DV, masked == 1,
                    )  # fmt: skip
                    scores = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
                    scores = dot(q, tl.trans(k), scores, PRECISION, INTERPRETED)
                    p = tl.exp2(scores * scale2 - lse[:, None])
                    if masked:
                        seen = _visible(position[:, None], key[None, :], CAUSAL, WINDOW)
                        p = tl.where(seen & attended[None, :], p, 0.0)
                    dp = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
                    dp = dot(do, tl.trans(v), dp, PRECISION, INTERPRETED)
                    ds = round_to(p * (dp - delta[:, None]), k.dtype, INTERPRETED)
                    dq = dot(ds, k, dq, PRECISION, INTERPRETED)
        dq_base = dq_ptr + batch * stride_dqb + q_start * stride_dqs + head * stride_dqh
        tl.store(
            dq_base + offsets(row, stride_dqs, d, stride_dqd),
            round_to(dq * (scale * z), dq_ptr.dtype.element_ty, INTERPRETED),
            mask=in_rows[:, None] & (d < D)[None, :],
        )


@triton.jit
def _gated_attention_bwd_dkv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    z_ptr,
    open_ptr,
    key_mask_ptr,
    bounds_ptr,
    cu_q_ptr,
    cu_k_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,  # as k
    dv_ptr,  # as v
    S, SKV, H, kv_heads, tiles_k, scale,
    stride_dob, stride_dos, stride_doh, stride_dod,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_dkb, stride_dks, stride_dkh, stride_dkd,
    stride_dvb, stride_dvs, stride_dvh, stride_dvd,
    stride_lb, stride_lh,
    stride_mb, stride_mk,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # Under causal the first block of keys is seen by the most queries: it starts first.
    tile = pid % tiles_k
    kv_head = pid // tiles_k % kv_heads
    b = pid // tiles_k // kv_heads
    batch = b.to(tl.int64)
    q_start, q_len = _sequence(b, cu_q_ptr, S)
    k_start, k_len = _sequence(b, cu_k_ptr, SKV)
    first, last = _bounds(b, bounds_ptr, k_len)
    key0 = tile * BLOCK_K
    offset = k_len - q_len
    start, full, stop = _query_range(key0, offset, q_len, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K)
    first_slot, n_open, top_z = _open_group(kv_head * GROUP, z_ptr, H, GROUP, BLOCK_H)
    attends = (key0 < last) & (key0 + BLOCK_K > first) & (n_open > 0)
    stop = tl.where(attends, stop, 0)

    key = key0 + tl.arange(0, BLOCK_K)
    key_mask_base = None if key_mask_ptr is None else key_mask_ptr + batch * stride_mb
    k, v, attended = _load_keys(
        k_ptr + batch * stride_kb + k_start * stride_ks + kv_head.to(tl.int64) * stride_kh,
        v_ptr + batch * stride_vb + k_start * stride_vs + kv_head.to(tl.int64) * stride_vh,
        key, key_mask_base, tl.where(attends, k_len, 0), stride_ks, stride_kd, stride_vs, stride_vd,
        stride_mk, D, DV, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    scale2 = scale * LOG2E
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    for unmasked in tl.static_range(2):
        if (CAUSAL and not unmasked) or (unmasked and not WINDOW):
            begin = full if unmasked else start
            end = stop if unmasked else tl.minimum(full, stop)
            # All blocks of all open heads in one loop, so that its pipeline never drains.
            row0 = begin
            slot = first_slot
            head = _open_head(slot, open_ptr)
            for _ in range(0, n_open * tl.cdiv(tl.maximum(end - begin, 0), BLOCK_Q)):
                q_base = q_ptr + batch * stride_qb + q_start * stride_qs + head * stride_qh
                do_base = do_ptr + batch * stride_dob + q_start * stride_dos + head * stride_doh
                stats = batch * stride_lb + head * stride_lh + q_start
                row = row0 + tl.arange(0, BLOCK_Q)
                in_rows = row < q_len
                q_ptrs = q_base + offsets(row, stride_qs, d, stride_qd)
                q = tl.load(q_ptrs, mask=in_rows[:, None] & (d < D)[None, :], other=0.0)
                do_ptrs = do_base + offsets(row, stride_dos, d_v, stride_dod)
                do = tl.load(do_ptrs, mask=in_rows[:, None] & (d_v < DV)[None, :], other=0.0)
                lse = tl.load(lse_ptr + stats + row, mask=in_rows, other=float("inf"))
                scores = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
                scores = dot(k, tl.trans(q), scores, PRECISION, INTERPRETED)
                p = tl.exp2(scores * scale2 - lse[None, :])
                if not unmasked:
                    seen = _visible((row + offset)[None, :], key[:, None], CAUSAL, WINDOW)
                    p = tl.where(seen, p, 0.0)
                if z_ptr is not None:
                    # Relative to the largest gate: fp16 would lose z * p of a tiny one.
                    p *= tl.load(z_ptr + head) / top_z
                dv = dot(round_to(p, do.dtype, INTERPRETED), do, dv, PRECISION, INTERPRETED)
                dp = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
                dp = dot(v, tl.trans(do), dp, PRECISION, INTERPRETED)
                # Loaded this late, delta is not in registers beside lse.
                delta = tl.load(delta_ptr + stats + row, mask=in_rows, other=0.0)
                ds = round_to(p * (dp - delta[None, :]), q.dtype, INTERPRETED)
                dk = dot(ds, q, dk, PRECISION, INTERPRETED)
                row0 += BLOCK_Q
                head_ends = row0 >= end
                row0 = tl.where(head_ends, begin, row0)
                slot += head_ends.to(tl.int32)
                head = _open_head(slot, open_ptr)

    # A hidden key was loaded as 0, whose probabilities are wrong and stay in its own row.
    dk = tl.where(attended[:, None], dk * (scale * top_z), 0.0)
    dv = tl.where(attended[:, None], dv * top_z, 0.0)
    dk_base = dk_ptr + batch * stride_dkb + k_start * stride_dks + kv_head.to(tl.int64) * stride_dkh
    tl.store(
        dk_base + offsets(key, stride_dks, d, stride_dkd),
        round_to(dk, dk_ptr.dtype.element_ty, INTERPRETED),
        mask=(key < k_len)[:, None] & (d < D)[None, :],
    )
    dv_base = dv_ptr + batch * stride_dvb + k_start * stride_dvs + kv_head.to(tl.int64) * stride_dvh
    tl.store(
        dv_base + offsets(key, stride_dvs, d_v, stride_dvd),
        round_to(dv, dv_ptr.dtype.element_ty, INTERPRETED),
        mask=(key < k_len)[:, None] & (d_v < DV)[None, :],
    )
