"""Stage 2, kernels: a norm whose result goes, compact, to several gated linears.

With v = x / sqrt(mean(x^2) + eps) (rms) or (x - mean(x)) / sqrt(var(x) + eps) (layer), the
statistics over all D columns, and open_m(i) the i-th open column of consumer m,

    y_m[t, i] = z_m[d] (w[d] v[t, d] + b[d])  for d = open_m(i), i < count_m, else 0

One statistic per row, one read of x from memory: the gathers find the row in the cache. With
g_m = dy_m at the columns of x, 0 where closed, and g = sum_m z_m g_m, the gradients are

    dx = (w g - v mean(w g v) [- mean(w g)]) / sqrt(.. + eps)          the bracket: layer only
    dw = sum_t g v        db = sum_t g        dz_m = sum_t g_m (w v + b)

A consumer's dz is summed before the consumers are: their sum says nothing about one gate.

Source: FineGates, arXiv 2412.12951 (column gates on q/k/v and gate/up).
"""

import torch
import torch.nn.functional as F
import triton

from ._common import (
    INTERPRET,
    check_device,
    config_of,
    expect,
    expect_operand,
    refuse_second_derivative,
    rows_of,
)
from ._configs import Panel
from .gather_norm_kernels import (
    _gather_norm_bwd_columns_kernel,
    _gather_norm_bwd_dx_kernel,
    _gather_norm_fwd_kernel,
)
from .scatter_add import slots_of

KINDS = ("rms", "layer")
CONSUMERS = 3


def gather_norm_ref(
    x, weight=None, bias=None, *, open_sets, capacities, gates=None, kind="rms", eps=1e-6
):
    """The list of y_m in plain torch, rounded as LlamaRMSNorm and nn.LayerNorm round."""
    if kind == "layer":
        normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        normed = normed if weight is None else weight * normed
        normed = normed if bias is None else normed + bias
    ys = []
    for open_set, capacity, z in zip(
        open_sets, capacities, gates or [None] * len(open_sets), strict=True
    ):
        columns = open_set[:-1][:capacity].long()
        is_open = torch.arange(len(columns), device=x.device) < open_set[-1]
        y = normed.index_select(-1, columns)
        if z is not None:
            y = y * z[columns].to(y.dtype)
        y = torch.where(is_open, y, 0.0)
        ys.append(F.pad(y, (0, capacity - len(columns))))
    return ys


def _check(x, weight, bias, open_sets, gates, capacities, kind, eps):
    expect_operand("x", x)
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    if not 1 <= len(open_sets) <= CONSUMERS:
        raise ValueError(f"open_sets: expected 1 to {CONSUMERS} of them, got {len(open_sets)}")
    for name, values in (("gates", gates), ("capacities", capacities)):
        if len(values) != len(open_sets):
            raise ValueError(
                f"{name}: expected {len(open_sets)} of them, as open_sets, got {len(values)}"
            )
    for m, capacity in enumerate(capacities):
        if capacity < 0:
            raise ValueError(f"capacities[{m}]: expected at least 0, got {capacity}")
    d = x.shape[-1]
    expected = [("weight", weight, (d,), x.dtype), ("bias", bias, (d,), x.dtype)]
    expected += [(f"open_sets[{m}]", o, (d + 1,), torch.int32) for m, o in enumerate(open_sets)]
    expected += [(f"gates[{m}]", z, (d,), torch.float32) for m, z in enumerate(gates) if z.numel()]
    for name, tensor, shape, dtype in expected:
        expect(name, tensor, shape, dtype, x)


def _panel(config, x):
    return config_of(Panel, "gather_norm", config, tuple(x.shape), x.dtype, x.device)


def _dense(tensor):
    """A small vector as the kernels read it; an absent or empty one is None."""
    return None if tensor is None or tensor.numel() == 0 else tensor.contiguous()


def _padded(values, fill=None):
    """One value per possible consumer."""
    return [*values, *[fill] * (CONSUMERS - len(values))]


_CONSUMERS = "Tensor[] open_sets, Tensor[] gates"


@torch.library.custom_op(
    "gatepack::gather_norm",
    mutates_args=(),
    schema=(
        f"(Tensor x, Tensor? weight, Tensor? bias, {_CONSUMERS}, int[] capacities, str kind, "
        "float eps, int[]? config) -> (Tensor[] ys, Tensor mean, Tensor rstd)"
    ),
)
def _gather_norm(x, weight, bias, open_sets, gates, capacities, kind, eps, config):
    """The y_m, and the statistics that the backward needs; an empty gate stands for none."""
    _check(x, weight, bias, open_sets, gates, capacities, kind, eps)
    check_device("gather_norm", x)
    x2 = rows_of(x)
    t, d = x2.shape
    mean, rstd = (x.new_empty(t, dtype=torch.float32) for _ in range(2))
    if t == 0 or d == 0:
        return [x.new_zeros(*x.shape[:-1], c) for c in capacities], mean.zero_(), rstd.zero_()
    ys = [x.new_empty(t, capacity) for capacity in capacities]
    panel = _panel(config, x2)
    with torch.cuda.device_of(x):
        _gather_norm_fwd_kernel[(triton.cdiv(t, panel.rows),)](
            x2, _dense(weight), _dense(bias), *_padded([_dense(o) for o in open_sets]),
            *_padded([_dense(z) for z in gates]), *_padded(ys), mean, rstd,
            *_padded(capacities, 0), t, d, eps, *x2.stride(),
            LAYER=kind == "layer", BLOCK_T=panel.rows, BLOCK_D=triton.next_power_of_2(d),
            BLOCK_S=panel.columns, INTERPRETED=INTERPRET, num_warps=panel.num_warps,
        )  # fmt: skip
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys], mean, rstd


@_gather_norm.register_fake
def _(x, weight, bias, open_sets, gates, capacities, kind, eps, config):
    _check(x, weight, bias, open_sets, gates, capacities, kind, eps)
    t = x.shape[:-1].numel()
    mean, rstd = (x.new_empty(t, dtype=torch.float32) for _ in range(2))
    return [x.new_empty(*x.shape[:-1], capacity) for capacity in capacities], mean, rstd


@torch.library.custom_op(
    "gatepack::gather_norm_backward",
    mutates_args=(),
    schema=(
        f"(Tensor[] dys, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
        f"{_CONSUMERS}, str kind, bool need_x, bool need_weight, bool need_bias, "
        "bool[] need_gates, int[]? config) -> Tensor[]"
    ),
)
def _gather_norm_backward(
    dys, x, weight, bias, mean, rstd, open_sets, gates, kind, need_x, need_weight, need_bias,
    need_gates, config,
):  # fmt: skip
    """The gradients that are needed, in the order x, weight, bias, gates."""
    x2, dys = rows_of(x), [rows_of(dy) for dy in dys]
    t, d = x2.shape
    # Vectors that need a gradient: dtypes by name, where a number names a gate.
    vectors = {"weight": x.dtype} if need_weight else {}
    vectors |= {"bias": x.dtype} if need_bias else {}
    vectors |= {m: torch.float32 for m, needed in enumerate(need_gates) if needed}
    if t == 0 or d == 0:
        dx = [x.new_zeros(x.shape)] if need_x else []
        return dx + [x.new_zeros(d, dtype=dtype) for dtype in vectors.values()]
    panel = _panel(config, x2)
    settings = {
        "LAYER": kind == "layer", "BLOCK_T": panel.rows, "INTERPRETED": INTERPRET,
        "num_warps": panel.num_warps,
    }  # fmt: skip
    grads = []
    with torch.cuda.device_of(x):
        slots = [
            slots_of(o.contiguous(), dy.shape[1]) for o, dy in zip(open_sets, dys, strict=True)
        ]
        consumers = *_padded(slots), *_padded([_dense(z) for z in gates]), *_padded(dys)
        strides = x2.stride(), *_padded([dy.stride() for dy in dys], (0, 0))
        strides = [stride for pair in strides for stride in pair]
        if need_x:
            dx = x2.new_empty(t, d)
            _gather_norm_bwd_dx_kernel[(triton.cdiv(t, panel.rows),)](
                x2, _dense(weight), mean, rstd, *consumers, dx, t, d, *strides,
                BLOCK_D=panel.columns, **settings,
            )  # fmt: skip
            grads.append(dx.view(x.shape))
        if vectors:
            # Up to five sums per column stay in registers: half as many columns.
            columns = max(1, panel.columns // 2)
            splits, tiles_d = triton.cdiv(t, panel.span), triton.cdiv(d, columns)
            sums = {name: mean.new_empty(splits, d) for name in vectors}
            _gather_norm_bwd_columns_kernel[(splits * tiles_d,)](
                x2, _dense(weight), _dense(bias), mean, rstd, *consumers,
                *(sums.get(name) for name in ("weight", "bias", *range(CONSUMERS))),
                t, d, *strides, tiles_d, SPAN=panel.span, BLOCK_D=columns, **settings,
            )  # fmt: skip
            grads += [sums[name].sum(0).to(dtype) for name, dtype in vectors.items()]
    return grads


@_gather_norm_backward.register_fake
def _(
    dys, x, weight, bias, mean, rstd, open_sets, gates, kind, need_x, need_weight, need_bias,
    need_gates, config,
):  # fmt: skip
    grads = [x.new_empty(x.shape)] if need_x else []
    grads += [x.new_empty(x.shape[-1]) for needed in (need_weight, need_bias) if needed]
    return grads + [mean.new_empty(x.shape[-1]) for needed in need_gates if needed]


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, open_sets, gates, _, kind, _, config = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd, *open_sets, *gates)
    needs = [t is not None and t.requires_grad for t in (x, weight, bias)]
    ctx.args = kind, needs, [z.requires_grad for z in gates], config


def _backward(ctx, dys, *_):
    kind, needs, need_gates, config = ctx.args
    count = len(need_gates)
    used = [m for m in range(count) if dys[m] is not None]
    x, weight, bias, mean, rstd, *consumers = ctx.saved_tensors
    grads = iter(())
    if used:
        grads = iter(
            torch.ops.gatepack.gather_norm_backward(
                [dys[m] for m in used], x, weight, bias, mean, rstd,
                [consumers[m] for m in used], [consumers[count + m] for m in used], kind, *needs,
                [need_gates[m] for m in used], config,
            )
        )  # fmt: skip
    d_tensors = [next(grads) if needed and used else None for needed in needs]
    d_gates = [next(grads) if m in used and need_gates[m] else None for m in range(count)]
    return *d_tensors, [None] * count, d_gates, None, None, None, None


_gather_norm.register_autograd(_backward, setup_context=_save_for_backward)
_gather_norm_backward.register_autograd(refuse_second_derivative("gather_norm"))


def gather_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    open_sets: list[torch.Tensor],
    capacities: list[int],
    gates: list[torch.Tensor | None] | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    config: Panel | None = None,
) -> list[torch.Tensor]:
    """y_m[:, i] = z_m[d] (weight[d] v[:, d] + bias[d]), d the i-th open column of consumer m.

    v is x normed over all its D columns, open or not: kind "rms" as transformers' LlamaRMSNorm
    (statistics in fp32, v rounded to the dtype of x before the weight), "layer" as nn.LayerNorm.
    x [*, D], any strides (leading dimensions that do not collapse into one stride are copied);
    weight, bias [D] or None: fp32, bf16 or fp16, one dtype for all. One to three consumers, each
    with its open set (int32 [D + 1], of open_set_fn), its capacity and its gate (fp32 [D] or None;
    gates None: none at all). y_m [*, capacity_m] is contiguous and 0 from the count on; open
    columns whose slot would be past the capacity are left out.

    Gradients flow to x, weight, bias and gates; dz is fp32, 0 for columns left out. Column sums
    are taken in a fixed order, and only where a vector asks for a gradient. config None takes the
    tile of choose_config.

    Refuses, with ValueError: shapes, dtypes, devices or numbers of consumers that do not fit, an
    unknown kind, CPU tensors outside Triton's interpreter. RuntimeError: a second derivative.
    """
    gates = [None] * len(open_sets) if gates is None else gates
    # An operator with gradients takes no list of optional tensors: an empty one stands for None.
    gates = [x.new_empty(0, dtype=torch.float32) if z is None else z for z in gates]
    # Likewise an empty list of integers would count as one of tensors.
    ints = None if config is None else config.to_ints()
    return torch.ops.gatepack.gather_norm(
        x, weight, bias, open_sets, gates, capacities, kind, eps, ints
    )[0]
