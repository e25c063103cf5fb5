"""Stage 5, pack: remove closed rows and columns of single linears, and put zeros back."""

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatepack._ext import fold_pack, fold_pack_adjoint
from gatepack.adopt import adopt, derived
from gatepack.functional import spread_lanes, take_lanes
from gatepack.hf import detach
from gatepack.layers import Layer, layers_of
from gatepack.masks import decode_mask, encode_mask, record_of
from gatepack.modules import PackedLinear, base_linear, is_conv1d, linear_shape, weight_matrix
from gatepack.packing import FORMAT_VERSION
from gatepack.row_column import RowColumnGateSet

Mask = Tensor | None


class IndexedLinear(PackedLinear):
    """y[rows] = W x[columns] + b, the other rows 0: a linear without its closed rows and columns.

    x [*, K] and y [*, N] have their dense widths, so that residual streams and heads stay as they
    were, except between the linears of an MLP, which hand each other open channels only. weight
    [|R|, |C|] and bias [|R|] are the parameters. Adapters that PEFT puts on it are of these sizes:
    they read x[columns] and add to y[rows] (follow_adapters).
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rows: Mask, columns: Mask, compact: tuple[bool, bool], values=None
    ) -> "IndexedLinear":
        """rows bool [N], columns bool [K], or None for all. compact: whether y and x hold open
        lanes only. values: gate values (rows [N], columns [K]) to fold in, or None."""
        packed = adopt(linear, cls)
        packed.dense_class, packed.dense_shape = type(linear), linear_shape(linear)
        packed.masks = (rows, columns)
        packed._indices = tuple(
            None if mask is None or mask.all() else mask.nonzero().squeeze(1)
            for mask in (rows, columns)
        )
        packed.compact = compact
        weight, bias = packed._kept(linear, *(values or (None, None)))
        packed._parameters["weight"] = nn.Parameter(weight, linear.weight.requires_grad)
        if bias is not None:
            packed._parameters["bias"] = nn.Parameter(bias, linear.bias.requires_grad)
        packed.out_features, packed.in_features = weight.shape
        return packed

    def _kept(self, linear: nn.Module, z_rows: Tensor | None, z_columns: Tensor | None):
        """(weight [|R|, |C|], bias [|R|] or None) of a dense linear, gate values folded in."""
        weight, bias = weight_matrix(linear).detach(), linear.bias
        if weight.is_meta:
            shape = [
                size if index is None else len(index)
                for size, index in zip(self.dense_shape, self._indices, strict=True)
            ]
            return weight.new_empty(shape), None if bias is None else bias.new_empty(shape[0])
        rows, columns = (self._index(side, weight.device) for side in (0, 1))
        z_rows, z_columns = _chosen(z_rows, rows), _chosen(z_columns, columns)
        kept = fold_pack(weight, rows, columns, z_rows, z_columns).contiguous()
        if bias is None:
            return kept, None
        bias = _chosen(bias.detach(), rows)
        return kept, bias.clone() if z_rows is None else (bias * z_rows).to(bias.dtype)

    def _index(self, side: int, device: torch.device) -> Tensor | None:
        index = self._indices[side]
        if index is not None and index.device != device:
            self._indices = tuple(i if i is None else i.to(device) for i in self._indices)
        return self._indices[side]

    def forward(self, x: Tensor, inside: bool = False) -> Tensor:
        """inside: x is x[columns] and y is y[rows] already, for an adapter that is around it."""
        return self.around(x, lambda x: F.linear(x, self.weight, self.bias), inside)

    def around(self, x: Tensor, inner: Callable[[Tensor], Tensor], inside: bool = False) -> Tensor:
        """inner, from x[columns] to y[rows], between what gathers and what scatters."""
        compact_out, compact_in = (True, True) if inside else self.compact
        columns = None if compact_in else self._index(1, x.device)
        y = inner(x if columns is None else take_lanes(x, columns))
        rows = None if compact_out else self._index(0, x.device)
        return y if rows is None else spread_lanes(y, rows, self.dense_shape[0])

    def to_dense(self) -> nn.Module:
        """The linear with zeros where rows and columns were removed."""
        rows, columns = (self._index(side, self.weight.device) for side in (0, 1))
        weight = fold_pack_adjoint(
            self.weight.detach(), rows, columns, None, None, *self.dense_shape
        )
        bias = None if self.bias is None else self.bias.detach()
        if bias is not None and rows is not None:
            bias = bias.new_zeros(self.dense_shape[0]).index_copy(0, rows, bias)
        dense = adopt(self, self.dense_class)
        for name in ("dense_class", "dense_shape", "masks", "_indices", "compact"):
            delattr(dense, name)
        if is_conv1d(dense):
            weight = weight.t().contiguous()
        else:
            dense.out_features, dense.in_features = weight.shape
        dense._parameters["weight"] = nn.Parameter(weight, self.weight.requires_grad)
        if bias is not None:
            dense._parameters["bias"] = nn.Parameter(bias, self.bias.requires_grad)
        return dense


@functools.cache
def _indexed_class(dense: type) -> type:
    """A subclass of a PEFT layer's class that runs inside the gather and scatter of its base."""

    def forward(self, x, *args, inside=False, **kwargs):
        def inner(x):
            return dense.forward(self, x, *args, inside=True, **kwargs)

        return base_linear(self).around(x, inner, inside)

    members = {"forward": forward, "indexed_from": dense}
    return derived("Indexed", dense, members, _indexed_class)


def follow_adapters(root: nn.Module) -> None:
    """Lets PEFT wrap the IndexedLinears of a model: looks for adapters before every forward, also
    of its trunk alone."""
    for module in {root, root.base_model}:
        if _bind_adapters not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_bind_adapters)


def _bind_adapters(module: nn.Module, args) -> None:
    for name, child in list(module.named_modules()):
        if not hasattr(child, "base_layer") or name.endswith("base_layer"):
            continue
        inner = isinstance(base_linear(child), IndexedLinear)
        if inner and not hasattr(type(child), "indexed_from"):
            module.set_submodule(name, adopt(child, _indexed_class(type(child))))


def _chosen(values: Tensor | None, index: Tensor | None) -> Tensor | None:
    return values if values is None or index is None else values[index]


@torch.no_grad()
def pack_rows_columns(root: nn.Module, gates: RowColumnGateSet) -> list[tuple[str, str, int, int]]:
    """Packs the gated linears of a model in place; the rows of its PackReport."""
    for name in gates.costs.shapes:
        if hasattr(root.get_submodule(name), "base_layer"):
            raise ValueError(
                f"{name} cannot be packed by rows and columns: it carries an adapter. Merge it "
                "first (model.merge_and_unload())"
            )
    values = gates.split(gates.deterministic_values().clone())
    open_masks = gates.open_masks()
    report = [
        (name, gate.kind, gate.size, int(open_masks[name].sum())) for name, gate in gates.items()
    ]
    names = list(gates.costs.shapes)
    detach(root)
    masks = {
        name: tuple(open_masks.get(f"{name}:{side}") for side in ("rows", "columns"))
        for name in names
    }
    folded = {
        name: tuple(values.get(f"{name}:{side}") for side in ("rows", "columns")) for name in names
    }
    _replace(root, masks, folded)
    root.config.gatepack = {
        **record_of(root.config),
        "format": FORMAT_VERSION,
        "linears": {
            name: {
                side: None if mask is None else encode_mask(mask)
                for side, mask in zip(("rows", "columns"), pair, strict=True)
            }
            for name, pair in masks.items()
        },
    }
    return report


def shrink_linears(model: nn.Module, record: Mapping[str, Mapping]) -> None:
    """Gives a dense model the shapes of one that pack_rows_columns packed; works on meta tensors.

    record: config.gatepack["linears"]. Raises ValueError where a name or size does not fit.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"config.gatepack: linears must be an object of sides, got {record!r}")
    masks = {}
    for name, sides in record.items():
        if not isinstance(sides, Mapping) or not {"rows", "columns"} <= sides.keys():
            raise ValueError(
                f"config.gatepack: linear {name!r} must have rows and columns, got {sides!r}"
            )
        try:
            shape = linear_shape(model.get_submodule(name))
        except AttributeError as error:
            raise ValueError(
                f"config.gatepack names linear {name!r}, which this architecture does not have"
            ) from error
        pair = tuple(
            None if sides[side] is None else decode_mask(sides[side])
            for side in ("rows", "columns")
        )
        for mask, size in zip(pair, shape, strict=True):
            if mask is not None and mask.numel() != size:
                raise ValueError(
                    f"config.gatepack has {mask.numel()} units for {name!r}, the architecture has "
                    f"{size}"
                )
        masks[name] = pair
    _replace(model, masks, {})


@torch.no_grad()
def unpack_rows_columns(root: nn.Module) -> dict[str, Tensor]:
    """The inverse of pack_rows_columns, zeros where units were removed; the masks by gate name."""
    record = dict(root.config.gatepack)
    kept = {}
    for name in record.pop("linears"):
        module = root.get_submodule(name)
        for side, mask in zip(("rows", "columns"), module.masks, strict=True):
            if mask is not None:
                kept[f"{name}:{side}"] = mask
        root.set_submodule(name, module.to_dense())
    record.pop("format")
    root.config.gatepack = record
    if not record:
        del root.config.gatepack
    return kept


def _replace(root: nn.Module, masks: Mapping[str, tuple[Mask, Mask]], values: Mapping) -> None:
    """Puts an IndexedLinear in the place of each linear named in masks."""
    compact = {name: [False, False] for name in masks}
    for layer in layers_of(root):
        for name, side in _interior(layer, masks):
            compact[name][side] = True
    for name, (rows, columns) in masks.items():
        packed = IndexedLinear.from_linear(
            root.get_submodule(name), rows, columns, tuple(compact[name]), values.get(name)
        )
        root.set_submodule(name, packed)
    follow_adapters(root)


def _interior(layer: Layer, masks: Mapping[str, tuple[Mask, Mask]]) -> list[tuple[str, int]]:
    """(linear, side) of an MLP whose linears all keep the same channels, else nothing."""
    up = [f"{layer.name}.{path}" for path in layer.family.up]
    down = f"{layer.name}.{layer.family.down}"
    channels = masks.get(down, (None, None))[1]
    rows = [masks.get(name, (None, None))[0] for name in up]
    if channels is None or any(r is None or not torch.equal(r, channels) for r in rows):
        return []
    return [*((name, 0) for name in up), (down, 1)]
