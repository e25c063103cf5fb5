"""Stage 2, kernels: a linear layer between an in-gate and an out-gate, with LoRA, in two forms.

    gated    y = z_out * (W (z_in * x) + s B (A drop(z_in * x)) + b)
    masked   y = z_out * (W (z_in * x)) + s B (A drop(x)) + b

In the gated form LoRA and bias are inside the gates; in the masked form, which ATP trains LoRA in,
the gates multiply the base path alone. drop(x) = kept * x / (1 - p) is LoRA's inverted dropout.

Closed lanes (z exactly 0) are neither read nor computed, forward and backward; in the masked form
they still get their LoRA part. With p = z_in * x, d = z_out * dy, h = what z_out multiplies and
u = s A drop(p), the gradients of the gated form are

    v  = s B^T d              dx = z_in * (W^T d + drop(A^T v))    db = colsum(d)
    dW = d^T p                dz_in  = colsum(x * (W^T d + drop(A^T v)))
    dA = v^T drop(p)          dz_out = colsum(dy * h)              dB = d^T u

and those of the masked form

    v  = s B^T dy             dx = z_in * W^T d + drop(A^T v)      db = colsum(dy)
    dW = d^T p                dz_in  = colsum(x * W^T d)
    dA = v^T drop(x)          dz_out = colsum(dy * h)              dB = dy^T u

which is why two matmul kernels are enough: the input gradient of a gated linear is a gated linear
with W transposed and the gates exchanged, and every weight gradient is one gated outer product.
Restricting all of them to open lanes is exact but for dz of closed units. closed_grad "none" takes
it as 0, which is right for clamped gates; for straight-through ones see closed_gradients.py.

dz_in comes from the fp32 accumulators of dx. dz_out = colsum(dy * y) / z_out in the gated form for
fp32 and bf16, so that nothing beyond y is kept; fp16 keeps h, since z_out * h can fall below its
smallest number, and so does the masked form. Dropout is drawn again in the backward (_dropout.py).
Every sum has a fixed order: the same input and seed give the same bits.

Source: FineGates, arXiv 2412.12951 (row and column gates, LoRA between them); ATP, arXiv 2412.14426
(the masked form); LoRA's dropout as in PEFT, https://github.com/huggingface/peft.
"""

import torch
import torch.nn.functional as F

from ._common import arch_of, check_device, config_of, refuse_second_derivative, rows_of
from ._configs import GatedLinearConfig, choose_config
from ._dropout import Dropout, kept_ref
from ._gated_linear_arguments import check_settings, check_tensors
from .closed_gradients import (
    closed_dz_in,
    closed_dz_out,
    complement,
    sampled_count,
    sampled_tokens,
    sampled_tokens_ref,
)
from .column_sums import column_sums
from .gated_matmul import gated_matmul, gated_outer
from .open_sets import Axis, open_set


def gated_linear_ref(
    x, w, bias=None, *, z_in=None, z_out=None, lora_a=None, lora_b=None, scale=1.0, group_in=1,
    group_out=1, form="gated", dropout=0.0, seed=None, closed_grad="none", closed_fraction=0.125
):  # fmt: skip
    """y of gated_linear_fn in plain torch, in the dtype of x: its arguments and its gradients, the
    same dropout and the same sampled tokens. Any floating dtype; fp64 makes it the truth."""
    tokens, k = x.shape[:-1].numel(), x.shape[-1]
    if seed is not None:
        seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device).reshape(())
    if closed_grad == "sampled":
        count = sampled_count(tokens, closed_fraction)
        weight = torch.zeros(tokens, 1, dtype=x.dtype, device=x.device)
        weight[sampled_tokens_ref(seed, tokens, count)] = tokens / max(1, count)
        weight = weight.view(*x.shape[:-1], 1)

    def gate(v, z, group, closed_grad):
        """z * v per lane; how much of the gradient of closed units passes."""
        if z is None:
            return v
        z_open = z if closed_grad == "exact" else torch.where(z != 0, z, 0.0)
        y = v * z_open.to(v.dtype).repeat_interleave(group)
        if closed_grad == "sampled":
            z_closed = torch.where(z == 0, z, 0.0).to(v.dtype).repeat_interleave(group)
            y = y + v.detach() * weight * z_closed
        return y

    added = 0.0 if bias is None else bias
    if lora_a is not None:
        p = x
        if form == "gated":
            p = gate(x, z_in, group_in, "none" if closed_grad == "none" else "exact")
        if dropout:
            kept = kept_ref(Dropout(dropout, seed), tokens, k).view(x.shape)
            p = torch.where(kept, p / (1 - dropout), 0.0)
        added = added + scale * F.linear(F.linear(p, lora_a), lora_b)
    h = F.linear(gate(x, z_in, group_in, closed_grad), w)
    if form == "masked":
        return gate(h, z_out, group_out, closed_grad) + added
    return gate(h + added, z_out, group_out, closed_grad)


def _axis(size, z, open_set_of_z, group):
    return Axis(size) if z is None else Axis(size, z.contiguous(), open_set_of_z, group)


def _tiles(config, t, n, k, dtype, device):
    return config_of(GatedLinearConfig, "gated_linear", config, (t, n, k), dtype, device)


def _project(x, w, ins, alpha, drop=None):
    """alpha * W drop(z_in * x) for a low-rank factor w [r, K]: [T, r]."""
    n, k = w.shape
    tile = choose_config("gated_linear", (x.shape[0], n, k), x.dtype, arch_of(x.device)).fwd
    return gated_matmul(x, w, ins, Axis(n), tile, alpha=alpha, drop=drop)[0]


def _low_rank_gradient(left, right, axis, like, drop=None):
    """(z drop(left))^T right for a low-rank factor, laid out as `like` [lanes of axis, r]."""
    if like.numel() == 0:
        return torch.empty_like(like)
    shape = (left.shape[0], *like.shape)
    tile = choose_config("gated_linear", shape, left.dtype, arch_of(left.device)).dw
    return gated_outer(left, right, axis, Axis(like.shape[1]), tile, like, drop=drop)


_FORWARD = (
    "(Tensor x, Tensor w, Tensor? bias, Tensor? z_in, Tensor? z_out, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? seed, float scale, int group_in, int group_out, str form, "
    "float dropout, str closed_grad, float closed_fraction, bool keep_h, int[] config) "
    "-> (Tensor y, Tensor h, Tensor u, Tensor open_in, Tensor open_out)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor w, Tensor? bias, Tensor? z_in, Tensor? z_out, Tensor? open_in, "
    "Tensor? open_out, Tensor? lora_a, Tensor? lora_b, Tensor? h, Tensor? u, Tensor? seed, "
    "float scale, int group_in, int group_out, str form, float dropout, str closed_grad, "
    "float closed_fraction, bool h_is_y, bool[] needs, int[] config) -> Tensor[]"
)


@torch.library.custom_op("gatepack::gated_linear", mutates_args=(), schema=_FORWARD)
def _gated_linear(
    x, w, bias, z_in, z_out, lora_a, lora_b, seed, scale, group_in, group_out, form, dropout,
    closed_grad, closed_fraction, keep_h, config,
):  # fmt: skip
    """y, and what the backward needs: h, u = s A drop(p) (empty if unused) and the open sets."""
    check_tensors(x, w, bias, z_in, z_out, lora_a, lora_b, group_in, group_out)
    check_device("gated_linear", x)
    with torch.cuda.device_of(x):
        n, k = w.shape
        x2 = rows_of(x)
        open_in, open_out = (
            x.new_empty(0, dtype=torch.int32) if z is None else open_set(z) for z in (z_in, z_out)
        )
        ins, outs = _axis(k, z_in, open_in, group_in), _axis(n, z_out, open_out, group_out)
        tiles = _tiles(config, x2.shape[0], n, k, x.dtype, x.device)
        u = None
        if lora_a is not None and lora_a.shape[0]:
            drop = Dropout(dropout, seed) if dropout else None
            lora_ins = ins if form == "gated" else Axis(k)
            u = _project(x2, lora_a, lora_ins, scale / (1 - dropout), drop)
        dense_bias = None if bias is None else bias.contiguous()
        y, h, _ = gated_matmul(
            x2, w, ins, outs, tiles.fwd, bias=dense_bias, u=u, up=lora_b, form=form,
            keep="yh" if keep_h else "y",
        )  # fmt: skip
        h = x.new_empty(0) if h is None else h
        u = x.new_empty(0) if u is None else u
        return y.view(*x.shape[:-1], n), h, u, open_in, open_out


@_gated_linear.register_fake
def _(
    x, w, bias, z_in, z_out, lora_a, lora_b, seed, scale, group_in, group_out, form, dropout,
    closed_grad, closed_fraction, keep_h, config,
):  # fmt: skip
    check_tensors(x, w, bias, z_in, z_out, lora_a, lora_b, group_in, group_out)
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
    dy, x, w, bias, z_in, z_out, open_in, open_out, lora_a, lora_b, h, u, seed, scale, group_in,
    group_out, form, dropout, closed_grad, closed_fraction, h_is_y, needs, config,
):  # fmt: skip
    """The gradients that `needs` asks for, in the order x, w, bias, z_in, z_out, lora_a, lora_b."""
    need_x, need_w, need_bias, need_z_in, need_z_out, need_a, need_b = needs
    with torch.cuda.device_of(dy):
        n, k = w.shape
        dy2, x2 = rows_of(dy), None if x is None else rows_of(x)
        ins, outs = _axis(k, z_in, open_in, group_in), _axis(n, z_out, open_out, group_out)
        lora_ins, lora_outs = (ins, outs) if form == "gated" else (Axis(k), Axis(n))
        tiles = _tiles(config, dy2.shape[0], n, k, dy.dtype, dy.device)
        low_rank = lora_a is not None and lora_a.shape[0] > 0
        drop = Dropout(dropout, seed) if dropout and low_rank else None
        v = dx = dz_in = dz_out = db = None
        if low_rank and (need_x or need_z_in or need_a):
            v = _project(dy2, lora_b.t(), lora_outs, scale / (1 - dropout))
        if need_x or need_z_in:
            dx, _, dz_in = gated_matmul(
                dy2, w.t(), outs, ins, tiles.dx, u=v, up=lora_a.t() if low_rank else None,
                aux=x2 if need_z_in else None, drop=drop, form=form, keep="y" if need_x else "",
            )  # fmt: skip
        if need_bias or need_z_out:
            db, dz_out = column_sums(dy2, rows_of(h) if need_z_out else None, lora_outs)
        grads = []
        if need_x:
            grads.append(dx.view(*dy.shape[:-1], k))
        if need_w:
            grads.append(gated_outer(dy2, x2, outs, ins, tiles.dw, w))
        if need_bias:
            gated = form == "gated" and z_out is not None
            grads.append((db * (z_out.repeat_interleave(group_out) if gated else 1.0)).to(w.dtype))
        dy_drawn, x_drawn, u_drawn, weight = dy2, x2, u, 1.0
        count = sampled_count(dy2.shape[0], closed_fraction)
        if closed_grad == "sampled" and count < dy2.shape[0] and (need_z_in or need_z_out):
            drawn = sampled_tokens(seed, dy2.shape[0], count)
            dy_drawn, x_drawn, u_drawn = (
                None if m is None else m.index_select(0, drawn) for m in (dy2, x2, u)
            )
            weight = dy2.shape[0] / count
        if need_z_in:
            if closed_grad != "none":
                dz_in += weight * closed_dz_in(dy_drawn, w, outs, ins, tiles.dx, x_drawn)
                if low_rank and form == "gated":
                    like = torch.empty_like(lora_a, dtype=torch.float32).t()
                    products = _low_rank_gradient(x2, v, complement(ins), like, drop)
                    dz_in += (products * lora_a.t()).sum(1)
            grads.append(dz_in.view(-1, group_in).sum(1))
        if need_z_out:
            dz_out = dz_out.view(-1, group_out).sum(1)
            dz_out = torch.where(z_out != 0, dz_out / z_out if h_is_y else dz_out, 0.0)
            if closed_grad != "none":
                added = {}
                if form == "gated":
                    dense_bias = None if bias is None else bias.contiguous()
                    added = {"bias": dense_bias, "u": u_drawn, "up": lora_b}
                closed = closed_dz_out(x_drawn, w, ins, outs, tiles.fwd, dy_drawn, **added)
                dz_out += weight * closed.view(-1, group_out).sum(1)
            grads.append(dz_out)
        # The low-rank side goes second, so that the tile's rows fill the matrix instruction.
        if need_a:
            grads.append(_low_rank_gradient(x2, v, lora_ins, lora_a.t(), drop).t())
        if need_b:
            grads.append(_low_rank_gradient(dy2, u, lora_outs, lora_b))
        return grads


@_gated_linear_backward.register_fake
def _(
    dy, x, w, bias, z_in, z_out, open_in, open_out, lora_a, lora_b, h, u, seed, scale, group_in,
    group_out, form, dropout, closed_grad, closed_fraction, h_is_y, needs, config,
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
    x, w, bias, z_in, z_out, lora_a, lora_b, seed, *settings, keep_h, config = inputs
    y, h, u, open_in, open_out = output
    ctx.mark_non_differentiable(h, u, open_in, open_out)
    ctx.set_materialize_grads(False)
    needs = [inputs[i] is not None and ctx.needs_input_grad[i] for i in range(7)]
    _, need_w, _, need_z_in, need_z_out, need_a, need_b = needs
    _, _, _, form, _, closed_grad, _ = settings
    low_rank = lora_a is not None and lora_a.shape[0] > 0
    closed_out = need_z_out and closed_grad != "none"
    ctx.save_for_backward(
        x if need_w or need_z_in or need_a or closed_out else None,
        w,
        bias if closed_out and form == "gated" else None,
        z_in,
        z_out,
        open_in if z_in is not None else None,
        open_out if z_out is not None else None,
        lora_a,
        lora_b,
        (h if keep_h else y) if need_z_out else None,
        u if low_rank and (need_b or closed_out) else None,
        seed,
    )
    ctx.args = *settings, not keep_h, needs, config


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 17
    *_, needs, _ = ctx.args
    grads = iter(torch.ops.gatepack.gated_linear_backward(dy, *ctx.saved_tensors, *ctx.args))
    return *(next(grads) if needed else None for needed in needs), *(None,) * 10


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
    form: str = "gated",
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    closed_grad: str = "none",
    closed_fraction: float = 0.125,
    config: GatedLinearConfig | None = None,
) -> torch.Tensor:
    """y = z_out * (W (z_in * x) + s B (A drop(z_in * x)) + b), closed lanes skipped.

    form "masked": y = z_out * (W (z_in * x)) + s B (A drop(x)) + b, gates on the base path alone.

    x [*, K] (leading dimensions that do not collapse into one stride are copied, as F.linear
    does), w [N, K] row-major, channel-major or any other strides, bias [N], lora_a [r, K],
    lora_b [N, r]: fp32, bf16 or fp16, one dtype for all. z_in fp32 [K / group_in], z_out fp32
    [N / group_out]. y [*, N] contiguous, in x.dtype; in the gated form its closed columns are 0.

    dropout: probability of dropping an element of LoRA's input; the rest is scaled by
    1 / (1 - dropout). seed: an integer, or an int64 tensor of one element on x's device, which may
    change between replays of a CUDA graph; the same seed gives the same mask.

    Gradients flow to every tensor that asks for one; dz is fp32. closed_grad says what dz of closed
    units is: "none" 0, "exact" the full sum over tokens, "sampled" an unbiased estimate of it from
    round(closed_fraction * T) tokens, drawn with `seed`. Where z_out needs a gradient (gated form,
    fp32, bf16), y is kept for it: do not change y in place. fp32 products follow
    torch.get_float32_matmul_precision(). config None takes the tiles of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, one LoRA factor without
    the other, a group that does not divide its axis, settings out of their range, dropout or
    sampling without a seed, CPU tensors outside Triton's interpreter. RuntimeError: a second
    derivative.
    """
    check_settings(x, form, dropout, seed, closed_grad, closed_fraction)
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=x.device)
    keep_h = (
        (x.dtype == torch.float16 or form == "masked")
        and z_out is not None
        and z_out.requires_grad
        and torch.is_grad_enabled()
    )
    ints = [] if config is None else config.to_ints()
    return torch.ops.gatepack.gated_linear(
        x, w, bias, z_in, z_out, lora_a, lora_b, seed, scale, group_in, group_out, form, dropout,
        closed_grad, closed_fraction, keep_h, ints,
    )[0]  # fmt: skip
