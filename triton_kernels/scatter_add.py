"""Stage 2, kernels: compact columns added into the open columns of a residual.

With open(i) the i-th open column and z = 1 where there is no gate,

    out[t, open(i)] = residual[t, open(i)] + z[open(i)] y[t, i]        for i < count

and out = residual elsewhere. The kernel goes by columns of out, each written once, and looks up
which slot of y, if any, belongs there: no atomics, contiguous loads and stores of the wide tensors.

    dresidual = dout
    dy[t, i]    = z[open(i)] dout[t, open(i)]        0 for i >= count
    dz[open(i)] = sum_t y[t, i] dout[t, open(i)]     0 for closed columns

Source: the missing kernel of ATP's dimension-independent space, arXiv 2412.14426.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    INTERPRET,
    check_device,
    config_of,
    expect,
    expect_operand,
    offsets,
    refuse_second_derivative,
    round_to,
    rows_of,
)
from ._configs import Panel


def scatter_add_ref(residual, y, open_set, z=None):
    """out of scatter_add_fn in plain torch, in the dtype of residual."""
    columns = open_set[:-1][: y.shape[-1]].long()
    is_open = torch.arange(len(columns), device=y.device) < open_set[-1]
    y = torch.where(is_open, y[..., : len(columns)], 0.0)
    if z is not None:
        y = y * torch.where(is_open, z[columns], 0.0).to(y.dtype)
    return residual.index_add(-1, columns, y)


@triton.jit
def _slots_kernel(open_ptr, slots_ptr, D, capacity, BLOCK: tl.constexpr):
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    count = tl.minimum(tl.load(open_ptr + D), capacity)
    d = tl.load(open_ptr + i, mask=i < D, other=0)
    tl.store(slots_ptr + d, tl.where(i < count, i, -1), mask=i < D)


def slots_of(open_set: torch.Tensor, capacity: int) -> torch.Tensor:
    """Launch the kernel: open set [D + 1] -> int32 [D], the slot of each column, -1 for none.

    The slot of the i-th open column is i; columns whose slot would be past capacity have none.
    """
    d = open_set.numel() - 1
    slots = open_set.new_empty(d)
    if d:
        _slots_kernel[(triton.cdiv(d, 1024),)](
            open_set, slots, d, capacity, BLOCK=1024, num_warps=4
        )
    return slots


@triton.jit
def _scatter_add_fwd_kernel(
    residual_ptr,  # [T, D]
    y_ptr,  # [T, capacity]
    slots_ptr,  # int32 [D]
    z_ptr,  # fp32 [D] or None
    out_ptr,  # [T, D], dense
    T,
    D,
    stride_rt,
    stride_rd,
    stride_yt,
    stride_ys,
    tiles_d,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    t = (tl.program_id(0) // tiles_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (d < D)[None, :]
    slot = tl.load(slots_ptr + d, mask=d < D, other=-1)
    residual_ptrs = residual_ptr + offsets(t, stride_rt, d, stride_rd)
    out = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_mask = mask & (slot >= 0)[None, :]
    y_ptrs = y_ptr + offsets(t, stride_yt, slot, stride_ys)
    y = tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        y *= tl.load(z_ptr + d, mask=slot >= 0, other=0.0)[None, :]
    out = round_to(out + y, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + offsets(t, D, d, 1), out, mask=mask)


@triton.jit
def _scatter_add_bwd_kernel(
    dout_ptr,  # [T, D]
    y_ptr,  # [T, capacity] or None
    open_ptr,  # int32 [D + 1]
    z_ptr,  # fp32 [D] or None
    dy_ptr,  # [T, capacity], dense, or None
    dz_ptr,  # fp32 [splits, D] or None: sums over SPAN rows
    T,
    D,
    capacity,
    stride_dt,
    stride_dd,
    stride_yt,
    stride_ys,
    tiles_s,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    split = (tl.program_id(0) // tiles_s).to(tl.int64)
    slot = tl.program_id(0) % tiles_s * BLOCK_S + tl.arange(0, BLOCK_S)
    is_open = slot < tl.minimum(tl.load(open_ptr + D), capacity)
    d = tl.load(open_ptr + slot, mask=slot < D, other=0)
    z = tl.full([BLOCK_S], 1.0, tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + d, mask=is_open, other=0.0)
    total = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for start in range(split * SPAN, tl.minimum(T, split * SPAN + SPAN), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        in_t = (t < T)[:, None]
        mask = in_t & is_open[None, :]
        dout_ptrs = dout_ptr + offsets(t, stride_dt, d, stride_dd)
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            dy = round_to(dout * z[None, :], dy_ptr.dtype.element_ty, INTERPRETED)
            dy_ptrs = dy_ptr + offsets(t, capacity, slot, 1)
            tl.store(dy_ptrs, dy, mask=in_t & (slot < capacity)[None, :])
        if dz_ptr is not None:
            # Loaded up to the capacity, so that loads are wide, and cut at the count.
            y_ptrs = y_ptr + offsets(t, stride_yt, slot, stride_ys)
            y = tl.load(y_ptrs, mask=in_t & (slot < capacity)[None, :], other=0.0)
            total += dout * tl.where(is_open[None, :], y.to(tl.float32), 0.0)
    if dz_ptr is not None:
        tl.store(dz_ptr + split * D + d, tl.sum(total, axis=0), mask=slot < D)


def _check(residual, y, open_set, z):
    expect_operand("residual", residual)
    expect_operand("y", y)
    d = residual.shape[-1]
    for name, tensor, shape, dtype in (
        ("y", y, (*residual.shape[:-1], y.shape[-1]), residual.dtype),
        ("open_set", open_set, (d + 1,), torch.int32),
        ("z", z, (d,), torch.float32),
    ):
        expect(name, tensor, shape, dtype, residual, "residual")


def _panel(config, t, d, tensor):
    return config_of(Panel, "scatter_add", config, (t, d), tensor.dtype, tensor.device)


@torch.library.custom_op(
    "gatepack::scatter_add",
    mutates_args=(),
    schema="(Tensor residual, Tensor y, Tensor open_set, Tensor? z, int[] config) -> Tensor",
)
def _scatter_add(residual, y, open_set, z, config):
    _check(residual, y, open_set, z)
    check_device("scatter_add", residual)
    residual2, y2 = rows_of(residual), rows_of(y)
    t, d = residual2.shape
    out = residual2.new_empty(t, d)
    if t and d:
        panel = _panel(config, t, d, residual)
        tiles_t, tiles_d = triton.cdiv(t, panel.rows), triton.cdiv(d, panel.columns)
        with torch.cuda.device_of(residual):
            _scatter_add_fwd_kernel[(tiles_t * tiles_d,)](
                residual2, y2, slots_of(open_set.contiguous(), y.shape[-1]),
                None if z is None else z.contiguous(), out,
                t, d, *residual2.stride(), *y2.stride(), tiles_d,
                BLOCK_T=panel.rows, BLOCK_D=panel.columns, INTERPRETED=INTERPRET,
                num_warps=panel.num_warps,
            )  # fmt: skip
    return out.view(residual.shape)


@_scatter_add.register_fake
def _(residual, y, open_set, z, config):
    _check(residual, y, open_set, z)
    return residual.new_empty(residual.shape)


@torch.library.custom_op(
    "gatepack::scatter_add_backward",
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor? y, Tensor open_set, Tensor? z, int capacity, bool need_y, "
        "bool need_z, int[] config) -> Tensor[]"
    ),
)
def _scatter_add_backward(dout, y, open_set, z, capacity, need_y, need_z, config):
    """dy and dz, those that are needed."""
    dout2, y2 = rows_of(dout), None if y is None else rows_of(y)
    t, d = dout2.shape
    dy = dout2.new_empty(t, capacity) if need_y else None
    if t == 0 or d == 0:
        grads = [dy.zero_().view(*dout.shape[:-1], capacity)] if need_y else []
        return [*grads, z.new_zeros(d)] if need_z else grads
    panel = _panel(config, t, d, dout)
    splits = triton.cdiv(t, panel.span)
    tiles_s = triton.cdiv(max(d, capacity) if need_z else capacity, panel.columns)
    dz = z.new_empty(splits, d) if need_z else None
    if tiles_s:
        with torch.cuda.device_of(dout):
            _scatter_add_bwd_kernel[(splits * tiles_s,)](
                dout2, y2, open_set.contiguous(), None if z is None else z.contiguous(), dy, dz,
                t, d, capacity, *dout2.stride(), *((0, 0) if y is None else y2.stride()), tiles_s,
                SPAN=panel.span, BLOCK_T=panel.rows, BLOCK_S=panel.columns, INTERPRETED=INTERPRET,
                num_warps=panel.num_warps,
            )  # fmt: skip
    grads = [dy.view(*dout.shape[:-1], capacity)] if need_y else []
    return [*grads, dz.sum(0)] if need_z else grads


@_scatter_add_backward.register_fake
def _(dout, y, open_set, z, capacity, need_y, need_z, config):
    grads = [dout.new_empty(*dout.shape[:-1], capacity)] if need_y else []
    return [*grads, z.new_empty(z.shape)] if need_z else grads


def _save_for_backward(ctx, inputs, output):
    _, y, open_set, z, config = inputs
    _, need_y, _, need_z = ctx.needs_input_grad[:4]
    ctx.save_for_backward(y if need_z else None, open_set, z)
    ctx.args = y.shape[-1], need_y, need_z, config


def _backward(ctx, dout):
    _, need_y, need_z, _ = ctx.args
    grads = iter(())
    if need_y or need_z:
        saved = ctx.saved_tensors
        grads = iter(torch.ops.gatepack.scatter_add_backward(dout, *saved, *ctx.args))
    return dout, next(grads) if need_y else None, None, next(grads) if need_z else None, None


_scatter_add.register_autograd(_backward, setup_context=_save_for_backward)
_scatter_add_backward.register_autograd(refuse_second_derivative("scatter_add"))


def scatter_add_fn(
    residual: torch.Tensor,
    y: torch.Tensor,
    open_set: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    config: Panel | None = None,
) -> torch.Tensor:
    """out = residual, plus z[open(i)] y[:, i] in its i-th open column.

    residual [*, D] and y [*, capacity]: fp32, bf16 or fp16, one dtype for both, any strides
    (leading dimensions that do not collapse into one stride are copied). open_set int32 [D + 1]
    of open_set_fn. z fp32 [D] or None. What y holds from the count on has no effect; open columns
    whose slot would be past the capacity get nothing. out [*, D] is new and contiguous.

    Gradients: dresidual = dout, dy (0 from the count on), dz fp32 (0 for closed columns), summed
    in a fixed order. config None takes the tile of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, CPU tensors outside
    Triton's interpreter. RuntimeError: a second derivative.
    """
    ints = [] if config is None else config.to_ints()
    return torch.ops.gatepack.scatter_add(residual, y, open_set, z, ints)
