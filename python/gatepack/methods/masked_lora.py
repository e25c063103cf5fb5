"""Stage 4, methods: ATP's linears, LoRA layers that pruning decisions act on, in both formulas."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from gatepack.adopt import adopt, derived
from gatepack.functional import spread_lanes
from gatepack.in_place import folded_linear, tokens_in_place
from gatepack.layers import layers_of
from gatepack.methods.decisions import Layout, Place
from gatepack.modules import Operands, adapters_of, base_linear, operands_of
from gatepack.paths import choose_path
from gatepack.sharding import is_sharded


class Decisions:
    """The decisions that a model's linears obey: hard ones, bool [N], or for a while soft ones.

    width: of the model's residual stream, by which gatepack.paths chooses.

    Which rows run is found once for all linears after decisions change, with one copy to the host
    and one back, when a forward first asks: where all linears take "triton", none does.
    """

    def __init__(self, layout: Layout, width: int, device: torch.device):
        self.layout, self.width = replace(layout, costs=layout.costs.to(device)), width
        self.soft: torch.Tensor | None = None
        self.fractional = False  # whether soft decisions are other than 0 and 1
        self.index = {
            place.name: (place.columns if place.rows is None else place.rows).to(device)
            for place in layout.places
        }
        self.autocast: torch.dtype | None = None  # that of the last training forward
        self.set(torch.ones(len(layout.costs), dtype=torch.bool, device=device))

    def set(self, hard: torch.Tensor) -> None:
        """New hard decisions, bool [N]."""
        self.hard, self._rows = hard, None

    def open_rows(self, place: Place) -> torch.Tensor | None:
        """The rows of a linear that are kept, sorted int64, or None for all."""
        if self._rows is None:
            self._rows = self._find_rows()
        return self._rows.get(place.name)

    def _find_rows(self) -> dict[str, torch.Tensor]:
        """The kept rows of each linear that lacks some."""
        on_host = self.hard.cpu()
        masks = {p.name: on_host[p.rows] for p in self.layout.places if p.rows is not None}
        found = {name: m.nonzero().squeeze(1) for name, m in masks.items() if not m.all()}
        if not found:
            return found
        rows = torch.cat(list(found.values())).to(self.hard.device)
        parts = rows.split([len(part) for part in found.values()])
        return dict(zip(found, parts, strict=True))

    def values(self, place: Place, dtype: torch.dtype) -> torch.Tensor:
        """The present decision of each row or column of a linear."""
        flat = self.hard.to(dtype) if self.soft is None else self.soft.to(dtype)
        return flat[self.index[place.name]]

    @contextmanager
    def softened(self, soft: torch.Tensor, fractional: bool = True) -> Iterator[None]:
        """Linears take soft decisions, fp32 [N] with gradient, in the evaluation formula.

        Not fractional: these are 0 and 1, straight-through. Then m^2 is m, and gets the gradient
        of m, without which a channel that is closed would have none.
        """
        self.soft, self.fractional = soft, fractional
        try:
            yield
        finally:
            self.soft, self.fractional = None, False


def masked_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One linear under decisions m; s the LoRA scale, drop between A and B.

    While training, m * (x W^T + b) + s drop(x A^T) B^T: the frozen path alone is masked, and its
    pruned rows are not computed. Else, or with soft decisions, m * (x W^T + b + s x A^T B^T) for
    q, k and v, and the MLP's channels times m once for each linear that makes them.
    """
    decisions, place = module.atp_decisions, module.atp_place
    operands = operands_of(module)
    if isinstance(operands, str):
        raise ValueError(f"{place.name} cannot be masked by decisions: {operands}")
    tunes = module.training and decisions.soft is None
    lowered = torch.is_autocast_enabled(x.device.type)
    if lowered:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if tunes:
        decisions.autocast = x.dtype if lowered else None
    if place.columns is not None and place.power and not tunes:
        power = place.power if decisions.fractional else 1
        x = x * decisions.values(place, x.dtype).pow(power)
    masks = place.rows is not None and (tunes or place.masks_output)
    y = _frozen(operands, x, decisions, place if masks else None, tunes)
    for adapter in operands.adapters:
        low = adapter.dropout(F.linear(x.to(adapter.a.dtype), adapter.a))
        low = (F.linear(low, adapter.b) * adapter.scaling).to(y.dtype)
        y = y + (low * decisions.values(place, y.dtype) if masks and not tunes else low)
    return y


def _frozen(
    operands: Operands, x: torch.Tensor, decisions: Decisions, place: Place | None, tunes: bool
) -> torch.Tensor:
    """m * (x W^T + b), or x W^T + b without a place; hard decisions leave out what they prune."""
    w, bias = operands.w, operands.bias
    if place is None:
        return F.linear(x, w.to(x.dtype), _cast(bias, x.dtype))
    tokens = x.numel() // max(x.shape[-1], 1)
    rows = decisions.open_rows(place) if x.device.type == "cpu" else None
    kept = 1.0 if rows is None else len(rows) / len(w)
    path = choose_path(tokens, decisions.width, x.device, kept, tokens_in_place(w)).path
    if path == "triton":
        from gatepack.kernels import gated_linear_fn

        m = decisions.values(place, torch.float32)
        closed_grad = "exact" if m.requires_grad else "none"
        return gated_linear_fn(
            x, w.to(x.dtype), _cast(bias, x.dtype), z_out=m, closed_grad=closed_grad
        )
    if tunes:
        rows = decisions.open_rows(place)
    if not tunes or rows is None or path == "dense":
        y = F.linear(x, w.to(x.dtype), _cast(bias, x.dtype))
        return y if tunes and rows is None else y * decisions.values(place, y.dtype)
    compact = folded_linear(x, w, bias, None, None, rows, None, 1, 1)
    return spread_lanes(compact, rows, len(w))


def _cast(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype)


@functools.cache
def _masked_class(dense: type) -> type:
    """A subclass of a PEFT layer's class whose forward is masked_forward."""

    def forward(self, x, *args, **kwargs):
        return masked_forward(self, x)

    members = {"forward": forward, "masked_from": dense}
    return derived("Masked", dense, members, _masked_class)


def refuse_linears(root: nn.Module, adapted: bool) -> None:
    """ValueError for a linear of the blocks that masked_forward could not compute.

    adapted: whether all must have their LoRA already.
    """
    for layer in layers_of(root):
        for path in layer.family.linears:
            module = layer.module.get_submodule(path)
            if adapted and not hasattr(module, "lora_A"):
                raise ValueError(
                    f"{layer.name}.{path} has no LoRA, which ATP trains on every linear of the "
                    "blocks; leave the adapters to ATP, or target all of them"
                )
            sharded = is_sharded(base_linear(module).weight)
            reason = adapters_of(module) if sharded else operands_of(module)
            if isinstance(reason, str):
                raise ValueError(
                    f"{layer.name}.{path} cannot be masked by decisions: {reason}; ATP trains "
                    "plain LoRA (LoraConfig without use_dora and lora_bias) on weights that are "
                    "not quantized"
                )


def mask_linears(root: nn.Module, decisions: Decisions) -> None:
    """Puts every LoRA layer that decisions act on under them, by swapping children."""
    for place in decisions.layout.places:
        module = root.get_submodule(place.name)
        masked = adopt(module, _masked_class(type(module)))
        masked.atp_decisions, masked.atp_place = decisions, place
        root.set_submodule(place.name, masked)


def unmask_linears(root: nn.Module, decisions: Decisions) -> None:
    """The inverse of mask_linears."""
    for place in decisions.layout.places:
        module = root.get_submodule(place.name)
        plain = adopt(module, type(module).masked_from)
        del plain.atp_decisions, plain.atp_place
        root.set_submodule(place.name, plain)


def merge_adapters(root: nn.Module, decisions: Decisions) -> None:
    """Adds B A to the weights of the linears that decisions act on, and takes the adapters off."""
    for place in decisions.layout.places:
        module = root.get_submodule(place.name)
        module.merge()
        root.set_submodule(place.name, module.get_base_layer())
