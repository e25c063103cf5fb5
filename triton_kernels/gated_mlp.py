"""Stage 2, kernels: a whole MLP over its open channels, dense in and dense out.

    h = act(a) * u * z   (or act(u) * z)      y = Wd h + s Bd (Ad h) + bd

with a and u of gated_swiglu. h [T, capacity] stays compact and is not kept: its gradient
dh = dy Wd + v Ad, v = s dy Bd, goes from the matrix units straight through the activation, in one
kernel that also makes da, du, h again where a weight gradient reads it, and dz = colsum(dh * g),
g = act(a) * u. What follows is gated_swiglu's, and

    dWd = dy^T h      dBd = dy^T (s Ad h)      dAd = v^T h      dbd = colsum(dy)

Where no channel is looked up (no gate, or packed weights), products without an epilogue go to
torch. Every sum has a fixed order: the same input gives the same bits.

Source: FineGates, arXiv 2412.12951 (gates); GLU variants, arXiv 2002.05202 (MLP).
"""

import torch

from ._common import check_device, expect, product, refuse_second_derivative, rows_of
from ._configs import GatedMLPConfig
from .column_sums import column_sums
from .gated_matmul import gated_matmul
from .gated_swiglu import (
    any_requires_grad,
    branch_gradients,
    branches_of,
    check,
    differentiate,
    expect_lora,
    gated_swiglu_ref,
    gradients_like,
    linear_with_lora,
    lora_parts,
    low_rank_outer,
    or_empty,
    or_none,
    slots_of,
    tiles_of,
)
from .glu_backward import glu_gradients
from .glu_common import Branch, project, scaled_mm, slots_outer, slots_times
from .glu_forward import glu_forward
from .open_sets import Axis, open_set


def gated_mlp_ref(
    x, w_a, w_u, w_d, z=None, *, bias_a=None, bias_u=None, bias_d=None, lora_of_a=None,
    lora_of_u=None, lora_of_d=None, activation="silu", capacity=None, packed=False,
    recompute=False
):  # fmt: skip
    """y = Wd (act(a) * u * z) + s Bd (Ad h) + bd in plain torch, in the dtype of x, all channels.

    Same arguments and gradients as gated_mlp_fn, any floating dtype; fp64 makes it the truth.
    """
    h = gated_swiglu_ref(
        x, w_a, w_u, z, bias_a=bias_a, bias_u=bias_u, lora_of_a=lora_of_a, lora_of_u=lora_of_u,
        activation=activation, packed=True,
    )  # fmt: skip
    y = linear_with_lora(h, w_d, bias_d, lora_of_d)
    if z is not None and not packed and capacity is not None:
        y = torch.where((z != 0).sum() > capacity, float("nan"), y)
    return y


def _check(x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, lora_a, lora_u, lora_d, *settings):
    check(x, w_a, w_u, z, bias_a, bias_u, lora_a, lora_u, *settings)
    f, k = w_u.shape
    expect("w_d", w_d, (k, f), x.dtype, x)
    expect("bias_d", bias_d, (k,), x.dtype, x)
    expect_lora("lora_of_d", *lora_d, k, f, x)


def _down(h, branch, slots, tiles):
    """(y [T, K], s A h or None) of the down projection."""
    p = slots_times(h, branch.lora_a, slots, tiles.low, branch.scale) if branch.rank else None
    if slots.open_set is None:
        y = product(h, branch.w.t(), branch.bias)
        return y if p is None else y.addmm_(p, branch.lora_b.t()), p
    y, *_ = gated_matmul(
        h, branch.w, slots.axis, Axis(branch.w.shape[0]), tiles.down, bias=branch.bias, u=p,
        up=branch.lora_b if branch.rank else None,
    )  # fmt: skip
    return y, p


_TENSORS = (
    "Tensor x, Tensor? w_a, Tensor w_u, Tensor w_d, Tensor? z, Tensor? bias_a, Tensor? bias_u, "
    "Tensor? bias_d, Tensor? a_of_a, Tensor? b_of_a, Tensor? a_of_u, Tensor? b_of_u, "
    "Tensor? a_of_d, Tensor? b_of_d"
)
_SETTINGS = (
    "float scale_a, float scale_u, float scale_d, str activation, int capacity, int[] config"
)
_FORWARD = (
    f"({_TENSORS}, bool gathers, bool keep, {_SETTINGS}) "
    "-> (Tensor y, Tensor a, Tensor u, Tensor p, Tensor p_d, Tensor opened)"
)
_BACKWARD = (
    f"(Tensor dy, {_TENSORS.replace('Tensor x', 'Tensor? x')}, Tensor a, Tensor u, Tensor p, "
    f"Tensor p_d, Tensor opened, bool[] needs, {_SETTINGS}) -> Tensor[]"
)
_NAMES = (
    "x", "w_a", "w_u", "w_d", "z", "b_a", "b_u", "b_d", "a_of_a", "b_of_a", "a_of_u", "b_of_u",
    "a_of_d", "b_of_d",
)  # fmt: skip


@torch.library.custom_op("gatepack::gated_mlp", mutates_args=(), schema=_FORWARD)
def _gated_mlp(
    x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, a_of_a, b_of_a, a_of_u, b_of_u, a_of_d, b_of_d,
    gathers, keep, scale_a, scale_u, scale_d, activation, capacity, config,
):  # fmt: skip
    """y, and what the backward needs: a, u, p and p_d = s A (their input), the open set."""
    loras = (a_of_a, b_of_a), (a_of_u, b_of_u), (a_of_d, b_of_d)
    _check(
        x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, *loras, activation, capacity, gathers
    )  # fmt: skip
    check_device("gated_mlp", x)
    with torch.cuda.device_of(x):
        x2 = rows_of(x)
        opened = open_set(z) if gathers else x.new_empty(0, dtype=torch.int32)
        slots = slots_of(w_u.shape[0], z, opened, capacity)
        branches = branches_of(w_a, w_u, bias_a, bias_u, *loras[0], *loras[1], scale_a, scale_u)
        down = Branch(w_d, None if bias_d is None else bias_d.contiguous(), *loras[2], scale_d)
        tiles = tiles_of("gated_mlp", config, x2.shape[0], w_u, w_a, x)
        p = project(x2, branches)
        h, a, u = glu_forward(
            x2, *branches, slots, p, activation, tiles.fwd, "hau" if keep else "h"
        )
        y, p_d = _down(h, down, slots, tiles)
        return y.view(x.shape), *(or_empty(t, x) for t in (a, u, p, p_d)), opened


@_gated_mlp.register_fake
def _(
    x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, a_of_a, b_of_a, a_of_u, b_of_u, a_of_d, b_of_d,
    gathers, keep, scale_a, scale_u, scale_d, activation, capacity, config,
):  # fmt: skip
    loras = (a_of_a, b_of_a), (a_of_u, b_of_u), (a_of_d, b_of_d)
    _check(
        x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, *loras, activation, capacity, gathers
    )  # fmt: skip
    t = x.shape[:-1].numel()
    rank_a, rank_u, rank_d = (0 if a is None else a.shape[0] for a, _ in loras)
    return (
        x.new_empty(x.shape),
        x.new_empty((t, capacity) if keep and w_a is not None else 0),
        x.new_empty((t, capacity) if keep else 0),
        x.new_empty((t, rank_a + rank_u) if rank_a + rank_u else 0),
        x.new_empty((t, rank_d) if rank_d else 0),
        x.new_empty(z.shape[0] + 1 if gathers else 0, dtype=torch.int32),
    )


@torch.library.custom_op("gatepack::gated_mlp_backward", mutates_args=(), schema=_BACKWARD)
def _gated_mlp_backward(
    dy, x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, a_of_a, b_of_a, a_of_u, b_of_u, a_of_d,
    b_of_d, a, u, p, p_d, opened, needs, scale_a, scale_u, scale_d, activation, capacity, config,
):  # fmt: skip
    """The gradients that `needs` asks for, in the order of _NAMES; x None if none reads it."""
    with torch.cuda.device_of(dy):
        x2, dy2 = None if x is None else rows_of(x), rows_of(dy)
        slots = slots_of(w_u.shape[0], z, opened, capacity)
        branches = branches_of(
            w_a, w_u, bias_a, bias_u, a_of_a, b_of_a, a_of_u, b_of_u, scale_a, scale_u
        )
        down = Branch(w_d, None, a_of_d, b_of_d, scale_d)
        tiles = tiles_of("gated_mlp", config, dy2.shape[0], w_u, w_a, dy)
        a, u, p, p_d = (or_none(t) for t in (a, u, p, p_d))
        asked = [f"d{name}" for name, needed in zip(_NAMES, needs, strict=True) if needed]
        if u is None:
            _, a, u = glu_forward(x2, *branches, slots, p, activation, tiles.fwd, "au")
        v = scaled_mm(dy2, b_of_d, scale_d) if down.rank else None
        made = {"dz": z, "db_a": bias_a, "db_u": bias_u}
        made = {name: like for name, like in made.items() if name in asked}
        if "dw_d" in asked or "da_of_d" in asked:
            made["h"] = None
        grads = glu_gradients(
            slots, a, u, activation, tiles.dh, made, dy=dy2, down=down, v=v
        )  # fmt: skip
        branch_gradients(grads, asked, *branches, x2, p, slots, tiles)
        if "dx" in asked:
            grads["dx"] = grads["dx"].view(dy.shape)
        if "dw_d" in asked:
            grads["dw_d"] = slots_outer(grads["h"], dy2, slots, tiles.dw, w_d.t()).t()
        if "db_d" in asked:
            grads["db_d"] = column_sums(dy2, None, Axis(dy2.shape[1]))[0].to(bias_d.dtype)
        if "da_of_d" in asked:
            like = a_of_d.t()
            grads["da_of_d"] = (
                slots_outer(grads["h"], v, slots, tiles.low, like) if down.rank else like.clone()
            ).t()
        if "db_of_d" in asked:
            grads["db_of_d"] = low_rank_outer(dy2, p_d, b_of_d)
        return [grads[name] for name in asked]


@_gated_mlp_backward.register_fake
def _(
    dy, x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, a_of_a, b_of_a, a_of_u, b_of_u, a_of_d,
    b_of_d, a, u, p, p_d, opened, needs, *settings,
):  # fmt: skip
    tensors = (
        w_a, w_u, w_d, z, bias_a, bias_u, bias_d, a_of_a, b_of_a, a_of_u, b_of_u, a_of_d, b_of_d
    )  # fmt: skip
    dx = [dy.new_empty(dy.shape)] if needs[0] else []
    return dx + gradients_like(tensors, needs[1:])


differentiate(_gated_mlp, "gated_mlp", _NAMES)
_gated_mlp_backward.register_autograd(refuse_second_derivative("gated_mlp"))


def gated_mlp_fn(
    x: torch.Tensor,
    w_a: torch.Tensor | None,
    w_u: torch.Tensor,
    w_d: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    bias_a: torch.Tensor | None = None,
    bias_u: torch.Tensor | None = None,
    bias_d: torch.Tensor | None = None,
    lora_of_a: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    lora_of_u: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    lora_of_d: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    activation: str = "silu",
    capacity: int | None = None,
    packed: bool = False,
    recompute: bool = False,
    config: GatedMLPConfig | None = None,
) -> torch.Tensor:
    """y = Wd h + s Bd (Ad h) + bd, h = act(a) * u * z, closed channels skipped.

    x [*, K], w_a and w_u [F, K] (row-major is the fast one; w_a None: h = act(u) * z), w_d [K, F]
    of any strides (channel-major is the fast one: w_d.t() contiguous), biases [F], [F] and [K],
    lora_of_* (A [r, in], B [out, r], s): fp32, bf16 or fp16, one dtype for all; z fp32 [F].
    y [*, K] contiguous, in x.dtype.

    capacity: how many channels may be open, None for F; it sizes what is kept, and with more open y
    and the gradients are NaN. packed: the weights, gate_proj's and up_proj's biases and z hold open
    channels only; none is looked up. So it is where z is None, and in both cases the products
    without an epilogue go to torch. activation: "silu", "gelu", "gelu_tanh" or "relu".

    Gradients flow to every tensor that asks for one, in full shape: dz is fp32, 0 for closed
    channels, as are their rows and columns of the weight gradients. a and u are kept for it, [T,
    capacity] each, or with recompute=True computed again from x. fp32 products follow
    torch.get_float32_matmul_precision(). config None takes the tiles of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, bias_a or lora_of_a without
    w_a, an unknown activation, a capacity above F or beside packed weights, CPU tensors outside
    Triton's interpreter. RuntimeError: a second derivative.
    """
    a_of_a, b_of_a, scale_a = lora_parts("lora_of_a", lora_of_a)
    a_of_u, b_of_u, scale_u = lora_parts("lora_of_u", lora_of_u)
    a_of_d, b_of_d, scale_d = lora_parts("lora_of_d", lora_of_d)
    tensors = (
        x, w_a, w_u, w_d, z, bias_a, bias_u, bias_d, a_of_a, b_of_a, a_of_u, b_of_u, a_of_d, b_of_d
    )  # fmt: skip
    return torch.ops.gatepack.gated_mlp(
        *tensors, z is not None and not packed, any_requires_grad(*tensors) and not recompute,
        scale_a, scale_u, scale_d, activation, w_u.shape[0] if capacity is None else capacity,
        [] if config is None else config.to_ints(),
    )[0]  # fmt: skip
