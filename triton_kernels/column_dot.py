"""Stage 2, kernels: the dot product of two matrices, column by column.

    y[n] = sum_t a[t, n] b[t, n]        da = dy * b        db = dy * a

A program adds up `span` rows of a few hundred columns, in as many partial sums as its tile has
rows; the programs' sums are then added in a fixed order. The gradient of a gate that multiplies
columns is such a product.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    DTYPES,
    INTERPRET,
    check_device,
    config_of,
    offsets,
    refuse_second_derivative,
    round_to,
    rows_of,
)
from ._configs import Panel


def column_dot_ref(a, b):
    """sum_t a[t, n] b[t, n] in plain torch, at least in fp32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (rows_of(a).to(dtype) * rows_of(b).to(dtype)).sum(0)


@triton.jit
def _column_dot_fwd_kernel(
    a_ptr,  # [T, N]
    b_ptr,  # [T, N]
    out_ptr,  # fp32 [splits, N]: sums over SPAN rows
    T,
    N,
    stride_at,
    stride_an,
    stride_bt,
    stride_bn,
    tiles_n,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = (tl.program_id(0) // tiles_n).to(tl.int64)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(split * SPAN, tl.minimum(T, split * SPAN + SPAN), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < T)[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + offsets(t, stride_at, n, stride_an), mask=mask, other=0.0)
        b = tl.load(b_ptr + offsets(t, stride_bt, n, stride_bn), mask=mask, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out_ptr + split * N + n, tl.sum(total, axis=0), mask=n < N)


@triton.jit
def _column_dot_bwd_kernel(
    dy_ptr,  # fp32 [N]
    a_ptr,  # [T, N]
    b_ptr,  # [T, N]
    da_ptr,  # [T, N], dense, or None
    db_ptr,  # [T, N], dense, or None
    T,
    N,
    stride_dy,
    stride_at,
    stride_an,
    stride_bt,
    stride_bn,
    tiles_n,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    t = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (t < T)[:, None] & (n < N)[None, :]
    dy = tl.load(dy_ptr + n.to(tl.int64) * stride_dy, mask=n < N, other=0.0)[None, :]
    out = offsets(t, N, n, 1)
    if da_ptr is not None:
        b = tl.load(b_ptr + offsets(t, stride_bt, n, stride_bn), mask=mask, other=0.0)
        da = round_to(dy * b.to(tl.float32), da_ptr.dtype.element_ty, INTERPRETED)
        tl.store(da_ptr + out, da, mask=mask)
    if db_ptr is not None:
        a = tl.load(a_ptr + offsets(t, stride_at, n, stride_an), mask=mask, other=0.0)
        db = round_to(dy * a.to(tl.float32), db_ptr.dtype.element_ty, INTERPRETED)
        tl.store(db_ptr + out, db, mask=mask)


def _check(a, b):
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected dtype float32, bfloat16 or float16, got {tensor.dtype}"
            )
    if a.dim() < 1:
        raise ValueError("a: expected at least one dimension, got a scalar")
    if b.shape != a.shape:
        raise ValueError(f"b: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"b: expected device {a.device} (that of a), got {b.device}")


def _panel(config, rows):
    return config_of(Panel, "column_dot", config, tuple(rows.shape), rows.dtype, rows.device)


@torch.library.custom_op(
    "gatepack::column_dot",
    mutates_args=(),
    schema="(Tensor a, Tensor b, int[] config) -> Tensor",
)
def _column_dot(a, b, config):
    _check(a, b)
    check_device("column_dot", a)
    a, b = rows_of(a), rows_of(b)
    t, n = a.shape
    if t == 0 or n == 0:
        return a.new_zeros(n, dtype=torch.float32)
    panel = _panel(config, a)
    splits, tiles_n = triton.cdiv(t, panel.span), triton.cdiv(n, panel.columns)
    partial = a.new_empty(splits, n, dtype=torch.float32)
    with torch.cuda.device_of(a):
        _column_dot_fwd_kernel[(splits * tiles_n,)](
            a, b, partial, t, n, *a.stride(), *b.stride(), tiles_n,
            SPAN=panel.span, BLOCK_T=panel.rows, BLOCK_N=panel.columns, num_warps=panel.num_warps,
        )  # fmt: skip
    return partial.sum(0)


@_column_dot.register_fake
def _(a, b, config):
    _check(a, b)
    return a.new_empty(a.shape[-1], dtype=torch.float32)


@torch.library.custom_op(
    "gatepack::column_dot_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor a, Tensor b, bool need_a, bool need_b, int[] config) -> Tensor[]",
)
def _column_dot_backward(dy, a, b, need_a, need_b, config):
    """da and db, those that are needed."""
    shape, a, b = a.shape, rows_of(a), rows_of(b)
    t, n = a.shape
    da = a.new_empty(t, n) if need_a else None
    db = b.new_empty(t, n) if need_b else None
    if t and n:
        panel = _panel(config, a)
        tiles_t, tiles_n = triton.cdiv(t, panel.rows), triton.cdiv(n, panel.columns)
        with torch.cuda.device_of(a):
            _column_dot_bwd_kernel[(tiles_t * tiles_n,)](
                dy, a, b, da, db, t, n, dy.stride(0), *a.stride(), *b.stride(), tiles_n,
                BLOCK_T=panel.rows, BLOCK_N=panel.columns, INTERPRETED=INTERPRET,
                num_warps=panel.num_warps,
            )  # fmt: skip
    return [grad.view(shape) for grad in (da, db) if grad is not None]


@_column_dot_backward.register_fake
def _(dy, a, b, need_a, need_b, config):
    return [t.new_empty(t.shape) for t, needed in ((a, need_a), (b, need_b)) if needed]


def _save_for_backward(ctx, inputs, output):
    a, b, config = inputs
    need_a, need_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a, b)
    ctx.args = need_a, need_b, config


def _backward(ctx, dy):
    grads = iter(torch.ops.gatepack.column_dot_backward(dy, *ctx.saved_tensors, *ctx.args))
    return *(next(grads) if needed else None for needed in ctx.args[:2]), None


_column_dot.register_autograd(_backward, setup_context=_save_for_backward)
_column_dot_backward.register_autograd(refuse_second_derivative("column_dot"))


def column_dot_fn(a: torch.Tensor, b: torch.Tensor, *, config: Panel | None = None) -> torch.Tensor:
    """y[n] = sum_t a[t, n] b[t, n], fp32 [N].

    a, b [*, N]: fp32, bf16 or fp16, also of two different types, any strides (leading dimensions
    that do not collapse into one stride are copied). Products and sums are fp32, in a fixed order.
    Gradients: da and db, dense, in the dtypes of a and b. config None takes the tile of
    choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, CPU tensors outside
    Triton's interpreter. RuntimeError: a second derivative.
    """
    return torch.ops.gatepack.column_dot(a, b, [] if config is None else config.to_ints())
