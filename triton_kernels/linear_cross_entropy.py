"""Stage 2, kernels: cross-entropy of a linear layer over a packed vocabulary, without its logits.

    loss = sum_t (log sum_v exp l[t, v]) - l[t, y_t],  l = x W^T + b     over the counted tokens

y_t is the row of W that `remap` gives for the label, so labels stay those of the full vocabulary.
A label that is ignored leaves the loss; so does one whose token was dropped, and those are counted.
With p = softmax(l) and the one-hot rows e of the counted tokens (other rows of G are 0)

    G = p - e      dx = G W      dW = G^T x      db = colsum(G)      (all / counted for the mean)

The logits exist for one chunk of tokens at a time: a vendor matmul writes them, one kernel reads
them twice and leaves G in their place, vendor matmuls turn G into gradients. So the gradients are
made in the forward pass, of the sum of the losses and only where they are wanted; the backward
scales them by the upstream gradient into new tensors. Recomputing the logits tile by tile in a
fused kernel instead would take 8 or 10 T V' d operations where this takes 6, and at a lower rate
than vendor matmuls reach. What the chunk costs is the kernel's own pass over it, 6 bytes per logit
beside 6 d operations: derived for an H200 (4 TB/s, 700 TFLOP/s in bf16), 30 % of the matmuls' time
for d 576 and 4 % for d 4096, against 33 % or more.

Memory: the chunk (512 MiB; 1 GiB if W is trained, as adding to dW reads and writes all of it for
each chunk), dx, and dW: in the dtype of W where one chunk holds all tokens, else fp32. Beside dx
and dW that is 1.0 GiB for T 8192, V' 128256, bf16; the backward of eager torch holds three fp32
tensors [T, V'] there, 11.7 GiB.

Every sum has a fixed order: the same input gives the same bits.

Source: Liger Kernel, arXiv 2410.10989 (gradients in the forward pass, chunked over tokens).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._common import (
    INTERPRET,
    check_device,
    config_of,
    expect,
    expect_matrix,
    expect_operand,
    refuse_second_derivative,
    round_to,
    rows_of,
)
from ._configs import Panel

CHUNK_BYTES = 512 * 1024**2  # logits of one chunk of tokens; twice that where W is trained
REDUCTIONS = ("mean", "sum")


class LinearCrossEntropy(NamedTuple):
    """loss fp32 [], counted int64 []: labels in the loss, dropped int64 []: labels without a row.

    Bits per byte of text: loss / ln 2 * counted / bytes for the mean, loss / ln 2 / bytes for the
    sum; over a packed vocabulary only if dropped is 0.
    """

    loss: torch.Tensor
    counted: torch.Tensor
    dropped: torch.Tensor


def linear_cross_entropy_ref(
    x, w, labels, *, bias=None, remap=None, ignore_index=-100, reduction="mean", vocab_size=None
):
    """Cross-entropy of F.linear in plain torch, its logits in at least fp32.

    Same arguments and gradients as linear_cross_entropy_fn, any floating dtype; fp64 makes it the
    truth. A label outside the vocabulary is an error here.
    """
    w, bias = w[:vocab_size], None if bias is None else bias[:vocab_size]
    left_out = labels == ignore_index
    dropped = torch.zeros_like(left_out)
    if remap is not None:
        labels = remap.long()[labels.masked_fill(left_out, 0)]
        dropped = (labels < 0) & ~left_out
    target = labels.masked_fill(left_out | dropped, -100).flatten()
    logits = rows_of(F.linear(x, w, bias))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, target, ignore_index=-100, reduction=reduction)
    return LinearCrossEntropy(loss, (target >= 0).sum(), dropped.sum())


@triton.jit
def _logits(l_row, bias_ptr, v, V, padded):
    """Logits of columns v, fp32; -inf past V."""
    l = tl.load(l_row + v, mask=v < padded, other=0.0).to(tl.float32)
    l = tl.where(v < V, l, -float("inf"))
    if bias_ptr is not None:
        l += tl.load(bias_ptr + v, mask=v < padded, other=0.0).to(tl.float32)
    return l


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    l_ptr,  # [tokens, padded], dense: x W^T, replaced by G if WITH_GRAD
    bias_ptr,  # [padded] or None
    label_ptr,  # int64 [tokens]
    remap_ptr,  # [labels_end] or None
    loss_ptr,  # fp32 [tokens]: 0 where the label is not counted
    state_ptr,  # int32 [tokens]: 0 ignored, 1 counted, 2 dropped
    V,
    padded,
    labels_end,
    ignore_index,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    l_row = l_ptr + token * padded
    label = tl.load(label_ptr + token)
    ignored = label == ignore_index
    known = (label >= 0) & (label < labels_end)
    target = label
    if remap_ptr is not None:
        target = tl.load(remap_ptr + label, mask=known, other=0).to(tl.int64)
    dropped = known & (target < 0) & (label != ignore_index)
    counted = (ignored | dropped) == 0
    loss = 0.0
    if counted:
        top, total, picked = -float("inf"), 0.0, 0.0
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            l = _logits(l_row, bias_ptr, v, V, padded)
            new_top = tl.maximum(top, tl.max(l, axis=0))
            safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp(top - safe_top) + tl.sum(tl.exp(l - safe_top), axis=0)
            picked += tl.sum(tl.where(v == target, l, 0.0), axis=0)
            top = new_top
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = tl.where(known & (target < V), total, float("nan"))
        loss = tl.log(total) - (picked - shift)
        if WITH_GRAD:
            scale = 1.0 / total
            for start in range(0, V, BLOCK):
                v = start + tl.arange(0, BLOCK)
                p = tl.exp(_logits(l_row, bias_ptr, v, V, padded) - shift) * scale
                g = round_to(tl.where(v == target, p - 1.0, p), l_ptr.dtype.element_ty, INTERPRETED)
                tl.store(l_row + v, g, mask=v < padded)
    elif WITH_GRAD:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(l_row + v, tl.zeros([BLOCK], l_ptr.dtype.element_ty), mask=v < padded)
    tl.store(loss_ptr + token, loss)
    tl.store(state_ptr + token, tl.where(counted, 1, tl.where(dropped, 2, 0)))


@triton.jit
def _linear_cross_entropy_fwd_sum_kernel(
    loss_ptr,  # fp32 [T]
    state_ptr,  # int32 [T]
    total_ptr,
    counted_ptr,
    dropped_ptr,
    T,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.int32)
    dropped = tl.zeros([BLOCK], tl.int32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        total += tl.load(loss_ptr + t, mask=t < T, other=0.0)
        state = tl.load(state_ptr + t, mask=t < T, other=0)
        counted += (state == 1).to(tl.int32)
        dropped += (state == 2).to(tl.int32)
    loss = tl.sum(total, axis=0)
    tokens = tl.sum(counted, axis=0)
    if MEAN:
        loss = tl.where(tokens > 0, loss / tl.maximum(tokens, 1).to(tl.float32), float("nan"))
    tl.store(total_ptr, loss)
    tl.store(counted_ptr, tokens.to(tl.int64))
    tl.store(dropped_ptr, tl.sum(dropped, axis=0).to(tl.int64))


@triton.jit
def _linear_cross_entropy_bwd_kernel(
    sum_ptr,  # gradient of the sum of the losses
    out_ptr,
    dloss_ptr,
    counted_ptr,
    numel,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    scale = tl.load(dloss_ptr)
    if MEAN:
        scale = scale / tl.maximum(tl.load(counted_ptr), 1).to(tl.float32)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(sum_ptr + i, mask=i < numel, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + i, round_to(grad, out_ptr.dtype.element_ty, INTERPRETED), mask=i < numel)


def _scaled(gradient, dloss, counted, mean, dtype):
    """Launch the backward kernel: gradient * dloss (/ counted), rounded once to dtype."""
    out = torch.empty_like(gradient, dtype=dtype)
    if out.numel():
        _linear_cross_entropy_bwd_kernel[(triton.cdiv(out.numel(), 4096),)](
            gradient, out, dloss, counted, out.numel(),
            MEAN=mean, BLOCK=4096, INTERPRETED=INTERPRET, num_warps=8,
        )  # fmt: skip
    return out


def _padded(vocabulary):
    """Row length of the logits: rows then start at multiples of 16 bytes, for any vocabulary."""
    return triton.cdiv(vocabulary, 16) * 16


def _chunk_tokens(t, vocabulary, itemsize, need_w, chunk):
    """Tokens per chunk; without `chunk`, as many as CHUNK_BYTES hold, in chunks of equal size."""
    if chunk is None:
        row = max(1, _padded(vocabulary) * itemsize)
        most = max(128, CHUNK_BYTES * (2 if need_w else 1) // row // 128 * 128)
        chunks = triton.cdiv(t, most)
        chunk = triton.cdiv(triton.cdiv(t, max(1, chunks)), 128) * 128
    return max(1, min(chunk, t))


def _weight_gradient_dtype(t, chunk, dtype):
    """fp32 where chunks are added up, and for fp16, whose range the sum of losses can leave."""
    return torch.float32 if t > chunk or dtype == torch.float16 else dtype


def _add_product(total, a, b, first):
    """total = a b, or total += a b, accumulated in the dtype of total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif not total.is_cuda:
        total.addmm_(a.float(), b.float(), beta=0 if first else 1)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    elif torch.__version__ >= "2.10":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # addmm takes no fp32 addend yet: github.com/pytorch/pytorch/pull/167931
        total.add_(torch.mm(a, b, out_dtype=torch.float32))


def _check(x, w, labels, bias, remap, vocab_size, chunk):
    """Raise ValueError naming the argument, what was expected and what came; gives V."""

    expect_operand("x", x)
    rows, d = expect_matrix("w", w)
    expect("x", x, (*x.shape[:-1], d), (x.dtype,), x)
    expect("w", w, (rows, d), (x.dtype,), x)
    expect("labels", labels, tuple(x.shape[:-1]), (torch.int64,), x)
    expect("bias", bias, (rows,), (x.dtype,), x)
    if remap is not None and remap.dim() != 1:
        raise ValueError(f"remap: expected one dimension, got shape {tuple(remap.shape)}")
    if remap is not None:
        expect("remap", remap, (remap.shape[0],), (torch.int32, torch.int64), x)
    if vocab_size is not None and not 0 <= vocab_size <= rows:
        raise ValueError(f"vocab_size: expected 0 to {rows} (the rows of w), got {vocab_size}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
    return rows if vocab_size is None else vocab_size


_FORWARD = (
    "(Tensor x, Tensor w, Tensor labels, Tensor? bias, Tensor? remap, int ignore_index, bool mean, "
    "int? vocab_size, int? chunk, bool[] needs, int[] config) -> (Tensor loss, Tensor counted, "
    "Tensor dropped, Tensor dx, Tensor dw, Tensor db)"
)
_BACKWARD = (
    "(Tensor dloss, Tensor counted, Tensor? dx, Tensor? dw, Tensor? db, bool mean, "
    "ScalarType dtype) -> Tensor[]"
)


def _outputs(x, w, chunk, needs):
    """loss, counted, dropped, and the gradients of the sum that `needs` asks for (or empty)."""
    need_x, need_w, need_bias = needs
    dw_dtype = _weight_gradient_dtype(x.shape[:-1].numel(), chunk, x.dtype)
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.int64),
        x.new_empty((), dtype=torch.int64),
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(w.shape if need_w else 0, dtype=dw_dtype),
        x.new_empty(w.shape[0] if need_bias else 0, dtype=torch.float32),
    )


@torch.library.custom_op("gatepack::linear_cross_entropy", mutates_args=(), schema=_FORWARD)
def _linear_cross_entropy(
    x, w, labels, bias, remap, ignore_index, mean, vocab_size, chunk, needs, config
):
    v = _check(x, w, labels, bias, remap, vocab_size, chunk)
    check_device("linear_cross_entropy", x)
    t, d, padded = x.shape[:-1].numel(), w.shape[1], _padded(v)
    need_x, need_w, need_bias = needs
    chunk = _chunk_tokens(t, v, x.element_size(), need_w, chunk)
    loss, counted, dropped, dx, dw, db = outputs = _outputs(x, w, chunk, needs)
    if need_w:
        dw[v if t else 0 :].zero_()
    if need_bias:
        db.zero_()
    panel = config_of(Panel, "linear_cross_entropy", config, (t, v, d), x.dtype, x.device)
    with torch.cuda.device_of(x):
        x2, rows, labels = rows_of(x), w[:v], labels.reshape(-1).contiguous()
        remap = None if remap is None else remap.contiguous()
        bias = None if bias is None else F.pad(bias[:v], (0, padded - v))
        token_loss = x.new_empty(t, dtype=torch.float32)
        state = x.new_empty(t, dtype=torch.int32)
        buffer = x.new_empty(chunk if t else 0, padded)
        for start in range(0, t, chunk):
            part = slice(start, min(start + chunk, t))
            tokens = part.stop - start
            # matmuls into given tensors, which autocast leaves alone
            logits = buffer[:tokens, :v]
            torch.mm(x2[part], rows.t(), out=logits)
            _linear_cross_entropy_fwd_kernel[(tokens,)](
                buffer, bias, labels[part], remap, token_loss[part], state[part], v, padded,
                v if remap is None else remap.shape[0], ignore_index,
                WITH_GRAD=any(needs), BLOCK=panel.columns, INTERPRETED=INTERPRET,
                num_warps=panel.num_warps,
            )  # fmt: skip
            if need_x:
                torch.mm(logits, rows, out=rows_of(dx)[part])
            if need_w:
                _add_product(dw[:v], logits.t(), x2[part], first=start == 0)
            if need_bias:
                db[:v] += logits.sum(0, dtype=torch.float32)
        _linear_cross_entropy_fwd_sum_kernel[(1,)](
            token_loss, state, loss, counted, dropped, t, MEAN=mean, BLOCK=2048, num_warps=8
        )
    return outputs


@_linear_cross_entropy.register_fake
def _(x, w, labels, bias, remap, ignore_index, mean, vocab_size, chunk, needs, config):
    v = _check(x, w, labels, bias, remap, vocab_size, chunk)
    chunk = _chunk_tokens(x.shape[:-1].numel(), v, x.element_size(), needs[1], chunk)
    return _outputs(x, w, chunk, needs)


@torch.library.custom_op(
    "gatepack::linear_cross_entropy_backward", mutates_args=(), schema=_BACKWARD
)
def _linear_cross_entropy_backward(dloss, counted, dx, dw, db, mean, dtype):
    """The gradients that are given, scaled and in `dtype`."""
    with torch.cuda.device_of(dloss):
        given = [grad for grad in (dx, dw, db) if grad is not None]
        return [_scaled(grad, dloss, counted, mean, dtype) for grad in given]


@_linear_cross_entropy_backward.register_fake
def _(dloss, counted, dx, dw, db, mean, dtype):
    return [torch.empty_like(g, dtype=dtype) for g in (dx, dw, db) if g is not None]


def _save_for_backward(ctx, inputs, output):
    x, _, _, _, _, _, mean, _, _, needs, _ = inputs
    _, counted, dropped, *gradients = output
    ctx.mark_non_differentiable(counted, dropped, *gradients)
    ctx.set_materialize_grads(False)
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if any(want and not made for want, made in zip(wanted, needs, strict=True)):
        raise RuntimeError(f"linear_cross_entropy: expected needs {wanted}, got {list(needs)}")
    gradients = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    ctx.save_for_backward(counted, *gradients)
    ctx.args = mean, x.dtype
    ctx.wanted = wanted


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 11
    grads = iter(
        torch.ops.gatepack.linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.args)
    )
    dx, dw, db = (next(grads) if want else None for want in ctx.wanted)
    return dx, dw, None, db, *(None,) * 7


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
_linear_cross_entropy_backward.register_autograd(refuse_second_derivative("linear_cross_entropy"))


def linear_cross_entropy_fn(
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    remap: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk: int | None = None,
    config: Panel | None = None,
) -> LinearCrossEntropy:
    """Cross-entropy of x W^T + b against the packed rows of the labels; no [T, V'] tensor.

    x [*, d], w [V', d], bias [V']: fp32, bf16 or fp16, one dtype for all, any strides. labels int64
    [*]. remap int32 or int64 [V]: the row of w for each old token, -1 where it was dropped; None:
    labels are rows of w. vocab_size: rows of w that are real; those past it are padding, with logit
    -inf, not read, and gradient 0. chunk: tokens whose logits exist at once (None: a chunk of 512
    MiB, 1 GiB if w is trained).

    Gives a LinearCrossEntropy, on the device: loss fp32 [], counted and dropped int64 []. Labels
    equal to ignore_index are in neither count. Labels of dropped tokens leave the loss and are
    counted in `dropped`. The mean divides by `counted`; with none it is NaN, as in torch, and all
    gradients are 0. A label outside the vocabulary makes the loss and the gradients NaN.

    Gradients flow to x, w and bias; those that are asked for are computed in the forward pass, so
    run evaluation under torch.no_grad(). The backward leaves them as they are: it may run twice.
    config: a Panel of one row, whose columns are the logits read at a time.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, an unknown reduction, CPU
    tensors outside Triton's interpreter. RuntimeError: a second derivative.
    Source: Liger Kernel, arXiv 2410.10989.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    grad = torch.is_grad_enabled()
    needs = [grad and i is not None and i.requires_grad for i in (x, w, bias)]
    ints = [] if config is None else config.to_ints()
    outputs = torch.ops.gatepack.linear_cross_entropy(
        x, w, labels, bias, remap, ignore_index, reduction == "mean", vocab_size, chunk, needs, ints
    )
    return LinearCrossEntropy(*outputs[:3])
