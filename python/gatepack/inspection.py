"""Stage 3, modules: which backend each gated linear runs on, and why."""

from dataclasses import dataclass

import torch
from torch import nn

from gatepack import _ext
from gatepack.hf import GATES_NAME, hf_model, layers_of
from gatepack.modules import (
    FEW_TOKENS,
    PackedLinear,
    Site,
    backend_of,
    base_linear,
    is_gated,
    linear_shape,
    operands_of,
)


@dataclass(frozen=True)
class Explained:
    """One linear: its name, what acts on it, the backend for few and for many tokens, and why.

    Backends: "folded" (pack the open part of W, then plain matmuls), "triton" (gates inside the
    kernel), "dense" (the ungated forward at its full price, between multiplications), "packed" (an
    ordinary small linear).
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
        header = ("module", "role", f"<= {FEW_TOKENS} tokens", "more", "why")
        table = [header, *((row.module, row.role, row.few, row.many, row.why) for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) for cells in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), f"fold_pack: {self.fold_pack}"])


def explain(model: nn.Module) -> Explanation:
    """Names the backend of every gated or packed linear of a model, on the device it is on.

    The answer is for the present state: active adapters, autocast, training mode, GATEPACK_BACKEND.
    Any module is accepted; one without gates gives no rows.
    """
    packed = _packed_linears(model)
    rows = []
    for name, module in model.named_modules():
        if is_gated(module):
            rows.append(_gated_row(name, module))
        elif id(module) in packed:
            out, inner = linear_shape(module)
            was = ""
            if isinstance(module, PackedLinear):
                was = f" of {module.dense_shape[1]} -> {module.dense_shape[0]}"
            rows.append(
                Explained(
                    name, f"{inner} -> {out}{was}", "packed", "packed", "closed units are removed"
                )
            )
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
    kept = (getattr(root.config, "gatepack", None) or {}).get("kept", {})
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
    site: Site = module.site
    operands = operands_of(module)
    weight = base_linear(module).weight
    value = torch.empty((), device=weight.device, dtype=weight.dtype)
    inner = linear_shape(base_linear(module))[1]
    few, few_why = backend_of(value.expand(1, inner), operands)
    many, many_why = backend_of(value.expand(FEW_TOKENS + 1, inner), operands)
    why = few_why if (few, few_why) == (many, many_why) else f"{few}: {few_why}; {many}: {many_why}"
    return Explained(name, _role(site), few, many, why)


def _role(site: Site) -> str:
    gates = (("in", site.in_gate), ("out", site.out_gate), ("rows", site.rows_gate))
    named = [f"{role} {gate.name.rpartition(':')[2]}" for role, gate in gates if gate is not None]
    return ", ".join(named) or "no gate"
