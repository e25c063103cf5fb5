"""Stage 2, kernels: a linear layer between an in-gate and an out-gate, with LoRA inside the gates.

    y = z_out * (W (z_in * x) + s B (A (z_in * x)) + b)

Closed lanes (z exactly 0) are neither read nor computed, forward and backward. With
p = z_in * x, d = z_out * dy and h = the bracket above (so y = z_out * h), the gradients are

    v  = s B^T d              dx = z_in * (W^T d + A^T v)      db = colsum(d)
    dW = d^T p                dz_in  = colsum(x * (W^T d + A^T v))
    dA = v^T p                dz_out = colsum(dy * h)          dB = d^T (s A p)

which is why two matmul kernels are enough: the input gradient of a gated linear is a gated linear
with W transposed and the gates exchanged, and every weight gradient is one gated outer product.
Restricting all of them to open lanes is exact, except that dz of a closed unit is defined as 0: a
clamped gate has no gradient there (closed_grad="none").

dz_in comes from the fp32 accumulators of dx. dz_out = colsum(dy * y) / z_out for fp32 and bf16, so
that nothing beyond y is kept; fp16 keeps h, since z_out * h can fall below its smallest number.
Every sum has a fixed order: the same input gives the same bits.

Source: FineGates, arXiv 2412.12951 (row and column gates, LoRA between them).
"""

import torch
import torch.nn.functional as F

from ._common import DTYPES, arch_of, check_device, refuse_second_derivative, rows_of
from ._configs import GatedLinearConfig, choose_config
from .column_sums import column_sums
from .gated_matmul import gated_matmul, gated_outer
from .open_sets import Axis, open_set


def gated_linear_ref(
    x, w, bias=None, *, z_in=None, z_out=None, lora_a=None, lora_b=None, scale=1.0, group_in=1,
    group_out=1
):  # fmt: skip
    """y = z_out * (W (z_in * x) + s B (A (z_in * x)) + b) in plain torch, in the dtype of x.

    Same arguments and gradients as gated_linear_fn, any floating dtype; fp64 makes it the truth.
    """
    if z_in is not None:
        x = x * _open_lanes(z_in, group_in, x.dtype)
    y = F.linear(x, w, bias)
    if lora_a is not None:
        y = y + scale * F.linear(F.linear(x, lora_a), lora_b)
    if z_out is not None:
        y = y * _open_lanes(z_out, group_out, y.dtype)
    return y


def _open_lanes(z, group, dtype):
    """Gate per lane; the `where` cuts the gradient of closed units."""
    return torch.where(z != 0, z, 0.0).to(dtype).repeat_interleave(group)


def _check(x, w, bias, z_in, z_out, lora_a, lora_b, group_in, group_out):
    """Raise ValueError naming the argument, what was expected and what came."""

    def expect(name, tensor, shape, dtype):
        if tensor is None:
            return
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (that of x), got {tensor.device}")

    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected dtype float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if w.dim() != 2:
        raise ValueError(f"w: expected two dimensions, got shape {tuple(w.shape)}")
    n, k = w.shape
    expect("x", x, (*x.shape[:-1], k), x.dtype)
    expect("w", w, (n, k), x.dtype)
    expect("bias", bias, (n,), x.dtype)
    for name, size, group in (("group_in", k, group_in), ("group_out", n, group_out)):
        if group < 1 or size % group:
            raise ValueError(f"{name}: expected a divisor of {size}, got {group}")
    expect("z_in", z_in, (k // group_in,), torch.float32)
    expect("z_out", z_out, (n // group_out,), torch.float32)
    if (lora_a is None) != (lora_b is None):
        missing = "lora_a" if lora_a is None else "lora_b"
        raise ValueError(f"{missing}: expected a tensor beside the other LoRA factor, got None")
    if lora_a is not None:
        rank = lora_a.shape[0] if lora_a.dim() else 0
        expect("lora_a", lora_a, (rank, k), x.dtype)
        expect("lora_b", lora_b, (n, rank), x.dtype)


def _axis(size, z, open_set_of_z, group):
    return Axis(size) if z is None else Axis(size, z.contiguous(), open_set_of_z, group)


def _tiles(config, t, n, k, dtype, device):
    if config:
        return GatedLinearConfig.from_ints(config)
    return choose_config("gated_linear", (t, n, k), dtype, arch_of(device))


def _project(x, w, ins, alpha):
    """alpha * W (z_in * x) for a low-rank factor w [r, K]: [T, r]."""
    n, k = w.shape
    tile = choose_config("gated_linear", (x.shape[0], n, k), x.dtype, arch_of(x.device)).fwd
    return gated_matmul(x, w, ins, Axis(n), tile, alpha=alpha)[0]


def _low_rank_gradient(left, right, axis, like):
    """(z left)^T right for a low-rank factor, laid out as `like` [lanes of axis, r]."""
    if like.numel() == 0:
        return torch.empty_like(like)
    shape = (left.shape[0], *like.shape)
    tile = choose_config("gated_linear", shape, left.dtype, arch_of(left.device)).dw
    return gated_outer(left, right, axis, Axis(like.shape[1]), tile, like)


_FORWARD = (
    "(Tensor x, Tensor w, Tensor? bias, Tensor? z_in, Tensor? z_out, Tensor? lora_a, "
    "Tensor? lora_b, float scale, int group_in, int group_out, bool keep_h, int[] config) "
    "-> (Tensor y, Tensor h, Tensor u, Tensor open_in, Tensor open_out)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor w, Tensor? z_in, Tensor? z_out, Tensor? open_in, "
    "Tensor? open_out, Tensor? lora_a, Tensor? lora_b, Tensor? h, Tensor? u, float scale, "
    "int group_in, int group_out, bool h_is_y, bool[] needs, int[] config) -> Tensor[]"
)


@torch.library.custom_op("gatepack::gated_linear", mutates_args=(), schema=_FORWARD)
def _gated_linear(
    x, w, bias, z_in, z_out, lora_a, lora_b, scale, group_in, group_out, keep_h, config
):
    """y, and what the backward needs: h and u = s A (z_in * x) (empty if unused), the open sets."""
    _check(x, w, bias, z_in, z_out, lora_a, lora_b, group_in, group_out)
    check_device("gated_linear", x)
    with torch.cuda.device_of(x):
        n, k = w.shape
        x2 = rows_of(x)
        open_in, open_out = (
            x.new_empty(0, dtype=torch.int32) if z is None else open_set(z) for z in (z_in, z_out)
        )
        ins, outs = _axis(k, z_in, open_in, group_in), _axis(n, z_out, open_out, group_out)
        tiles = _tiles(config, x2.shape[0], n, k, x.dtype, x.device)
        low_rank = lora_a is not None and lora_a.shape[0] > 0
        u = _project(x2, lora_a, ins, scale) if low_rank else None
        dense_bias = None if bias is None else bias.contiguous()
        y, h, _ = gated_matmul(
            x2, w, ins, outs, tiles.fwd, bias=dense_bias, u=u, up=lora_b,
            keep="yh" if keep_h else "y",
        )  # fmt: skip
        h = x.new_empty(0) if h is None else h
        u = x.new_empty(0) if u is None else u
        return y.view(*x.shape[:-1], n), h, u, open_in, open_out


@_gated_linear.register_fake
def _(x, w, bias, z_in, z_out, lora_a, lora_b, scale, group_in, group_out, keep_h, config):
    _check(x, w, bias, z_in, z_out, lora_a, lora_b, group_in, group_out)
    t = x.shape[:-1].numel()
    rank = 0 if lora_a is None else lora_a.shape[0]
    return (
        x.new_empty(*x.shape[:-1], w.shape[0]),
        x.new_empty((t, w.shape[0]) if keep_h else 0),
        x.new_empty((t, rank) if rank else 0),
        x.new_empty(0 if z_in is None else z_in.shape[0] + 1, dtype=torch.int32),
        x.new_empty(0 if z_out is None else z_out.shape[0] + 1, dtype=torch.int32),
    )


@torch.library.custom_op("gatepack::gated_linear_backward", mutates_args=(), schema=_BACKWARD)
def _gated_linear_backward(
    dy, x, w, z_in, z_out, open_in, open_out, lora_a, lora_b, h, u, scale, group_in, group_out,
    h_is_y, needs, config,
):  # fmt: skip
    """The gradients that `needs` asks for, in the order x, w, bias, z_in, z_out, lora_a, lora_b."""
    need_x, need_w, need_bias, need_z_in, need_z_out, need_a, need_b = needs
    with torch.cuda.device_of(dy):
        n, k = w.shape
        dy2, x2 = rows_of(dy), None if x is None else rows_of(x)
        ins, outs = _axis(k, z_in, open_in, group_in), _axis(n, z_out, open_out, group_out)
        tiles = _tiles(config, dy2.shape[0], n, k, dy.dtype, dy.device)
        rank = 0 if lora_a is None else lora_a.shape[0]
        v = dx = dz_in = dz_out = db = None
        if rank and (need_x or need_z_in or need_a):
            v = _project(dy2, lora_b.t(), outs, scale)
        if need_x or need_z_in:
            dx, _, dz_in = gated_matmul(
                dy2, w.t(), outs, ins, tiles.dx, u=v, up=lora_a.t() if rank else None,
                aux=x2 if need_z_in else None, keep="y" if need_x else "",
            )  # fmt: skip
        if need_bias or need_z_out:
            db, dz_out = column_sums(dy2, rows_of(h) if need_z_out else None, outs)
        grads = []
        if need_x:
            grads.append(dx.view(*dy.shape[:-1], k))
        if need_w:
            grads.append(gated_outer(dy2, x2, outs, ins, tiles.dw, w))
        if need_bias:
            per_lane = 1.0 if z_out is None else z_out.repeat_interleave(group_out)
            grads.append((db * per_lane).to(w.dtype))
        if need_z_in:
            grads.append(dz_in.view(-1, group_in).sum(1))
        if need_z_out:
            per_unit = dz_out.view(-1, group_out).sum(1)
            grads.append(torch.where(z_out != 0, per_unit / z_out, 0.0) if h_is_y else per_unit)
        # The low-rank side goes second, so that the tile's rows fill the matrix instruction.
        if need_a:
            grads.append(_low_rank_gradient(x2, v, ins, lora_a.t()).t())
        if need_b:
            grads.append(_low_rank_gradient(dy2, u, outs, lora_b))
        return grads


@_gated_linear_backward.register_fake
def _(
    dy, x, w, z_in, z_out, open_in, open_out, lora_a, lora_b, h, u, scale, group_in, group_out,
    h_is_y, needs, config,
):  # fmt: skip
    grads = (
        lambda: dy.new_empty(*dy.shape[:-1], w.shape[1]),
        lambda: torch.empty_like(w),
        lambda: w.new_empty(w.shape[0]),
        lambda: z_in.new_empty(z_in.shape),
        lambda: z_out.new_empty(z_out.shape),
        lambda: torch.empty_like(lora_a),
        lambda: torch.empty_like(lora_b),
    )
    return [grad() for grad, needed in zip(grads, needs, strict=True) if needed]


def _save_for_backward(ctx, inputs, output):
    x, w, _, z_in, z_out, lora_a, lora_b, scale, group_in, group_out, keep_h, config = inputs
    y, h, u, open_in, open_out = output
    ctx.mark_non_differentiable(h, u, open_in, open_out)
    ctx.set_materialize_grads(False)
    needs = [inputs[i] is not None and ctx.needs_input_grad[i] for i in range(7)]
    _, need_w, _, need_z_in, need_z_out, need_a, need_b = needs
    ctx.save_for_backward(
        x if need_w or need_z_in or need_a else None,
        w,
        z_in,
        z_out,
        open_in if z_in is not None else None,
        open_out if z_out is not None else None,
        lora_a,
        lora_b,
        (h if keep_h else y) if need_z_out else None,
        u if need_b else None,
    )
    ctx.args = scale, group_in, group_out, not keep_h, needs, config


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 12
    grads = iter(torch.ops.gatepack.gated_linear_backward(dy, *ctx.saved_tensors, *ctx.args))
    needs = ctx.args[4]
    return *(next(grads) if needed else None for needed in needs), *(None,) * 5


_gated_linear.register_autograd(_backward, setup_context=_save_for_backward)
_gated_linear_backward.register_autograd(refuse_second_derivative("gated_linear"))


def gated_linear_fn(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    z_in: torch.Tensor | None = None,
    z_out: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scale: float = 1.0,
    group_in: int = 1,
    group_out: int = 1,
    config: GatedLinearConfig | None = None,
) -> torch.Tensor:
    """y = z_out * (W (z_in * x) + s B (A (z_in * x)) + b), closed lanes skipped.

    x [*, K] (leading dimensions that do not collapse into one stride are copied, as F.linear
    does), w [N, K] row-major, channel-major or any other strides, bias [N], lora_a [r, K],
    lora_b [N, r]: fp32, bf16 or fp16, one dtype for all. z_in fp32 [K / group_in], z_out fp32
    [N / group_out]. y [*, N] contiguous, in x.dtype; its closed columns are exactly 0.

    Gradients flow to every tensor that asks for one; dz is fp32, 0 for closed units. Where z_out
    needs a gradient (fp32, bf16), y is kept for it: do not change y in place. fp32 products follow
    torch.get_float32_matmul_precision(). config None takes the tiles of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, one LoRA factor without
    the other, a group that does not divide its axis, CPU tensors outside Triton's interpreter.
    RuntimeError: a second derivative.
    """
    keep_h = (
        x.dtype == torch.float16
        and z_out is not None
        and z_out.requires_grad
        and torch.is_grad_enabled()
    )
    ints = [] if config is None else config.to_ints()
    return torch.ops.gatepack.gated_linear(
        x, w, bias, z_in, z_out, lora_a, lora_b, scale, group_in, group_out, keep_h, ints
    )[0]
