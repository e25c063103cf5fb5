"""Stage 3, modules: few tokens on a CPU, times the open part of a weight where it lies.

gatepack._C reads the open rows and columns of W, forward and backward, and nothing is packed.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gatepack import _env, _ext
from gatepack.functional import (
    PLAIN,
    FoldedLinear,
    bias_gradient,
    column_dot,
    has_cpu_passes,
    lane_values,
    tokens_of,
    unit_gradient,
)

# Up to how many tokens gatepack._C multiplies with a weight where it lies on a CPU, by instruction
# set: from there on packing it and torch's blocked matmul are faster. 2 threads of an AMD EPYC, 576
# x 1536 with 60 % open, fp32: forward and backward of a row-gated weight take 64, 114, 248 and 937
# us with 1, 4, 16 and 64 tokens (AVX2 77, 164, 449 and 1710), of a column-gated one 107, 178, 427
# and 1493 us (AVX2 122, 272, 770 and 2909), and torch's in full 152, 402, 610 and 1900. In
# training, an MLP is faster in place with 128 tokens and packed with 192.
FEW_TOKENS = {
    "avx512": {torch.float32: 128, torch.bfloat16: 4},
    "avx2": {torch.float32: 16, torch.bfloat16: 1},
    "scalar": {torch.float32: 4, torch.bfloat16: 1},
}

# Of these, up to how many tokens an ungated linear takes: torch's product of one token runs on one
# thread (benchmarks/levels/decode.py). With more, a packed model gives what torch gives, bit for
# bit.
DECODED = {torch.float32: 4, torch.bfloat16: 1}
_ops = torch.ops.gatepack


@functools.cache
def few_tokens() -> dict[torch.dtype, int]:
    """Of FEW_TOKENS, what holds for the loaded gatepack._C."""
    return FEW_TOKENS[_ext.build_info()["simd"]]


def tokens_in_place(w: torch.Tensor) -> int:
    """Up to how many tokens open_linear multiplies with w [N, K] now, 0 where it does not.

    A frozen weight on a CPU, fp32 or bf16, with stride 1 along K, outside of tracing and autocast.
    """
    return few_tokens().get(w.dtype, 0) if _multiplies(w) and _lies_ready(w) else 0


def _multiplies(x: torch.Tensor) -> bool:
    """Whether gatepack._C, whose products are of their operands' dtype, multiplies with x now."""
    return has_cpu_passes(x) and not torch.is_autocast_enabled("cpu")


def tokens_decoded(w: torch.Tensor) -> int:
    """Up to how many tokens linear multiplies with w by gatepack._C where no gradient is wanted."""
    return min(DECODED.get(w.dtype, 0), tokens_in_place(w))


def _is_few(x: torch.Tensor, most: dict[torch.dtype, int]) -> bool:
    """Whether x [*, K] has tokens, and at most those of its dtype."""
    return 0 < x.numel() // max(x.shape[-1], 1) <= most.get(x.dtype, 0)


def _fits(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether gatepack._C, if it computes on x, multiplies x with w and adds the bias."""
    alike = x.dtype == w.dtype and x.device == w.device and _lies_ready(w)
    return alike and (bias is None or bias.dtype == w.dtype)


def _lies_ready(w: torch.Tensor) -> bool:
    """Whether gatepack._C can multiply with w where it lies, and no gradient of w is wanted."""
    frozen = not (w.requires_grad and torch.is_grad_enabled())
    return frozen and w.stride(-1) == 1 and type(w) in PLAIN


class _OpenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, z_in, z_out, rows, cols, in_lanes, out_lanes):
        x2 = tokens_of(x).contiguous()
        lanes = out_lanes, in_lanes
        y = _ops.open_linear.default(x2, w, bias, rows, cols, z_out, z_in, *lanes)
        _, _, needs_bias, needs_z_in, needs_z_out, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x2 if needs_z_in else None, y if needs_z_out else None, w, rows, cols, z_out, z_in
        )
        ctx.lanes = lanes
        ctx.bias_dtype = bias.dtype if needs_bias else None
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, w, rows, cols, z_out, z_in = saved = ctx.saved_tensors
        needs_x, _, needs_bias, needs_z_in, needs_z_out, *_ = ctx.needs_input_grad
        dy2 = tokens_of(dy).contiguous()
        dx = dz_out = dz_in = db = None
        if needs_x or needs_z_in:
            dx, dz_out, dz_in = _ops.open_linear_backward.default(dy2, *saved, *ctx.lanes)
            dx = dx.view(*dy.shape[:-1], dx.shape[1])
        elif needs_z_out:
            dz_out = unit_gradient(column_dot(dy2, y), z_out, ctx.lanes[0])
        if needs_bias:
            lane_out = lane_values(z_out, ctx.lanes[0])
            db = bias_gradient(dy2, lane_out, rows, w.shape[0], ctx.bias_dtype)
        dz_in, dz_out = dz_in if needs_z_in else None, dz_out if needs_z_out else None
        return dx, None, db, dz_in, dz_out, None, None, None, None


def open_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    z_in: torch.Tensor | None = None,
    z_out: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    cols: torch.Tensor | None = None,
    in_lanes: int = 1,
    out_lanes: int = 1,
) -> torch.Tensor | None:
    """z_out * (W[R, C] (z_in * x) + b[R]) by gatepack._C, which reads W where it lies.

    Arguments as in FoldedLinear. None where that is not computed so: for more than
    tokens_in_place(w) tokens, or none, and in another dtype than that of w.
    """
    if not _multiplies(x) or not _is_few(x, few_tokens()) or not _fits(x, w, bias):
        return None
    if x.shape[-1] != (w.shape[1] if cols is None else cols.shape[0]):
        return None
    arguments = x, w, bias, z_in, z_out, rows, cols, in_lanes, out_lanes
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:5]):
        return _OpenLinear.apply(*arguments)
    # A Function costs 10 us a call, a tenth of a decoding step.
    y = _ops.open_linear.default(
        tokens_of(x).contiguous(), w, bias, rows, cols, z_out, z_in, out_lanes, in_lanes
    )
    return y.view(*x.shape[:-1], y.shape[1])


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """W x + b; by gatepack._C for the DECODED tokens of a step without gradients, else torch's."""
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    y = open_linear(x, w, bias) if _is_few(x, DECODED) and not wants_grad else None
    return F.linear(x, w, bias) if y is None else y


def folded_linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, *gates
) -> torch.Tensor:
    """FoldedLinear, by open_linear where that computes it; arguments as in FoldedLinear.

    Where no gate or index is given, torch's linear. GATEPACK_BACKEND=folded packs whatever the
    number of tokens.
    """
    y = None if _env.backend() else open_linear(x, w, bias, *gates)
    if y is not None:
        return y
    if all(part is None for part in gates[:4]):
        return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return FoldedLinear.apply(x, w, bias, *gates)


class _OpenMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_a, w_u, w_d, bias_a, bias_u, bias_d, z, index):
        x2 = tokens_of(x).contiguous()
        a = _ops.open_linear.default(x2, w_a, bias_a, index, None, None, None, 1, 1)
        u = _ops.open_linear.default(x2, w_u, bias_u, index, None, None, None, 1, 1)
        h = _ops.swiglu.default(a, u, z)
        ctx.save_for_backward(a, u, w_a, w_u, w_d, z, index)
        return _ops.open_linear.default(h, w_d, bias_d, None, index, None, None, 1, 1).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, u, w_a, w_u, w_d, z, index = ctx.saved_tensors
        times = _ops.open_linear_backward.default
        dy2, dx = tokens_of(dy).contiguous(), None
        dh = times(dy2, None, None, w_d, None, index, None, None, 1, 1)[0]
        da, du, dz = _ops.swiglu_backward.default(dh, a, u, z)
        if ctx.needs_input_grad[0]:
            dx = times(da, None, None, w_a, index, None, None, None, 1, 1)[0]
            dx += times(du, None, None, w_u, index, None, None, None, 1, 1)[0]
            dx = dx.view(dy.shape)
        dz = dz if ctx.needs_input_grad[7] else None
        return dx, None, None, None, None, None, None, dz, None


def open_mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    z: torch.Tensor | None,
    index: torch.Tensor | None,
) -> torch.Tensor | None:
    """Wd (silu(Wa x + ba) * (Wu x + bu) * z) + bd over open channels, where open_linear computes.

    x [*, K] fp32; weights Wa, Wu [F, K] and Wd [K, F], and their biases or None; z fp32 [n] of the
    open channels, or None for 1; index int64 [n], None: all. None where it is not computed so.
    """
    if x.dtype != torch.float32 or not _multiplies(x) or not _is_few(x, few_tokens()):
        return None
    if not all(_fits(x, w, b) for w, b in zip(weights, biases, strict=True)):
        return None
    if any(b is not None and b.requires_grad for b in biases):
        return None
    return _OpenMLP.apply(x, *weights, *biases, z, index)
