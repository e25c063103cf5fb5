"""Stage 3, modules: which path each gated linear takes and why, and what sizes a model has."""

import copy
from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn

from gatepack import _ext
from gatepack.in_place import tokens_decoded
from gatepack.layers import GATES_NAME, hf_model, layers_of
from gatepack.masks import is_packed, record_of
from gatepack.mlp import GatedMLP
from gatepack.modules import (
    PackedLinear,
    base_linear,
    is_gated,
    linear_shape,
    most_in_place,
    operands_of,
    width_of,
)
from gatepack.paths import choose_path, few_tokens
from gatepack.sites import Site


@dataclass(frozen=True)
class Explained:
    """One linear: its name, what acts on it, the path for few and for many tokens, and why.

    Paths: "folded", "triton" and "dense" (gatepack.paths), "packed" (an ordinary small linear).
    """

    module: str
    role: str
    few: str
    many: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """rows: one Explained per linear. fold_pack: its implementation and why. Prints as a table."""

    rows: tuple[Explained, ...]
    fold_pack: str

    def __str__(self):
        header = ("module", "role", "few tokens", "more", "why")
        table = [header, *((row.module, row.role, row.few, row.many, row.why) for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) for cells in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), f"fold_pack: {self.fold_pack}"])


def explain(model: nn.Module) -> Explanation:
    """Names the path of every gated or packed linear of a model, on the device it is on.

    The answer is for the present state: active adapters, autocast, gradients, GATEPACK_BACKEND, and
    the gates without noise.
    Any module is accepted; one without gates gives no rows.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    packed = _packed_linears(model)
    mlps = [m for m in model.modules() if isinstance(m, GatedMLP) and not m.why_not_fused()]
    fused = {id(linear) for mlp in mlps for linear in mlp.linears()}
    rows = []
    for name, module in model.named_modules():
        if is_gated(module):
            row = _gated_row(name, module)
            if id(module) in fused:
                row = replace(row, why=f"{row.why}; the MLP is one op")
            rows.append(row)
        elif id(module) in packed:
            out, inner = linear_shape(module)
            was = ""
            if isinstance(module, PackedLinear):
                was = f" of {module.dense_shape[1]} -> {module.dense_shape[0]}"
            why = "closed units are removed"
            if isinstance(module, PackedLinear):
                few = tokens_decoded(module.weight)
                why += f"; up to {few} tokens: gatepack._C" if few else ""
            rows.append(Explained(name, f"{inner} -> {out}{was}", "packed", "packed", why))
    backend = _ext.backend()
    return Explanation(tuple(rows), f"{backend.name} ({backend.reason})")


def _packed_linears(model: nn.Module) -> set[int]:
    """Identities of the packed linears; also gates linears wrapped since the last forward."""
    packed = {id(module) for module in model.modules() if isinstance(module, PackedLinear)}
    try:
        root = hf_model(model)
    except ValueError:
        return packed
    if hasattr(root, GATES_NAME):
        getattr(root, GATES_NAME).attachment.bind()
    kept = record_of(root.config).get("kept", {})
    for layer in layers_of(root) if kept else ():
        family = layer.family
        paths = []
        if f"{layer.heads_name}:heads" in kept:
            paths += [*((family.qkv,) if family.qkv else (family.q, *family.kv)), family.out]
        if f"{layer.channels_name}:channels" in kept:
            paths += [*family.up, family.down]
        packed.update(id(layer.linear(path)) for path in paths)
    return packed


def _gated_row(name: str, module: nn.Module) -> Explained:
    operands = operands_of(module)
    if isinstance(operands, str):
        return Explained(name, _role(module.site), "dense", "dense", operands)
    width, device = width_of(module), base_linear(module).weight.device
    kept = module.site.kept(device, noise=False)
    in_place = most_in_place(module)
    limit = max(few_tokens(width, device, kept), in_place)
    few = choose_path(1, width, device, kept, in_place)
    many = choose_path(limit + 1, width, device, kept, in_place)
    why = few.why if few == many else f"{few.path}: {few.why}; {many.path}: {many.why}"
    return Explained(name, _role(module.site), few.path, many.path, why)


def _role(site: Site) -> str:
    gates = (("in", site.in_gate), ("out", site.out_gate), ("rows", site.rows_gate))
    named = [f"{role} {gate.name.rpartition(':')[2]}" for role, gate in gates if gate is not None]
    return ", ".join(named) or "no gate"


def identify(model: nn.Module, name: str = "") -> dict:
    """What a report says of a model: its name, class, dtype, parameters and widths.

    kept_fraction: of the blocks' linear weights, against the model that its config describes; for a
    gated model what its gates leave open. widths: units that each layer has in memory; None for a
    family that gatepack does not know, and for a model packed by rows and columns, which are of
    single linears.
    """
    root = hf_model(model)
    gates = getattr(root, GATES_NAME, None)
    own = set() if gates is None else {id(p) for p in gates.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in own]
    found = {
        "name": name,
        "class": type(root).__name__,
        "dtype": str(root.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "vocabulary": root.get_input_embeddings().weight.shape[0],
    }
    try:
        layers = layers_of(root)
    except ValueError:  # a family that gatepack has no row for has no widths to tell
        return {**found, "state": "dense", "kept_fraction": 1.0, "widths": None}
    record = record_of(root.config)
    found["widths"] = None
    if not record.get("linears"):
        found["widths"] = {
            "heads": [layer.queries for layer in layers],
            "kv_heads": [layer.kv_heads for layer in layers],
            "channels": [linear_shape(layer.linear(layer.family.down))[1] for layer in layers],
        }
    packed = is_packed(root.config)
    kept = _block_weights(layers) / _dense_block_weights(root) if packed else 1.0
    if gates is not None:
        kept *= gates.kept_fraction()
    state = "gated" if gates is not None else "packed" if packed else "dense"
    return {**found, "state": state, "kept_fraction": kept}


def _dense_block_weights(root: nn.Module) -> int:
    # A model that its modelling file built (exporters/modeling_gatepack.py) is of a class PackedX.
    name = type(root).__name__.removeprefix("Packed")
    dense_class = getattr(transformers, name, type(root))
    with torch.device("meta"):
        config = copy.copy(root.config)
        config.dtype = root.dtype  # a saved model's has the name, which not every class takes
        return _block_weights(layers_of(dense_class(config)))


def _block_weights(layers) -> int:
    return sum(
        layer.linear(path).weight.numel() for layer in layers for path in layer.family.linears
    )
