"""Stage 5, pack: remove closed units physically, and put zeros back in their place."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gatepack.adopt import adopt
from gatepack.gates import GateSpec
from gatepack.head_counts import set_head_counts
from gatepack.hf import detach, gates_of
from gatepack.layers import GATES_NAME, Layer, hf_model, layers_of
from gatepack.masks import decode_mask, encode_mask, physical_mask, record_of
from gatepack.modules import (
    PackedLinear,
    base_linear,
    is_conv1d,
    linear_shape,
    tuners_of,
    weight_matrix,
    why_not_sliced,
)
from gatepack.repack import Piece, pack_tensors, unpack_tensors
from gatepack.samples import lane_indices
from gatepack.sharding import refuse_sharded
from gatepack.sites import gated_sites

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackReport:
    """What pack removed.

    rows: (gate name, kind, units before, units kept) per gate. params and bytes: of the whole
    model, (before, after).
    block_params: of the blocks' linears. padded: units that were closed and stayed, as zeros,
    because engines want equally many query heads per key/value head and no empty linear.
    """

    rows: tuple[tuple[str, str, int, int], ...]
    params: tuple[int, int]
    block_params: tuple[int, int]
    bytes: tuple[int, int]
    padded: int

    @property
    def kept_fraction(self) -> float:
        """Kept fraction of the blocks' linear weights."""
        return self.block_params[1] / self.block_params[0]

    def to_dict(self) -> dict:
        return {
            "layers": [
                dict(zip(("gate", "kind", "before", "kept"), row, strict=True)) for row in self.rows
            ],
            "params": list(self.params),
            "block_params": list(self.block_params),
            "bytes": list(self.bytes),
            "padded_units": self.padded,
            "kept_fraction": self.kept_fraction,
        }

    def __str__(self):
        width = max(len(row[0]) for row in self.rows)
        lines = [f"{'gate':<{width}}  {'before':>6}  {'kept':>6}"]
        lines += [f"{name:<{width}}  {before:>6}  {kept:>6}" for name, _, before, kept in self.rows]
        for what, (before, after) in (
            ("parameters", self.params),
            ("in blocks", self.block_params),
        ):
            lines.append(f"{what} {before:,} -> {after:,} ({after / before:.1%})")
        lines.append(f"bytes {self.bytes[0]:,} -> {self.bytes[1]:,}")
        return "\n".join(lines)


class _Fixed:
    """A gate whose open set is fixed: what gated_sites needs to name the lanes of a packed
    layer."""

    def __init__(self, name: str, spec: GateSpec, mask: torch.Tensor):
        self.name, self.spec, self.mask = name, spec, mask
        self.size, self.lanes, self.kind = spec.size, spec.lanes, spec.kind

    def kept_lanes(self, shared: bool = False, parts: int = 1) -> torch.Tensor:
        mask = self.mask.reshape(-1, self.spec.shared_size).any(1) if shared else self.mask
        return lane_indices(mask.nonzero().squeeze(1), self.lanes * parts)


@torch.no_grad()
def pack(model: nn.Module) -> PackReport:
    """Removes closed units from a gated model, in place, and folds fractional gates.

    What is closed is what the noiseless gates say (eval mode): packed logits equal gated logits in
    eval mode up to rounding. LoRA factors are sliced with their weights and go on training; merge
    them first for a plain model, and for gates on rows and columns, whose linears then gather their
    input and scatter their output on the residual side. The gates are taken off and config.gatepack
    records which units stayed, for unpack and from_pretrained. Raises ValueError if the model has
    no gates or an adapter that cannot be sliced; then nothing has changed.
    """
    from gatepack.checkpoint import leave_modeling_file

    root = hf_model(model)
    gates = gates_of(root)
    refuse_sharded(
        root,
        "no rank has all of what is to be packed",
        "load its full state dict (torch.distributed.checkpoint.state_dict) into a model on one "
        "rank",
    )
    if gates.config.target < 1 and gates.kept_fraction() == 1:
        logger.warning(
            "every gate is open, so nothing is removed, and the target is %.1f %%: call finish() "
            "of what trains them, or gates.snap(), before pack",
            100 * gates.config.target,
        )
    layers = layers_of(root)
    if gates.config.of_linears:
        from gatepack.row_column_packing import pack_rows_columns

        before = sizes_of(root, layers, gates)
        rows = pack_rows_columns(root, gates)
        return report_of(rows, before, sizes_of(root, layers, None), 0)
    refuse_opaque(layers)
    values = gates.split(gates.deterministic_values().clone())
    open_masks = gates.open_masks()
    masks, rows, padded = {}, [], 0
    for name, gate in gates.items():
        masks[name] = physical_mask(gate.kind, gate.spec.shared_size, open_masks[name])
        padded += int(masks[name].sum()) - int(open_masks[name].sum())
        rows.append((name, gate.kind, gate.size, int(masks[name].sum())))
    before = sizes_of(root, layers, gates)
    specs = {name: gate.spec for name, gate in gates.items()}
    detach(root)
    record = kept_record(root.config, masks)
    apply_masks(layers, specs, masks, values)
    leave_modeling_file(root)
    root.config.gatepack = {**record_of(root.config), **record}
    return report_of(rows, before, sizes_of(root, layers, None), padded)


def report_of(rows: list, before: tuple, after: tuple, padded: int) -> PackReport:
    params, block_params, sizes = zip(before, after, strict=True)
    return PackReport(tuple(rows), params, block_params, sizes, padded)


def kept_record(config, masks: Mapping[str, torch.Tensor]) -> dict:
    """What config.gatepack says of a packed model; a second pack is told in units of the first."""
    kept = dict(record_of(config).get("kept", {}))
    for name, mask in masks.items():
        if name in kept:
            whole = decode_mask(kept[name])
            whole[whole.clone()] = mask
            mask = whole
        kept[name] = encode_mask(mask)
    return {"format": FORMAT_VERSION, "kept": kept}


def refuse_opaque(layers: list[Layer]) -> None:
    for layer in layers:
        for path in layer.family.linears:
            reason = why_not_sliced(layer.module.get_submodule(path))
            if reason:
                raise ValueError(
                    f"{layer.name}.{path} cannot be packed: {reason}. Merge it first "
                    "(model.merge_and_unload())"
                )


def sizes_of(root: nn.Module, layers: list[Layer], gates: nn.Module | None) -> tuple[int, int, int]:
    own = set() if gates is None else {id(p) for p in gates.parameters()}
    parameters = [p for p in root.parameters() if id(p) not in own]
    block = sum(
        layer.linear(path).weight.numel() for layer in layers for path in layer.family.linears
    )
    return (
        sum(p.numel() for p in parameters),
        block,
        sum(p.numel() * p.element_size() for p in parameters),
    )


def apply_masks(layers, specs, masks, values, follow=None) -> None:
    """Packs every gated linear to masks, folding values (name -> [size]) unless they are None.

    follow(cut, parameter) is told, layer by layer, what a new parameter is of which old one.
    """
    for layer in layers:
        family = layer.family
        heads = _fixed(specs, masks, f"{layer.heads_name}:heads")
        channels = _fixed(specs, masks, f"{layer.channels_name}:channels")
        selections = []
        for path, site in gated_sites(family, heads, channels):
            folds = values is not None and site.in_gate is not None
            z = values[site.in_gate.name] if folds else None
            selections.append(_selection(layer, path, site, z))
        if follow is None:
            _pack_layer(selections)
        else:
            _pack_followed(selections, follow)
        if heads is not None:
            kept = heads.kept_lanes().numel() // heads.lanes
            blocks = heads.kept_lanes(shared=True).numel() // heads.lanes
            attention = layer.module.get_submodule(family.attention)
            set_head_counts(attention, family, kept, blocks, heads.lanes)


def _fixed(specs, masks, name: str) -> _Fixed | None:
    return _Fixed(name, specs[name], masks[name]) if name in masks else None


def _lane_indices(site, device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    rows = cols = None
    if site.rows_gate is not None:
        parts = [
            site.rows_gate.kept_lanes(block.shared, block.parts) + block.offset
            for block in site.row_blocks
        ]
        rows = torch.cat(parts).to(device)
    if site.in_gate is not None:
        cols = site.in_gate.kept_lanes().to(device)
    return rows, cols


@dataclass(frozen=True)
class Cut:
    """What stays of a parameter: the indices along each of its dimensions, None for all."""

    parameter: nn.Parameter
    kept: tuple[torch.Tensor | None, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same part of a tensor of the parameter's shape: its gradient, its moments."""
        for dim, index in enumerate(self.kept):
            if index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor


@dataclass(frozen=True)
class _Selection:
    """The lanes of one linear that a layer's gates keep, and what to multiply its columns by."""

    parent: nn.Module
    name: str
    rows: torch.Tensor | None
    cols: torch.Tensor | None
    z_in: torch.Tensor | None = None

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)

    def pieces(self) -> list[tuple[str, Piece]]:
        """(kind, piece) of every tensor that the selection cuts, in the order of parameters."""
        base, rows, cols = base_linear(self.module), self.rows, self.cols
        found = [("weight", Piece(weight_matrix(base).detach(), rows, cols, None, self.z_in))]
        if base.bias is not None:
            # One row, whose columns are the rows of the weight.
            found.append(("bias", Piece(base.bias.detach()[None], None, rows)))
        for kind, factor in _lora_factors(self.module):
            cut = (None, cols, None, self.z_in) if kind == "lora_A" else (rows,)
            found.append((kind, Piece(factor.weight.detach(), *cut)))
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Of the linear: weight, bias, LoRA factors."""
        base = base_linear(self.module)
        factors = [factor.weight for _, factor in _lora_factors(self.module)]
        return [base.weight, *([] if base.bias is None else [base.bias]), *factors]

    def cuts(self) -> list[Cut]:
        """What stays of each of the parameters, in their own layout."""
        base, rows, cols = base_linear(self.module), self.rows, self.cols
        kept = [(cols, rows) if is_conv1d(base) else (rows, cols)]
        kept += [] if base.bias is None else [(rows,)]
        for kind, _ in _lora_factors(self.module):
            kept.append((None, cols) if kind == "lora_A" else (rows, None))
        return [Cut(*each) for each in zip(self.parameters(), kept, strict=True)]

    def install(self, made: Iterator[torch.Tensor], dense: bool) -> None:
        """Puts the next tensors, those of the pieces, into the modules: packed, or dense again."""
        base, tuners = base_linear(self.module), list(tuners_of(self.module))
        weight, bias = next(made), None if base.bias is None else next(made)[0]
        twin = (_dense_twin if dense else _with_operands)(base, weight, bias)
        if tuners:
            tuners[-1].base_layer = twin
        else:
            setattr(self.parent, self.name, twin)
        for tuner in tuners:
            tuner.out_features, tuner.in_features = linear_shape(twin)
        for _, factor in _lora_factors(self.module):
            _replace_weight(factor, next(made))


def _lora_factors(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(kind, factor) of every adapter of a linear: "lora_A" or "lora_B"."""
    return [
        (kind, factor)
        for tuner in tuners_of(module)
        for kind in ("lora_A", "lora_B")
        for factor in getattr(tuner, kind).values()
    ]


def _selection(layer: Layer, path: str, site, z: torch.Tensor | None) -> _Selection:
    parent_path, _, name = path.rpartition(".")
    parent = layer.module.get_submodule(parent_path)
    rows, cols = _lane_indices(site, base_linear(getattr(parent, name)).weight.device)
    z_in = None
    if cols is not None and z is not None:
        lanes = z if site.in_gate.lanes == 1 else z.repeat_interleave(site.in_gate.lanes)
        lanes = lanes.to(cols.device)[cols]
        z_in = None if bool((lanes == 1).all()) else lanes
    return _Selection(parent, name, rows, cols, z_in)


def _kept(index: torch.Tensor | None, size: int) -> int:
    return size if index is None else index.numel()


def _pack_followed(selections: list[_Selection], follow) -> None:
    cuts = [cut for selection in selections for cut in selection.cuts()]
    _pack_layer(selections)
    made = [parameter for selection in selections for parameter in selection.parameters()]
    for cut, parameter in zip(cuts, made, strict=True):
        follow(cut, parameter)


def _pack_layer(selections: list[_Selection]) -> None:
    """Packs the linears of a layer in one call: one layer is what memory holds twice."""
    pieces = [piece for selection in selections for _, piece in selection.pieces()]
    if pieces and pieces[0].matrix.is_meta:
        packed = [
            piece.matrix.new_empty(
                _kept(piece.rows, piece.matrix.shape[0]), _kept(piece.cols, piece.matrix.shape[1])
            )
            for piece in pieces
        ]
    else:
        packed, _ = pack_tensors(pieces)
    _install(selections, packed, dense=False)


def _install(selections: list[_Selection], tensors, dense: bool) -> None:
    tensors = iter(tensors)
    for selection in selections:
        selection.install(tensors, dense)


def _with_operands(linear: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """linear with new operands: a PackedLinear, or for GPT-2 the same Conv1D resized in place."""
    trains = linear.weight.requires_grad
    if bias is not None:
        bias = nn.Parameter(bias.detach(), requires_grad=linear.bias.requires_grad)
    if is_conv1d(linear):
        linear.weight = nn.Parameter(weight.t().contiguous(), requires_grad=trains)
        linear.bias = bias
        linear.nx, linear.nf = linear.weight.shape
        return linear
    return PackedLinear.from_linear(
        linear, nn.Parameter(weight.contiguous(), requires_grad=trains), bias
    )


def _replace_weight(linear: nn.Linear, weight: torch.Tensor) -> None:
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def shrink(model: nn.Module, kept: Mapping[str, Mapping]) -> None:
    """Gives a dense transformers model the shapes of a packed one, dropping closed units.

    kept: config.gatepack["kept"]. Works on meta tensors. Raises ValueError where a name or size
    does not fit.
    """
    if not isinstance(kept, Mapping):
        raise ValueError(f"config.gatepack: kept must be an object of open sets, got {kept!r}")
    layers = layers_of(model)
    specs = _dense_specs(layers)
    masks = {}
    for name, record in kept.items():
        if name not in specs:
            raise ValueError(
                f"config.gatepack names gate {name!r}, which this architecture does not have"
            )
        mask = decode_mask(record)
        if mask.numel() != specs[name].size:
            raise ValueError(
                f"config.gatepack has {mask.numel()} units for {name!r}, the architecture has "
                f"{specs[name].size}"
            )
        if not torch.equal(physical_mask(specs[name].kind, specs[name].shared_size, mask), mask):
            raise ValueError(
                f"config.gatepack keeps unequally many query heads per key/value head of {name!r}, "
                "or none at all"
            )
        masks[name] = mask
    apply_masks(layers, specs, masks, None)


def _dense_specs(layers: list[Layer]) -> dict[str, GateSpec]:
    specs = {}
    for layer in layers:
        ratio = layer.queries // layer.kv_heads
        specs[f"{layer.heads_name}:heads"] = GateSpec(
            "heads", layer.queries, layer.head_dim, shared_size=ratio
        )
        width = linear_shape(layer.linear(layer.family.down))[1]
        specs[f"{layer.channels_name}:channels"] = GateSpec("channels", width)
    return specs


@torch.no_grad()
def unpack(model: nn.Module) -> dict[str, torch.Tensor]:
    """Puts a packed model back into its dense shape, zeros where units were removed, in place.

    Returns name -> bool [size] of the units that hold weights; to go on training with them closed,
    attach gates and call gates.set_open with it. Raises ValueError if the model is not packed.
    """
    root = hf_model(model)
    if hasattr(root, GATES_NAME):
        raise ValueError("model has gates: pack or detach them first")
    record = record_of(root.config)
    if "linears" in record:
        from gatepack.row_column_packing import unpack_rows_columns

        return unpack_rows_columns(root)
    if "kept" not in record:
        raise ValueError("model is not packed: its config has no gatepack record of kept units")
    masks = {name: decode_mask(mask) for name, mask in record.pop("kept").items()}
    record.pop("format")
    layers = layers_of(root)
    refuse_opaque(layers)
    for layer in layers:
        family = layer.family
        specs = _specs_from_masks(layer, masks, root.config)
        heads = _fixed(specs, masks, f"{layer.heads_name}:heads")
        channels = _fixed(specs, masks, f"{layer.channels_name}:channels")
        sites = list(gated_sites(family, heads, channels))
        _unpack_layer([(_selection(layer, path, site, None), site) for path, site in sites])
        if heads is not None:
            attention = layer.module.get_submodule(family.attention)
            blocks = heads.size // heads.spec.shared_size
            set_head_counts(attention, family, heads.size, blocks, heads.lanes)
    root.config.gatepack = record
    if not record:
        del root.config.gatepack
    return masks


def _specs_from_masks(layer: Layer, masks, config) -> dict[str, GateSpec]:
    specs = {}
    name = f"{layer.heads_name}:heads"
    if name in masks:
        size = masks[name].numel()
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        ratio = config.num_attention_heads // kv_heads
        specs[name] = GateSpec("heads", size, layer.head_dim, shared_size=ratio)
    name = f"{layer.channels_name}:channels"
    if name in masks:
        specs[name] = GateSpec("channels", masks[name].numel())
    return specs


def _dense_shape(linear: nn.Module, site) -> tuple[int, int]:
    out, inner = linear_shape(linear)
    if site.rows_gate is not None:
        out = sum(block.rows(site.rows_gate) for block in site.row_blocks)
    if site.in_gate is not None:
        inner = site.in_gate.size * site.in_gate.lanes
    return out, inner


def _unpack_layer(sites: list[tuple[_Selection, object]]) -> None:
    """Puts the linears of a layer back into their dense shapes in one call."""
    pieces, shapes = [], []
    for selection, site in sites:
        out, inner = _dense_shape(base_linear(selection.module), site)
        for kind, piece in selection.pieces():
            m, n = piece.matrix.shape
            rows = out if kind in ("weight", "lora_B") else m
            pieces.append(piece)
            shapes.append((rows, {"bias": out, "lora_B": n}.get(kind, inner)))
    _install([selection for selection, _ in sites], unpack_tensors(pieces, shapes), dense=True)


def _dense_twin(base: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    twin = _with_operands(base, weight, bias)
    if isinstance(twin, PackedLinear):
        twin = adopt(twin, nn.Linear)
        del twin.dense_shape
    return twin
