"""Stage 2, kernels: the gated activation of an MLP over its open channels, kept compact.

    a = Wa x + s Ba (Aa x) + ba      u likewise      h = act(a) * u * z      (or h = act(u) * z)

Channels whose gate is exactly 0 are neither read nor computed: h has one column for each open
channel, in ascending order. With g = act(a) * u, all over open channels,

    du = dh * z * act(a)      dx  = da Wa + du Wu + v A       v  = s d B   of each branch
    da = dh * z * u * act'(a) dW  = d^T x                     dA = v^T x
    dz = colsum(dh * g)       db  = colsum(d)                 dB = d^T (s A x)

with d = da or du. dz of a closed channel is defined as 0: a clamped gate has no gradient there.
The backward reads a and u, kept compact, or computes them again. Every sum has a fixed order: the
same input gives the same bits.

Source: FineGates, arXiv 2412.12951 (gates); GLU variants, arXiv 2002.05202 (activation).
"""

import torch
import torch.nn.functional as F

from ._common import (
    check_device,
    config_of,
    expect,
    expect_matrix,
    expect_operand,
    refuse_second_derivative,
    rows_of,
)
from ._configs import GatedMLPConfig
from .glu_backward import glu_dx, glu_gradients
from .glu_common import Branch, Slots, joined, project, slots_outer, slots_times
from .glu_forward import glu_forward
from .open_sets import open_set

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
}


def linear_with_lora(x, w, bias, lora):
    """W x + b + s B (A x) in plain torch; lora (A, B, s) or None."""
    y = F.linear(x, w, bias)
    if lora is not None:
        a, b, scale = lora
        y = y + scale * F.linear(F.linear(x, a), b)
    return y


def gated_swiglu_ref(
    x, w_a, w_u, z=None, *, bias_a=None, bias_u=None, lora_of_a=None, lora_of_u=None,
    activation="silu", capacity=None, packed=False, recompute=False
):  # fmt: skip
    """h = act(a) * u * z of the open channels in plain torch, in the dtype of x.

    Same arguments and gradients as gated_swiglu_fn, any floating dtype; fp64 makes it the truth.
    Reads the gates on the host.
    """
    act = ACTIVATIONS[activation]
    u = linear_with_lora(x, w_u, bias_u, lora_of_u)
    h = act(u) if w_a is None else act(linear_with_lora(x, w_a, bias_a, lora_of_a)) * u
    if z is not None:
        h = h * torch.where(z != 0, z, 0.0).to(h.dtype)
    if z is None or packed:
        return h
    n_open, capacity = int((z != 0).sum()), len(z) if capacity is None else capacity
    if n_open > capacity:
        return h[..., :capacity] * float("nan")
    return F.pad(h[..., z != 0], (0, capacity - n_open))


def expect_lora(name, a, b, n, k, like):
    """Check the factors of one linear [n, k]."""
    rank = 0 if a is None or a.dim() == 0 else a.shape[0]
    expect(f"{name}[0]", a, (rank, k), like.dtype, like)
    expect(f"{name}[1]", b, (n, rank), like.dtype, like)


def check(x, w_a, w_u, z, bias_a, bias_u, lora_a, lora_u, activation, capacity, gathers):
    """What gated_swiglu and gated_mlp refuse alike; lora_a and lora_u are (A, B)."""
    expect_operand("x", x)
    f, k = expect_matrix("w_u", w_u)
    expect("x", x, (*x.shape[:-1], k), x.dtype, x)
    for name, tensor, shape in (
        ("w_u", w_u, (f, k)), ("w_a", w_a, (f, k)), ("bias_a", bias_a, (f,)),
        ("bias_u", bias_u, (f,)),
    ):  # fmt: skip
        expect(name, tensor, shape, x.dtype, x)
    expect("z", z, (f,), torch.float32, x)
    expect_lora("lora_of_a", *lora_a, f, k, x)
    expect_lora("lora_of_u", *lora_u, f, k, x)
    for name, tensor in (("bias_a", bias_a), ("lora_of_a", lora_a[0])):
        if w_a is None and tensor is not None:
            raise ValueError(f"{name}: expected None where w_a is None, got a tensor")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {activation!r}")
    if not gathers and capacity != f:
        raise ValueError(
            f"capacity: expected None or {f} where no channel is looked up, got {capacity}"
        )
    if not 0 <= capacity <= f:
        raise ValueError(f"capacity: expected between 0 and {f} (channels), got {capacity}")


def lora_parts(name, lora):
    """(A, B, s) of an argument (A, B, s), or of None."""
    if lora is None:
        return None, None, 1.0
    # A union of types cannot be traced on Python 3.10.
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise ValueError(f"{name}: expected (A, B, scale) or None, got {type(lora).__name__}")
    if lora[0] is None or lora[1] is None:
        raise ValueError(f"{name}: expected (A, B, scale) or None, got a factor None")
    return lora


def tiles_of(op, config, t, w_u, w_a, x):
    """The op's GatedMLPConfig: given as integers, or chosen."""
    shape = (t, *w_u.shape, 1 if w_a is None else 2)
    return config_of(GatedMLPConfig, op, config, shape, x.dtype, x.device)


def branches_of(w_a, w_u, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u, scale_a, scale_u):
    """The two Branches, biases contiguous."""
    bias_a, bias_u = (None if b is None else b.contiguous() for b in (bias_a, bias_u))
    a = Branch(w_a, bias_a, a_of_a, b_of_a, scale_a)
    return a, Branch(w_u, bias_u, a_of_u, b_of_u, scale_u)


def slots_of(f, z, opened, capacity):
    """The Slots of f channels; `opened` is the open set, or empty where none is looked up."""
    z = None if z is None else z.contiguous()
    return Slots(f, capacity, z, opened if opened.numel() else None)


def or_empty(tensor, like):
    """The tensor, or an empty one for None: operators return tensors."""
    return like.new_empty(0) if tensor is None else tensor


def or_none(tensor):
    """The tensor [T, n], or None for what or_empty puts in its place."""
    return tensor if tensor.dim() == 2 else None


def branch_gradients(grads, needs, a, u, x, p, slots, tiles):
    """Add to `grads` what `needs` names of dx, dw_*, da_of_* and db_of_*, from da and du."""
    v = {}
    for name, branch in (("a", a), ("u", u)):
        wanted = "dx" in needs or f"da_of_{name}" in needs
        if branch.rank and wanted:
            v[name] = slots_times(
                grads[f"d{name}"], branch.lora_b.t(), slots, tiles.low, branch.scale
            )
    if "dx" in needs:
        both = joined(list(v.values()), dim=1)
        grads["dx"] = glu_dx(grads["da"], grads["du"], a, u, slots, both, tiles.dx)
    first = 0
    for name, branch in (("a", a), ("u", u)):
        d = grads[f"d{name}"]
        if f"dw_{name}" in needs:
            grads[f"dw_{name}"] = slots_outer(d, x, slots, tiles.dw, branch.w)
        if f"da_of_{name}" in needs:
            grads[f"da_of_{name}"] = low_rank_outer(v.get(name), x, branch.lora_a)
        if f"db_of_{name}" in needs:
            if branch.rank:
                part = p[:, first : first + branch.rank]
                grads[f"db_of_{name}"] = slots_outer(d, part, slots, tiles.low, branch.lora_b)
            else:
                grads[f"db_of_{name}"] = torch.empty_like(branch.lora_b)
        first += branch.rank


def low_rank_outer(v, x, like):
    """v^T x laid out as `like` [r, K], for r >= 0."""
    out = torch.empty_like(like)
    return torch.mm(v.t(), x, out=out) if like.numel() else out


_TENSORS = (
    "Tensor x, Tensor? w_a, Tensor w_u, Tensor? z, Tensor? bias_a, Tensor? bias_u, "
    "Tensor? a_of_a, Tensor? b_of_a, Tensor? a_of_u, Tensor? b_of_u"
)
_SETTINGS = "float scale_a, float scale_u, str activation, int capacity, int[] config"
_FORWARD = (
    f"({_TENSORS}, bool gathers, bool keep, {_SETTINGS}) "
    "-> (Tensor h, Tensor a, Tensor u, Tensor p, Tensor opened)"
)
_BACKWARD = (
    f"(Tensor dh, {_TENSORS.replace('Tensor x', 'Tensor? x')}, Tensor a, Tensor u, Tensor p, "
    f"Tensor opened, bool[] needs, {_SETTINGS}) -> Tensor[]"
)
_NAMES = ("x", "w_a", "w_u", "z", "b_a", "b_u", "a_of_a", "b_of_a", "a_of_u", "b_of_u")
_READ_X = ("w_a", "w_u", "a_of_a", "a_of_u")  # what needs x for its gradient


@torch.library.custom_op("gatepack::gated_swiglu", mutates_args=(), schema=_FORWARD)
def _gated_swiglu(
    x, w_a, w_u, z, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u, gathers, keep, scale_a,
    scale_u, activation, capacity, config,
):  # fmt: skip
    """h, and what the backward needs: a, u, p = s A x of both branches, the open set, or empty."""
    loras = (a_of_a, b_of_a), (a_of_u, b_of_u)
    check(x, w_a, w_u, z, bias_a, bias_u, *loras, activation, capacity, gathers)
    check_device("gated_swiglu", x)
    with torch.cuda.device_of(x):
        x2 = rows_of(x)
        opened = open_set(z) if gathers else x.new_empty(0, dtype=torch.int32)
        slots = slots_of(w_u.shape[0], z, opened, capacity)
        branches = branches_of(w_a, w_u, bias_a, bias_u, *loras[0], *loras[1], scale_a, scale_u)
        tiles = tiles_of("gated_swiglu", config, x2.shape[0], w_u, w_a, x)
        p = project(x2, branches)
        h, a, u = glu_forward(
            x2, *branches, slots, p, activation, tiles.fwd, "hau" if keep else "h", fill=True
        )
        return (
            h.view(*x.shape[:-1], capacity), *(or_empty(t, x) for t in (a, u, p)), opened,
        )  # fmt: skip


@_gated_swiglu.register_fake
def _(
    x, w_a, w_u, z, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u, gathers, keep, scale_a,
    scale_u, activation, capacity, config,
):  # fmt: skip
    loras = (a_of_a, b_of_a), (a_of_u, b_of_u)
    check(x, w_a, w_u, z, bias_a, bias_u, *loras, activation, capacity, gathers)
    t, rank = x.shape[:-1].numel(), sum(0 if a is None else a.shape[0] for a, _ in loras)
    return (
        x.new_empty(*x.shape[:-1], capacity),
        x.new_empty((t, capacity) if keep and w_a is not None else 0),
        x.new_empty((t, capacity) if keep else 0),
        x.new_empty((t, rank) if rank else 0),
        x.new_empty(z.shape[0] + 1 if gathers else 0, dtype=torch.int32),
    )


@torch.library.custom_op("gatepack::gated_swiglu_backward", mutates_args=(), schema=_BACKWARD)
def _gated_swiglu_backward(
    dh, x, w_a, w_u, z, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u, a, u, p, opened, needs,
    scale_a, scale_u, activation, capacity, config,
):  # fmt: skip
    """The gradients that `needs` asks for, in the order of _NAMES; x None if none reads it."""
    with torch.cuda.device_of(dh):
        x2, dh2 = None if x is None else rows_of(x), rows_of(dh)
        slots = slots_of(w_u.shape[0], z, opened, capacity)
        branches = branches_of(
            w_a, w_u, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u, scale_a, scale_u
        )
        tiles = tiles_of("gated_swiglu", config, dh2.shape[0], w_u, w_a, dh)
        a, u, p = (or_none(t) for t in (a, u, p))
        if u is None:
            _, a, u = glu_forward(x2, *branches, slots, p, activation, tiles.fwd, "au")
        asked = [f"d{name}" for name, needed in zip(_NAMES, needs, strict=True) if needed]
        sums = {"dz": z, "db_a": bias_a, "db_u": bias_u}
        sums = {name: like for name, like in sums.items() if name in asked}
        grads = glu_gradients(slots, a, u, activation, tiles.dh, sums, dh=dh2)
        branch_gradients(grads, asked, *branches, x2, p, slots, tiles)
        if "dx" in asked:
            grads["dx"] = grads["dx"].view(*dh.shape[:-1], w_u.shape[1])
        return [grads[name] for name in asked]


@_gated_swiglu_backward.register_fake
def _(
    dh, x, w_a, w_u, z, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u, a, u, p, opened, needs,
    *settings,
):  # fmt: skip
    tensors = (w_a, w_u, z, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u)
    dx = [dh.new_empty(*dh.shape[:-1], w_u.shape[1])] if needs[0] else []
    return dx + gradients_like(tensors, needs[1:])


def gradients_like(tensors, needs):
    """What the backward returns for parameters, uninitialised: matrices keep their strides."""
    return [
        torch.empty_like(t) if t.dim() == 2 else t.new_empty(t.shape)
        for t, needed in zip(tensors, needs, strict=True)
        if needed
    ]


def differentiate(op, name, names):
    """Registers the autograd of gated_swiglu or gated_mlp.

    The op takes the tensors called `names`, then gathers, keep and its settings; its first result
    alone has a gradient, and its backward takes that, the tensors, the other results, which of
    `names` need a gradient, and the settings.
    """
    backward_op = getattr(torch.ops.gatepack, f"{name}_backward")

    def save_for_backward(ctx, inputs, output):
        tensors, (_, keep, *settings) = inputs[: len(names)], inputs[len(names) :]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        needs = [t is not None and ctx.needs_input_grad[i] for i, t in enumerate(tensors)]
        reads_x = not keep or any(needs[i] for i, name in enumerate(names) if name in _READ_X)
        ctx.save_for_backward(tensors[0] if reads_x else None, *tensors[1:], *output[1:])
        ctx.args = needs, *settings

    def backward(ctx, grad, *_):
        needs, *settings = ctx.args
        others = (None,) * (2 + len(settings))  # gathers, keep, settings
        if grad is None:
            return *(None for _ in names), *others
        grads = iter(backward_op(grad, *ctx.saved_tensors, *ctx.args))
        return *(next(grads) if needed else None for needed in needs), *others

    op.register_autograd(backward, setup_context=save_for_backward)


differentiate(_gated_swiglu, "gated_swiglu", _NAMES)
_gated_swiglu_backward.register_autograd(refuse_second_derivative("gated_swiglu"))


def any_requires_grad(*tensors):
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def gated_swiglu_fn(
    x: torch.Tensor,
    w_a: torch.Tensor | None,
    w_u: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    bias_a: torch.Tensor | None = None,
    bias_u: torch.Tensor | None = None,
    lora_of_a: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    lora_of_u: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    activation: str = "silu",
    capacity: int | None = None,
    packed: bool = False,
    recompute: bool = False,
    config: GatedMLPConfig | None = None,
) -> torch.Tensor:
    """h = act(a) * u * z of the open channels, a = Wa x + s Ba (Aa x) + ba and u likewise.

    x [*, K], w_a and w_u [F, K] of any strides (row-major is the fast one), biases [F], lora_of_*
    (A [r, K], B [F, r], s): fp32, bf16 or fp16, one dtype for all; z fp32 [F]. w_a None: the form
    with two matrices, h = act(u) * z. h [*, capacity] in x.dtype, compact: column i belongs to the
    i-th channel with z != 0, columns past the last one are 0. capacity None is F. If more channels
    are open, h and the gradients are NaN. activation: "silu", "gelu", "gelu_tanh" or "relu".

    packed: the weights, biases and z hold open channels only; none is looked up, and channel i is
    column i. So it is where z is None.

    Gradients flow to every tensor that asks for one, in full shape: dz is fp32, 0 for closed
    channels, as are the rows of dW. a and u are kept for it, compact, or with recompute=True
    computed again from x. fp32 products follow torch.get_float32_matmul_precision(). config None
    takes the tiles of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, bias_a or lora_of_a without
    w_a, an unknown activation, a capacity above F or beside packed weights, CPU tensors outside
    Triton's interpreter. RuntimeError: a second derivative.
    """
    a_of_a, b_of_a, scale_a = lora_parts("lora_of_a", lora_of_a)
    a_of_u, b_of_u, scale_u = lora_parts("lora_of_u", lora_of_u)
    tensors = (x, w_a, w_u, z, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u)
    return torch.ops.gatepack.gated_swiglu(
        *tensors, z is not None and not packed, any_requires_grad(*tensors) and not recompute,
        scale_a, scale_u, activation, w_u.shape[0] if capacity is None else capacity,
        [] if config is None else config.to_ints(),
    )[0]  # fmt: skip
