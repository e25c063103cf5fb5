"""Stage 3, modules: linears that compute open units only, as stand-ins for nn.Linear."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from gatepack.adopt import adopt, derived
from gatepack.functional import (
    add_low_rank,
    gate_lanes,
    spread_lanes,
    take_lanes,
)
from gatepack.gates import Gate
from gatepack.in_place import folded_linear, linear, tokens_in_place
from gatepack.paths import choose_path
from gatepack.samples import Open
from gatepack.sites import Site, open_rows, row_gate


@dataclass(frozen=True)
class Adapter:
    """One active LoRA adapter: a [r, K], b [N, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: nn.Module

    @property
    def drop_probability(self) -> float:
        """Of dropping an element of x now: 0 in evaluation."""
        is_dropout = isinstance(self.dropout, nn.Dropout) and self.dropout.training
        return self.dropout.p if is_dropout else 0.0


@dataclass(frozen=True)
class Operands:
    """What a linear multiplies by: w [N, K], bias [N] or None, and its active LoRA adapters."""

    w: torch.Tensor
    bias: torch.Tensor | None
    adapters: tuple[Adapter, ...] = ()

    def cast(self, dtype: torch.dtype) -> "Operands":
        """The same in another dtype, differentiable."""
        adapters = (replace(x, a=x.a.to(dtype), b=x.b.to(dtype)) for x in self.adapters)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Operands(self.w.to(dtype), bias, tuple(adapters))

    def part(
        self, rows: torch.Tensor | None = None, cols: torch.Tensor | None = None
    ) -> "Operands":
        """Some rows and columns (indices; None: all), differentiable."""
        adapters = (replace(x, a=_take(x.a, 1, cols), b=_take(x.b, 0, rows)) for x in self.adapters)
        bias = None if self.bias is None else _take(self.bias, 0, rows)
        return Operands(_take(_take(self.w, 0, rows), 1, cols), bias, tuple(adapters))

    @property
    def lora(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """(A, B, scale) of the only adapter, or None without one."""
        if not self.adapters:
            return None
        (adapter,) = self.adapters
        return adapter.a, adapter.b, adapter.scaling


def _take(x: torch.Tensor, dim: int, indices: torch.Tensor | None) -> torch.Tensor:
    return x if indices is None else x.index_select(dim, indices)


def base_linear(module: nn.Module) -> nn.Module:
    """The linear inside any nesting of PEFT tuner layers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def tuners_of(module: nn.Module) -> Iterator[nn.Module]:
    """The PEFT tuner layers around a linear, outermost first."""
    while hasattr(module, "base_layer"):
        yield module
        module = module.base_layer


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is GPT-2's transposed linear, weight [K, N]."""
    return _is_conv1d_class(type(module))


@functools.cache
def _is_conv1d_class(module_class: type) -> bool:
    return any(cls.__name__ == "Conv1D" for cls in module_class.__mro__)


def weight_matrix(linear: nn.Module) -> torch.Tensor:
    """The weight of a linear or Conv1D as a view [out_features, in_features]."""
    return linear.weight.t() if is_conv1d(linear) else linear.weight


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear or Conv1D."""
    return tuple(weight_matrix(linear).shape)


def operands_of(module: nn.Module) -> Operands | str:
    """The operands of a linear, or the reason why its forward must be called as it is.

    Reading .weight of a PEFT layer gives the base weight and drops the adapter, so every tuner
    layer is either understood here or refused with a reason.
    """
    adapters = adapters_of(module)
    if isinstance(adapters, str):
        return adapters
    base = base_linear(module)
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        return f"{type(base).__name__} is not a linear that gatepack can take apart"
    if type(base.weight) not in (nn.Parameter, torch.Tensor):
        return f"its weight is a {type(base.weight).__name__}"
    return Operands(weight_matrix(base), base.bias, adapters)


def adapters_of(module: nn.Module) -> tuple[Adapter, ...] | str:
    """The active LoRA adapters around a linear, innermost first, or why there is more to it."""
    if not hasattr(module, "base_layer"):
        return ()
    # AdaLoRA has a lora_A too, of parameters.
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        names = (f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__)
        tuner = next((name for name in names if name.startswith("peft.")), type(module).__name__)
        return f"adapter type {tuner} is not LoRA"
    inner = adapters_of(module.base_layer)
    if isinstance(inner, str):
        return inner
    if module.disable_adapters or module.merged:
        if module.disable_adapters and module.merged:
            return "a merged adapter is disabled"
        return inner
    adapters = list(inner)
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        reason = _why_opaque(module, name)
        if reason:
            return reason
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        adapters.append(Adapter(a, b, module.scaling[name], module.lora_dropout[name]))
    return tuple(adapters)


def _why_opaque(module: nn.Module, name: str) -> str:
    """Why a LoRA adapter is more than s * B(A x), or ""."""
    if name in module.lora_variant:
        return f"adapter {name!r} is a {type(module.lora_variant[name]).__name__}"
    return f"adapter {name!r} has a LoRA bias" if module.lora_bias.get(name) else ""


def why_not_sliced(module: nn.Module) -> str:
    """Why a linear and all its adapters, active or not, cannot be sliced, or ""."""
    operands = operands_of(module)
    if isinstance(operands, str):
        return operands
    reasons = (_why_opaque(tuner, name) for tuner in tuners_of(module) for name in tuner.lora_A)
    return next(filter(None, reasons), "")


def gated_forward(
    module: nn.Module, dense_forward, x: torch.Tensor, opaque: str = ""
) -> torch.Tensor:
    """Forward of a linear at its site; dense_forward, ungated, must run if opaque says why."""
    site: Site = module.site
    path = path_of(module, x)
    full_in = None if site.in_gate is None else site.in_gate.size * site.in_gate.lanes
    if full_in and x.shape[-1] != full_in and (path == "dense" or not site.compact_in):
        raise ValueError(f"x must have {full_in} features, got shape {tuple(x.shape)}")
    if path == "dense":
        y = _masked(site, dense_forward, x)
        return y if site.compact_out else _without_closed_rows(site, y)
    operands = opaque or operands_of(module)
    if path == "triton":
        return _full_width(site, operands, dense_forward, x)
    in_open = None if site.in_gate is None else site.in_gate.open()
    out_open = None if site.out_gate is None else site.out_gate.open()
    rows = open_rows(site, out_open)
    cols = None if in_open is None else in_open.lanes
    if isinstance(operands, str):
        if cols is not None and x.shape[-1] != full_in:
            x = spread_lanes(x, cols, full_in)
        y = _masked(site, dense_forward, x)
        y = y if rows.index is None else take_lanes(y, rows.index)
    else:
        y = _folded(operands, x, in_open, out_open, rows.index, cols, full_in)
    if rows.index is not None and not site.compact_out:
        y = spread_lanes(y, rows.index, linear_shape(base_linear(module))[0])
    if rows.spread is not None:
        lanes = site.rows_gate.lanes
        y = y.unflatten(-1, (-1, lanes)).index_select(-2, rows.spread).flatten(-2)
    return y


def path_of(module: nn.Module, x: torch.Tensor) -> str:
    """The path of this call: what the model chose for its forward, else by the shape of x."""
    site = module.site
    decided = site.gate.path if site.gate else None
    if decided:
        return decided
    tokens = x.numel() // max(x.shape[-1], 1)
    kept = site.kept(x.device)
    return choose_path(tokens, width_of(module), x.device, kept, most_in_place(module)).path


def most_in_place(module: nn.Module) -> int:
    """Up to how many tokens gatepack._C multiplies with the weight of a linear where it lies."""
    return tokens_in_place(weight_matrix(base_linear(module)))


def width_of(module: nn.Module) -> int:
    """The width that gatepack.paths goes by: the model's residual, else the linear's own."""
    gate = module.site.gate
    return (gate and gate.width) or max(linear_shape(base_linear(module)))


def _masked(site: Site, dense_forward, x: torch.Tensor) -> torch.Tensor:
    """The ungated forward between two multiplications: x and y hold all lanes."""
    if site.in_gate is not None:
        x = gate_lanes(x, site.in_gate.values(), site.in_gate.lanes)
    y = dense_forward(x)
    if site.out_gate is not None:
        y = gate_lanes(y, site.out_gate.values(), site.out_gate.lanes)
    return y


def _without_closed_rows(site: Site, y: torch.Tensor) -> torch.Tensor:
    """y with 0 in the rows that go with closed units of another gate."""
    return y if site.rows_gate is None else gate_lanes(y, *row_gate(site))


def multipliers(current: Open | None) -> torch.Tensor | None:
    """Gate values to multiply by, or None where they are all 1 and no gradient is wanted."""
    if current is None:
        return None
    wants_grad = torch.is_grad_enabled() and current.values.requires_grad
    return current.values if wants_grad or not current.ones else None


def _folded(operands, x, in_open, out_open, rows, cols, full_in):
    if cols is not None and x.shape[-1] == full_in:
        x = take_lanes(x, cols)
    x = as_operand(x, operands.w)
    z_in, z_out = multipliers(in_open), multipliers(out_open)
    in_lanes = 1 if in_open is None else in_open.gate.lanes
    out_lanes = 1 if out_open is None else out_open.gate.lanes
    y = folded_linear(x, operands.w, operands.bias, z_in, z_out, rows, cols, in_lanes, out_lanes)
    return _adapted(y, x, operands.adapters, z_in, z_out, rows, cols, in_lanes, out_lanes)


def _adapted(y: torch.Tensor, x: torch.Tensor, adapters: tuple[Adapter, ...], *where):
    """y and what adapters add to it; where: gates and lanes, as add_low_rank takes them."""
    for adapter in adapters:
        inner = x if torch.is_autocast_enabled(x.device.type) else x.to(adapter.a.dtype)
        y = add_low_rank(y, adapter.dropout(inner), adapter.a, adapter.b, adapter.scaling, *where)
    return y


def _full_width(site, operands, dense_forward, x) -> torch.Tensor:
    """x and y hold all lanes, closed ones 0; gates are applied inside the Triton op."""
    if isinstance(operands, str):
        return _without_closed_rows(site, _masked(site, dense_forward, x))
    return _triton(site, operands, x, *row_gate(site))


def _triton(site, operands, x, z_out, group_out):
    from gatepack.kernels import gated_linear_fn

    z_in, group_in = None, 1
    if site.in_gate is not None:
        z_in, group_in = site.in_gate.values(), site.in_gate.lanes
    x = as_operand(x, operands.w)
    inside, beside = (), operands.adapters
    if len(beside) == 1 and fits(beside[0], x.dtype):
        inside, beside = beside, ()
    fused = replace(operands, adapters=inside).cast(x.dtype)
    lora_a, lora_b, scale = fused.lora or (None, None, 1.0)
    dropout = inside[0].drop_probability if inside else 0.0
    y = gated_linear_fn(
        x,
        fused.w,
        fused.bias,
        z_in=z_in,
        z_out=z_out,
        lora_a=lora_a,
        lora_b=lora_b,
        scale=scale,
        group_in=group_in,
        group_out=group_out,
        dropout=dropout,
        seed=torch.randint(2**62, (), device=x.device) if dropout else None,
    )
    return _adapted(y, x, beside, z_in, z_out, None, None, group_in, group_out)


def as_operand(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x in the dtype of the product: autocast's, else that of w, which x must have already."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype != w.dtype:
        raise RuntimeError(f"x must have the weight's dtype {w.dtype}, got {x.dtype}")
    return x


def fits(adapter: Adapter, dtype: torch.dtype) -> bool:
    """Whether an adapter can be part of an op: of its dtype (or autocast), with plain dropout."""
    plain = isinstance(adapter.dropout, (nn.Dropout, nn.Identity))
    return plain and (adapter.a.dtype == dtype or torch.is_autocast_enabled(adapter.a.device.type))


class GatedLinear(nn.Linear):
    """y = z_out * (W (z_in * x) + b), closed input groups and output rows left out of every matmul.

    A real nn.Linear: the same parameters, state-dict keys, dtype, device and autocast behaviour;
    without gates, the same function. in_gate multiplies groups of in_gate.lanes input features,
    out_gate groups of output rows. x [*, in_features] -> y [*, out_features], closed rows 0. Raises
    ValueError where a gate does not cover the features.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        in_gate=None,
        out_gate=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.site = Site(in_gate=in_gate, out_gate=out_gate)
        _check_covers("in_gate", in_gate, in_features)
        _check_covers("out_gate", out_gate, out_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear, site: Site) -> "GatedLinear":
        """A GatedLinear at a site that shares the linear's parameters."""
        return adopt(linear, cls, site)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gated_forward(self, self.ungated, x)

    def ungated(self, x: torch.Tensor) -> torch.Tensor:
        """W x + b."""
        return linear(x, self.weight, self.bias)


def _check_covers(argument: str, gate: Gate | None, features: int) -> None:
    if gate is not None and gate.size * gate.lanes != features:
        raise ValueError(
            f"{argument} must cover {features} features, got {gate.size} units of {gate.lanes} "
            f"lanes: {gate.name!r}"
        )


class PackedLinear(nn.Linear):
    """A linear with its closed rows and columns removed; dense_shape is what it had, (out, in).

    On a CPU, for a decoding step's few tokens without gradients, gatepack._C computes it.
    """

    dense_shape: tuple[int, int]

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> "PackedLinear":
        """Packs nothing itself: weight [|R|, |C|] and bias [|R|] are the kept part of linear's."""
        packed = adopt(linear, cls)
        packed.dense_shape = getattr(
            linear, "dense_shape", (linear.out_features, linear.in_features)
        )
        packed._parameters.update(weight=weight, bias=bias)
        packed.out_features, packed.in_features = weight.shape
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed from {self.dense_shape[1]} -> {self.dense_shape[0]}"


@functools.cache
def _gated_class(dense: type) -> type:
    """A subclass of a linear's class (Conv1D, a PEFT layer) whose forward obeys the instance's
    site."""

    def forward(self, x, *args, **kwargs):
        def dense_forward(x):
            return dense.forward(self, x, *args, **kwargs)

        return gated_forward(
            self, dense_forward, x, "it is called with extra arguments" if args or kwargs else ""
        )

    members = {"forward": forward, "gated_from": dense}
    return derived("Gated", dense, members, _gated_class)


def gate_linear(linear: nn.Module, site: Site) -> nn.Module:
    """The gated twin of a linear, GPT-2 Conv1D or PEFT layer, sharing its parameters."""
    if "forward" in linear.__dict__:
        raise ValueError(
            f"the forward of a {type(linear).__name__} has been replaced on the instance (a "
            "device_map over several "
            "devices does this), so gates would be skipped in silence; load the model without it"
        )
    if type(linear) is nn.Linear:
        return GatedLinear.from_linear(linear, site)
    return adopt(linear, _gated_class(type(linear)), site)


def is_gated(module: nn.Module) -> bool:
    return isinstance(module, GatedLinear) or hasattr(type(module), "gated_from")


def ungated_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of a gated linear without its gates."""
    if isinstance(module, GatedLinear):
        return module.ungated(x)
    return type(module).gated_from.forward(module, x)


def ungate_linear(module: nn.Module) -> nn.Module:
    """The inverse of gate_linear: the plain linear with the same parameters."""
    dense = nn.Linear if isinstance(module, GatedLinear) else type(module).gated_from
    plain = adopt(module, dense)
    del plain.site
    return plain
