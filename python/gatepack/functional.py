"""Stage 3, modules: the torch backend, fold-pack and then plain matmuls on the small shapes."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from gatepack import _ext
from gatepack._ext import fold_pack, fold_pack_adjoint
from gatepack._reference import gate_lanes_backward_ref, gate_lanes_ref
from gatepack.paths import packs_again

PLAIN = (torch.Tensor, torch.nn.Parameter)
_PRODUCTS = (torch.float32, torch.bfloat16)
_ops = torch.ops.gatepack

# From so many bytes on, weights are packed past the caches; below, the product finds them in those
# of a core. A step of an MLP of 576 x 1536 with 60 % open and 1,024 tokens, on 2 threads of an AMD
# EPYC, past them and not: bf16 (1.1 MB a weight) 13.1 and 12.6 ms, fp32 (2.1 MB) 40.5 and 41.1 ms.
PAST_CACHES = 2_000_000

# Few tokens feel each look-up: a layer asks several times whether gatepack._C computes.
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch.jit.is_tracing


def has_cpu_passes(x: torch.Tensor) -> bool:
    """Whether gatepack._C computes on x now: on a CPU, outside of tracing and of forward-mode
    differentiation, whose tangents torch does not hand on through custom ops."""
    return (
        x.is_cpu
        and type(x) in PLAIN
        and not _is_compiling()
        and not _is_tracing()
        and forward_ad._current_level < 0
        and _ext.backend().name != "torch"
    )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, u, z):
        ctx.save_for_backward(a, u, z)
        return _ops.swiglu(a, u, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        a, u, z = ctx.saved_tensors
        da, du, dz = _ops.swiglu_backward(dh.contiguous(), a, u, z)
        return da, du, None if z is None else dz


def swiglu(a: torch.Tensor, u: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """silu(a) * u * z; fp32 on a CPU in one pass, and one for all gradients, by gatepack._C.

    a, u [*, n]; z fp32 [n], gate values, or None for 1. Lanes with z = 0 give 0, and dz = 0.
    """
    fits = a.dtype == u.dtype == torch.float32 and a.shape == u.shape
    if fits and a.is_contiguous() and u.is_contiguous() and has_cpu_passes(a):
        return _SwiGLU.apply(a, u, None if z is None else z.contiguous())
    h = F.silu(a) * u
    return h if z is None else gate_lanes(h, z, 1)


class _GateLanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, lanes):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, z)
        ctx.lanes = lanes
        return _multiplied(x, z, lanes)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        if x is None:
            return _multiplied(dy, z, ctx.lanes), None, None
        ours = _in_one_pass(x, z)
        gradients = _ops.gate_lanes_backward if ours else gate_lanes_backward_ref
        return *gradients(dy.contiguous() if ours else dy, x, z, ctx.lanes), None


def _in_one_pass(x: torch.Tensor, z: torch.Tensor) -> bool:
    """Whether gatepack._C multiplies x by gate values z."""
    known = x.dtype in _PRODUCTS and z.dtype == torch.float32
    return known and x.is_contiguous() and z.is_contiguous() and has_cpu_passes(x)


def _multiplied(x: torch.Tensor, z: torch.Tensor, lanes: int) -> torch.Tensor:
    if _in_one_pass(x, z):
        return _ops.gate_lanes(x, z, lanes)
    return gate_lanes_ref(x, z, lanes)


def gate_lanes(x: torch.Tensor, z: torch.Tensor, lanes: int) -> torch.Tensor:
    """x [*, units * lanes] times gate values z fp32 [units], lanes lanes each.

    Units with z = 0 give 0 whatever x holds, and get no gradient. dz is summed in fp32 at least.
    """
    return _GateLanes.apply(x, z, lanes)


def column_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum_t a[t, n] * b[t, n] -> [n], at least fp32; a, b [T, n]."""
    known = a.dtype == b.dtype and a.dtype in _PRODUCTS and a.is_contiguous() and b.is_contiguous()
    if known and has_cpu_passes(a):
        return _ops.column_products(a, b)
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return (a * b).sum(0)


def _packs_lanes(x: torch.Tensor) -> bool:
    """Whether fold_pack moves the lanes of x: it takes a third to a half of the time of torch's
    gather and scatter_ (CPU, fp32, 512 and 2,048 tokens of 384 to 3,072 lanes, 77 % of them)."""
    return x.is_floating_point() and x.element_size() > 1 and has_cpu_passes(x)


class _TakeLanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.width = x.shape[-1]
        if _packs_lanes(x):
            taken = fold_pack(tokens_of(x).contiguous(), None, index)
            return taken.view(*x.shape[:-1], len(index))
        return torch.gather(x, -1, index.expand(*x.shape[:-1], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (index,) = ctx.saved_tensors
        return spread_lanes(dy, index, ctx.width), None


class _SpreadLanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, index, width):
        ctx.save_for_backward(index)
        if _packs_lanes(y):
            y2 = tokens_of(y).contiguous()
            full = fold_pack_adjoint(y2, None, index, None, None, len(y2), width)
            return full.view(*y.shape[:-1], width)
        full = y.new_zeros(*y.shape[:-1], width)
        return full.scatter_(-1, index.expand(*y.shape[:-1], -1), y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        (index,) = ctx.saved_tensors
        return take_lanes(dx, index), None, None


def take_lanes(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[..., index] for sorted unique int64 index [n].

    gather and scatter_ take about a quarter of the time of index_select and index_copy here (CPU,
    fp32, 1,024 tokens of 384 to 1,536 lanes), and both passes are free of atomics.
    """
    return _TakeLanes.apply(x, index)


def spread_lanes(y: torch.Tensor, index: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of take_lanes: y [*, n] at index of [*, width], 0 elsewhere."""
    return _SpreadLanes.apply(y, index, width)


def lane_values(z: torch.Tensor | None, lanes: int) -> torch.Tensor | None:
    """Gate values per unit [n] -> per lane [n * lanes]."""
    return z if z is None or lanes == 1 else z.repeat_interleave(lanes)


class FoldedLinear(torch.autograd.Function):
    """y = z_out * (W[R, C] (z_in * x) + b[R]) on compact lanes, gates folded into W[R, C].

    x [*, |C|] and y [*, |R|] hold open lanes only; w [N, K] and bias [N] are full; rows R and cols
    C are sorted unique int64 lane indices or None for all; z_in and z_out are fp32 per open unit,
    in_lanes and out_lanes lanes each, or None for 1. dtype is that of the matmul (x's). Gradients:
    x, w, bias, z_in, z_out; those of the gates come from dz_in = colsum(x * dx) / z_in and dz_out =
    colsum(dy * y) / z_out, so neither a weight gradient nor an ungated tensor is kept for them; a
    unit with z = 0 gets 0, as a clamped gate has no gradient. With many tokens on a CPU the packed
    weight is not kept either, but packed anew (gatepack.paths.packs_again).
    """

    @staticmethod
    def forward(ctx, x, w, bias, z_in, z_out, rows, cols, in_lanes, out_lanes):
        lane_in = lane_values(z_in, in_lanes)
        lane_out = lane_values(z_out, out_lanes)
        packed = _packed_weight(w, rows, cols, lane_out, lane_in, x.dtype)
        tokens = x.numel() // max(x.shape[-1], 1)
        kept = packed.numel() / max(w.numel(), 1)
        ctx.again = packs_again(tokens, w.shape, x.device, kept)
        packed_bias = None
        if bias is not None:
            packed_bias = bias if rows is None else bias.index_select(0, rows)
            packed_bias = (packed_bias if lane_out is None else packed_bias * lane_out).to(x.dtype)
        y = F.linear(x, packed, packed_bias)
        wants_z_in = z_in is not None and ctx.needs_input_grad[3]
        wants_z_out = z_out is not None and ctx.needs_input_grad[4]
        wants_w = ctx.needs_input_grad[1]
        ctx.save_for_backward(
            x if wants_z_in or wants_w else None,
            w if ctx.again else packed,
            z_in,
            z_out,
            y if wants_z_out else None,
            rows,
            cols,
        )
        ctx.shape, ctx.w_dtype, ctx.lanes = w.shape, w.dtype, (in_lanes, out_lanes)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, packed, z_in, z_out, y, rows, cols = ctx.saved_tensors
        in_lanes, out_lanes = ctx.lanes
        needs_x, needs_w, needs_b, needs_z_in, needs_z_out, *_ = ctx.needs_input_grad
        dy2 = tokens_of(dy)
        x2 = None if x is None else tokens_of(x)
        lane_in, lane_out = lane_values(z_in, in_lanes), lane_values(z_out, out_lanes)
        dx = dw = db = dz_in = dz_out = None
        if needs_x or (needs_z_in and z_in is not None):
            if ctx.again:
                packed = _packed_weight(packed, rows, cols, lane_out, lane_in, dy.dtype)
            dx2 = dy2 @ packed
            dx = dx2.reshape(*dy.shape[:-1], dx2.shape[-1]) if needs_x else None
            if needs_z_in and z_in is not None:
                dz_in = unit_gradient(column_dot(x2, dx2), z_in, in_lanes)
        if needs_z_out and z_out is not None:
            dz_out = unit_gradient(column_dot(dy2, tokens_of(y)), z_out, out_lanes)
        if needs_w:
            dw = fold_pack_adjoint(
                dy2.t() @ x2, rows, cols, lane_out, lane_in, *ctx.shape, ctx.w_dtype
            )
        if needs_b:
            db = bias_gradient(dy2, lane_out, rows, ctx.shape[0], ctx.bias_dtype)
        return dx, dw, db, dz_in, dz_out, None, None, None, None


def _packed_weight(w, rows, cols, lane_out, lane_in, dtype: torch.dtype) -> torch.Tensor:
    """fold_pack of a weight for the product of one pass."""
    kept = [
        size if index is None else len(index)
        for size, index in zip(w.shape, (rows, cols), strict=True)
    ]
    past = math.prod(kept) * dtype.itemsize >= PAST_CACHES
    return fold_pack(w, rows, cols, lane_out, lane_in, dtype, stream=past)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def bias_gradient(dy, lane_out, rows, size, dtype) -> torch.Tensor:
    db = dy.sum(0)
    db = (db if lane_out is None else db * lane_out).to(dtype)
    return db if rows is None else db.new_zeros(size).index_copy_(0, rows, db)


def unit_gradient(per_lane: torch.Tensor, z: torch.Tensor, lanes: int) -> torch.Tensor:
    per_unit = per_lane.reshape(-1, lanes).sum(1)
    return torch.where(z > 0, per_unit / z, 0.0).to(z.dtype)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, a, b, scaling, z_in, z_out, rows, cols, in_lanes, out_lanes):
        packed_a, packed_b = a.to(x.dtype), b.to(x.dtype)
        if cols is not None or z_in is not None:
            packed_a = fold_pack(a, None, cols, None, lane_values(z_in, in_lanes), x.dtype)
        if rows is not None or z_out is not None:
            packed_b = fold_pack(b, rows, None, lane_values(z_out, out_lanes), None, x.dtype)
        inner = F.linear(tokens_of(x), packed_a).mul_(scaling)
        ctx.save_for_backward(x, inner, packed_a, packed_b, z_in, z_out, rows, cols)
        ctx.scaling, ctx.lanes = scaling, (in_lanes, out_lanes)
        ctx.a, ctx.b = (a.shape, a.dtype), (b.shape, b.dtype)
        if y.dtype == x.dtype:
            return torch.addmm(tokens_of(y), inner, packed_b.t()).view(y.shape)
        return y + F.linear(inner, packed_b).to(y.dtype).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, inner, packed_a, packed_b, z_in, z_out, rows, cols = ctx.saved_tensors
        in_lanes, out_lanes = ctx.lanes
        needs_y, needs_x, needs_a, needs_b, _, needs_z_in, needs_z_out, *_ = ctx.needs_input_grad
        dx = da = db = dz_in = dz_out = None
        dy2 = tokens_of(dy).to(x.dtype)
        d_inner = (dy2 @ packed_b).mul_(ctx.scaling)
        if needs_x:
            dx = (d_inner @ packed_a).view(x.shape)
        if needs_a or needs_z_in:
            da = d_inner.t() @ tokens_of(x)
            if z_in is not None and needs_z_in:
                dz_in = unit_gradient(column_dot(da, packed_a), z_in, in_lanes)
            da = _spread_factor(da, None, cols, None, lane_values(z_in, in_lanes), *ctx.a)
        if needs_b or needs_z_out:
            db = dy2.t() @ inner
            if z_out is not None and needs_z_out:
                dz_out = unit_gradient(column_dot(db.t(), packed_b.t()), z_out, out_lanes)
            db = _spread_factor(db, rows, None, lane_values(z_out, out_lanes), None, *ctx.b)
        return dy if needs_y else None, dx, da, db, None, dz_in, dz_out, None, None, None, None


def _spread_factor(grad, rows, cols, lane_out, lane_in, shape, dtype) -> torch.Tensor:
    """The gradient of a packed factor as one of the whole factor."""
    if grad.shape == shape and lane_out is None and lane_in is None:
        return grad.to(dtype)
    return fold_pack_adjoint(grad, rows, cols, lane_out, lane_in, *shape, dtype)


def add_low_rank(y, x, a, b, scaling, z_in, z_out, rows, cols, in_lanes, out_lanes) -> torch.Tensor:
    """y + s * z_out * (B[R] (A[:, C] (z_in * x))) on compact lanes, gates folded into the factors.

    y [*, |R|], x [*, |C|], a [r, K], b [N, r]; gates, R and C as in FoldedLinear. The product is
    one of x's dtype. Gradients of all but s; those of the gates come from the r-row factors.
    """
    return _LowRank.apply(y, x, a, b, scaling, z_in, z_out, rows, cols, in_lanes, out_lanes)


def sampled_values(gates, number: torch.Tensor | int | None) -> torch.Tensor:
    """Gate values fp32 [N] of a GateSet by the kernel: one launch, noise from Philox, no host sync.

    The noise depends on the seed and the number of the draw (None: no noise), which stays on the
    device: a captured CUDA graph draws anew on each replay.
    """
    from gatepack.kernels import sample_gates_fn

    noise = number is not None
    return sample_gates_fn(
        gates.logits,
        gates.offsets(),
        max_segment=max(gate.size for gate in gates.gates.values()),
        seed=gates.config.seed,
        draw=torch.as_tensor(number, device=gates.logits.device) if noise else None,
        estimator=gates.config.estimator,
        sigma=gates.config.noise,
        noise=noise,
        closed=gates.closed,
    )[0]
