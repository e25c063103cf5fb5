"""Stage 2, kernels: a packed linear layer at decode, between the full widths of its neighbours.

    y = accumulate + scatter(W x[cols] + b)        scatter: entry r goes to lane rows[r], others 0

W [R, C] holds the kept rows and columns only. Lanes `cols` of x are picked while it is loaded, the
result goes to lanes `rows` of the full-width output, and a residual is added in the same store:
no index_select, no index_copy. The gradients, for completeness, are plain torch, with d = dy[rows]:

    dx[cols] = W^T d      dW = d^T x[cols]      db = colsum(d)      daccumulate = dy

Decode reads every weight once, so the speed is that of reading W: 16-byte loads, many in flight.
One token multiplies on the plain cores, each program a few rows; more tokens go to the matrix units
in tiles of 16. Where rows alone can keep all multiprocessors busy, a row's sum stays in one program
and the layer is one launch. Otherwise columns are split too, and a second kernel adds the splits in
their order. It keeps no counters between launches, as a reduction by the last program to arrive
would: calls on several streams and replays of a CUDA graph cannot disturb each other, an aborted
launch leaves nothing behind, and the same input gives the same bits.

Source: compact decode of FineGates, arXiv 2412.12951.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._common import (
    INTERPRET,
    check_device,
    config_of,
    dot,
    expect,
    expect_matrix,
    expect_operand,
    fp32_precision,
    offsets,
    product,
    refuse_second_derivative,
    round_to,
    rows_of,
)
from ._configs import PackedLinearConfig

LANES = 64  # lanes without a row that one step of a program fills


def packed_linear_ref(x, w, bias=None, *, rows=None, cols=None, out_features=None, accumulate=None):
    """y = accumulate + scatter(W x[cols] + b) in plain torch, in the dtype of x.

    Same arguments and gradients as packed_linear_fn, any floating dtype; fp64 makes it the truth.
    """
    y = F.linear(x if cols is None else x.index_select(-1, cols), w, bias)
    if rows is not None:
        y = y.new_zeros(*y.shape[:-1], out_features).index_copy(-1, rows.long(), y)
    return y if accumulate is None else accumulate + y


@triton.jit
def _store_rows(
    h, tile, rows_ptr, bias_ptr, residual_ptr, y_ptr, t, T, R, N, stride_am, stride_an,
    BLOCK_R: tl.constexpr, LANES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Store h fp32 [BLOCK_R, BLOCK_T], plus bias and residual, to the lanes of row tile `tile`.

    A tile also fills the lanes without a row that follow its own, up to the first row of the next
    tile, with the residual or 0; the first tile fills those before it too. No lane is written
    twice.
    """
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = r < R
    lane = r
    if rows_ptr is not None:
        lane = tl.load(rows_ptr + r, mask=in_rows, other=-1)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + r, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    mask = in_rows[:, None] & (t < T)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offsets(lane, stride_an, t, stride_am)
        h += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = round_to(h, y_ptr.dtype.element_ty, INTERPRETED)
    tl.store(y_ptr + offsets(lane, 1, t, N), y, mask=mask)

    if rows_ptr is not None:
        first = tl.load(rows_ptr + tile * BLOCK_R, mask=tile > 0, other=0)
        last = tl.load(rows_ptr + (tile + 1) * BLOCK_R, mask=(tile + 1) * BLOCK_R < R, other=N)
        for start in range(first, last, LANES):
            n = start + tl.arange(0, LANES)
            has_row = tl.max((n[:, None] == lane[None, :]).to(tl.int32), axis=1)
            empty = ((n < last) & (has_row == 0))[:, None] & (t < T)[None, :]
            fill = tl.zeros([LANES, t.shape[0]], y_ptr.dtype.element_ty)
            if residual_ptr is not None:
                fill = tl.load(residual_ptr + offsets(n, stride_an, t, stride_am), mask=empty)
            tl.store(y_ptr + offsets(n, 1, t, N), fill, mask=empty)


@triton.jit
def _packed_linear_fwd_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [R, C]
    bias_ptr,  # [R] or None
    rows_ptr,  # [R] or None
    cols_ptr,  # [C] or None
    residual_ptr,  # [T, N] or None
    y_ptr,  # [T, N], dense
    part_ptr,  # fp32 [splits, T, R], dense, or None: W x[cols] over the columns of each split
    T,
    R,
    N,
    vectors,  # C / VEC
    stride_xm,
    stride_xk,
    vectors_wr,  # row stride of w / VEC
    stride_wc,
    stride_am,
    stride_an,
    tiles_r,
    tiles_t,
    steps,  # of BLOCK_C columns, in each split
    VEC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles_r
    tile_t = pid // tiles_r % tiles_t
    split = (pid // tiles_r // tiles_t).to(tl.int64)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows, in_tokens = r < R, t < T
    # C and the row stride come in units of VEC, so that the compiler sees how wide loads can be.
    C = tl.cast(vectors, tl.int64) * VEC
    w_rows = w_ptr + (r.to(tl.int64) * vectors_wr)[:, None] * VEC
    x_rows = x_ptr + t.to(tl.int64) * stride_xm

    if BLOCK_T == 1:
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    else:
        acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    begin = split * steps * BLOCK_C
    for start in tl.range(
        begin, tl.minimum(C, begin + steps * BLOCK_C), BLOCK_C, num_stages=STAGES
    ):
        c = start + tl.arange(0, BLOCK_C)
        in_cols = c < C
        w_mask = in_rows[:, None] & in_cols[None, :]
        w = tl.load(w_rows + c[None, :] * stride_wc, mask=w_mask, other=0.0)
        k = c
        if cols_ptr is not None:
            k = tl.load(cols_ptr + c, mask=in_cols, other=0).to(tl.int64)
        if BLOCK_T == 1:
            x_ptrs = x_ptr + tile_t.to(tl.int64) * stride_xm + k * stride_xk
            x = tl.load(x_ptrs, mask=in_cols, other=0.0)
            acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        else:
            x_mask = in_cols[:, None] & in_tokens[None, :]
            x = tl.load(x_rows[None, :] + k[:, None] * stride_xk, mask=x_mask, other=0.0)
            acc = dot(w, x, acc, PRECISION, INTERPRETED)
    if BLOCK_T == 1:
        acc = tl.sum(acc, axis=1)[:, None]

    if part_ptr is None:
        _store_rows(
            acc, tile, rows_ptr, bias_ptr, residual_ptr, y_ptr, t, T, R, N, stride_am, stride_an,
            BLOCK_R, LANES, INTERPRETED,
        )  # fmt: skip
    else:
        mask = in_rows[:, None] & in_tokens[None, :]
        tl.store(part_ptr + offsets(r, 1, split * T + t, R), acc, mask=mask)


@triton.jit
def _packed_linear_fwd_sum_kernel(
    part_ptr,  # fp32 [splits, T, R], dense
    bias_ptr,
    rows_ptr,
    residual_ptr,
    y_ptr,
    T,
    R,
    N,
    stride_am,
    stride_an,
    tiles_r,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles_r
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    t = pid // tiles_r * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (r < R)[:, None] & (t < T)[None, :]
    h = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    part_ptrs = part_ptr + offsets(r, 1, t, R)
    for split in tl.static_range(SPLITS):
        h += tl.load(part_ptrs + tl.cast(split, tl.int64) * T * R, mask=mask, other=0.0)
    _store_rows(
        h, tile, rows_ptr, bias_ptr, residual_ptr, y_ptr, t, T, R, N, stride_am, stride_an,
        BLOCK_R, LANES, INTERPRETED,
    )  # fmt: skip


def _vector(w):
    """Elements that one load of w takes: 16 bytes where each row has a multiple of that."""
    return math.gcd(16 // w.element_size(), w.shape[1], w.stride(0)) if w.stride(1) == 1 else 1


def _launch(x, w, bias, rows, cols, residual, y, config):
    """Launch the kernels: x [T, K], w [R, C], residual [T, N] or None, y [T, N] dense."""
    (t, n), (r, c) = y.shape, w.shape
    tiles_r, tiles_t = triton.cdiv(r, config.block_r), triton.cdiv(t, config.block_t)
    if t == 0 or n == 0:
        return
    steps = triton.cdiv(triton.cdiv(c, config.block_c), config.splits)
    splits = triton.cdiv(triton.cdiv(c, config.block_c), steps) if c else 1
    part = x.new_empty(splits, t, r, dtype=torch.float32) if splits > 1 else None
    strides = (0, 0) if residual is None else residual.stride()
    vec = _vector(w)
    _packed_linear_fwd_kernel[(tiles_r * tiles_t * splits,)](
        x, w, bias, rows, cols, residual, y, part, t, r, n, c // vec, *x.stride(),
        w.stride(0) // vec, w.stride(1), *strides, tiles_r, tiles_t, steps,
        VEC=vec, BLOCK_T=config.block_t, BLOCK_R=config.block_r, BLOCK_C=config.block_c,
        LANES=LANES, STAGES=config.num_stages, PRECISION=fp32_precision(), INTERPRETED=INTERPRET,
        num_warps=config.num_warps,
    )  # fmt: skip
    if part is not None:
        block_r, block_t = 16, min(16, config.block_t)
        tiles_r, tiles_t = triton.cdiv(r, block_r), triton.cdiv(t, block_t)
        _packed_linear_fwd_sum_kernel[(tiles_r * tiles_t,)](
            part, bias, rows, residual, y, t, r, n, *strides, tiles_r, SPLITS=splits,
            BLOCK_T=block_t, BLOCK_R=block_r, LANES=LANES, INTERPRETED=INTERPRET, num_warps=2,
        )  # fmt: skip


def _check(x, w, bias, rows, cols, accumulate, out_features):
    """Raise ValueError naming the argument, what was expected and what came; gives N."""

    expect_operand("x", x)
    r, c = expect_matrix("w", w)
    index, floating = (torch.int32, torch.int64), (x.dtype,)
    expect("w", w, (r, c), floating, x)
    expect("bias", bias, (r,), floating, x)
    expect("rows", rows, (r,), index, x)
    expect("cols", cols, (c,), index, x)
    if cols is None:
        expect("x", x, (*x.shape[:-1], c), floating, x)
    elif c > x.shape[-1]:
        raise ValueError(f"cols: expected at most {x.shape[-1]} lanes (those of x), got {c}")
    if rows is None and out_features not in (None, r):
        raise ValueError(f"out_features: expected None or {r} without rows, got {out_features}")
    if rows is not None and (out_features is None or out_features < r):
        raise ValueError(f"out_features: expected at least {r} with rows, got {out_features}")
    n = r if rows is None else out_features
    expect("accumulate", accumulate, (*x.shape[:-1], n), floating, x)
    return n


_FORWARD = (
    "(Tensor x, Tensor w, Tensor? bias, Tensor? rows, Tensor? cols, Tensor? accumulate, "
    "int? out_features, int[] config) -> Tensor"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? w, Tensor? rows, Tensor? cols, int in_features, bool[] needs) "
    "-> Tensor[]"
)


@torch.library.custom_op("gatepack::packed_linear", mutates_args=(), schema=_FORWARD)
def _packed_linear(x, w, bias, rows, cols, accumulate, out_features, config):
    n = _check(x, w, bias, rows, cols, accumulate, out_features)
    check_device("packed_linear", x)
    y = x.new_empty(*x.shape[:-1], n)
    if w.shape[0] == 0:
        return y.zero_() if accumulate is None else y.copy_(accumulate)
    with torch.cuda.device_of(x):
        x2, residual = rows_of(x), None if accumulate is None else rows_of(accumulate)
        shape = (x2.shape[0], *w.shape)
        chosen = config_of(PackedLinearConfig, "packed_linear", config, shape, x.dtype, x.device)
        bias, rows, cols = (v if v is None else v.contiguous() for v in (bias, rows, cols))
        _launch(x2, w, bias, rows, cols, residual, rows_of(y), chosen)
    return y


@_packed_linear.register_fake
def _(x, w, bias, rows, cols, accumulate, out_features, config):
    return x.new_empty(*x.shape[:-1], _check(x, w, bias, rows, cols, accumulate, out_features))


@torch.library.custom_op("gatepack::packed_linear_backward", mutates_args=(), schema=_BACKWARD)
def _packed_linear_backward(dy, x, w, rows, cols, in_features, needs):
    """The gradients that `needs` asks for, in the order x, w, bias."""
    need_x, need_w, need_bias = needs
    d = rows_of(dy) if rows is None else rows_of(dy).index_select(1, rows)
    grads = []
    if need_x:
        dx = product(d, w)
        if cols is not None:
            dx = dx.new_zeros(dx.shape[0], in_features).index_copy_(1, cols.long(), dx)
        grads.append(dx.view(*dy.shape[:-1], in_features))
    if need_w:
        kept = rows_of(x) if cols is None else rows_of(x).index_select(1, cols)
        grads.append(product(d.t(), kept))
    if need_bias:
        grads.append(d.sum(0, dtype=d.dtype))  # else autocast's
    return grads


@_packed_linear_backward.register_fake
def _(dy, x, w, rows, cols, in_features, needs):
    r = dy.shape[-1] if rows is None else rows.shape[0]
    grads = (
        lambda: dy.new_empty(*dy.shape[:-1], in_features),
        lambda: dy.new_empty(r, x.shape[-1] if cols is None else cols.shape[0]),
        lambda: dy.new_empty(r),
    )
    return [grad() for grad, needed in zip(grads, needs, strict=True) if needed]


def _save_for_backward(ctx, inputs, output):
    x, w, bias, rows, cols, accumulate, _, _ = inputs
    needs = [inputs[i] is not None and ctx.needs_input_grad[i] for i in range(3)]
    need_x, need_w, _ = needs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if need_w else None, w if need_x else None, rows, cols)
    ctx.args = x.shape[-1], needs
    ctx.need_accumulate = accumulate is not None and ctx.needs_input_grad[5]


def _backward(ctx, dy):
    if dy is None:
        return (None,) * 8
    grads = iter(torch.ops.gatepack.packed_linear_backward(dy, *ctx.saved_tensors, *ctx.args))
    dx, dw, db = (next(grads) if needed else None for needed in ctx.args[1])
    return dx, dw, db, None, None, dy if ctx.need_accumulate else None, None, None


_packed_linear.register_autograd(_backward, setup_context=_save_for_backward)
_packed_linear_backward.register_autograd(refuse_second_derivative("packed_linear"))


def packed_linear_fn(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    cols: torch.Tensor | None = None,
    out_features: int | None = None,
    accumulate: torch.Tensor | None = None,
    config: PackedLinearConfig | None = None,
) -> torch.Tensor:
    """y = accumulate + scatter(W x[cols] + b): a packed linear between full widths, for decode.

    x [*, K], w [R, C], bias [R], accumulate [*, N] (left as it is): fp32, bf16 or fp16, one dtype
    for all, any strides. rows [R], cols [C]: int32 or int64, the kept lanes of the N outputs and K
    inputs, ascending and unique; None = all. y [*, N] contiguous, in x.dtype, with N = out_features
    where rows are given and R otherwise. Lanes without a row get 0, or the residual unchanged; the
    residual is added before the one rounding to x.dtype.

    Right for any number of tokens T, fast for T <= 16: beyond, W is read once per 64 tokens. Loads
    of W take 16 bytes where its last stride is 1 and C and its row stride are multiples of 8 (16
    bit) or 4 (fp32): pack to a width_multiple of 8 or more. fp32 products of T > 1 follow
    torch.get_float32_matmul_precision(). config None takes the choice of choose_config.

    Gradients flow to x, w, bias and accumulate, by plain torch: this is an op for inference.
    Refuses, with ValueError: shapes, dtypes or devices that do not fit, rows without out_features,
    CPU tensors outside Triton's interpreter. RuntimeError: a second derivative. That rows and cols
    ascend and lie in range is not checked, as the host would have to wait for it.
    """
    ints = [] if config is None else config.to_ints()
    return torch.ops.gatepack.packed_linear(x, w, bias, rows, cols, accumulate, out_features, ints)
