"""Stage 4, methods: sums over the weights that come and go with each unit of a gate."""

from collections.abc import Callable

import torch
from torch import nn

from gatepack.gates import GateSet
from gatepack.modules import base_linear


def unit_totals(
    gates: GateSet,
    matrix_of: Callable[[nn.Module], torch.Tensor],
    lane: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Gate name -> [units]: matrix_of(linear) [N, K], summed over the coupled weights of each unit.

    Coupled are the columns of the out (down) linear and the rows of q (gate and up), and of k and v
    the share of a query head: 1 / (query heads per key/value head). lane: applied to the sum over
    each row or column before the rows and columns of a unit are added up.
    """
    totals: dict[str, torch.Tensor] = {}

    def add(name: str, lanes: int, vector: torch.Tensor, shared: int = 1) -> None:
        vector = vector if lane is None else lane(vector)
        part = vector.reshape(-1, lanes).sum(1)
        if shared > 1:
            part = part.repeat_interleave(shared) / shared
        totals[name] = totals[name] + part if name in totals else part

    for parent, name, site in gates.attachment.sites:
        matrix = matrix_of(base_linear(parent._modules[name]))
        if site.in_gate is not None:
            add(site.in_gate.name, site.in_gate.lanes, matrix.sum(0))
        if site.rows_gate is not None:
            gate, rows = site.rows_gate, matrix.sum(1)
            for block in site.row_blocks:
                shared = gate.spec.shared_size if block.shared else 1
                part = rows[block.offset : block.offset + block.rows(gate)]
                add(gate.name, gate.lanes * block.parts, part, shared)
    return {name: totals[name] for name in gates}


def gated_linears(gates: GateSet) -> list[nn.Module]:
    """Every linear that a gate takes rows or columns from."""
    return [base_linear(parent._modules[name]) for parent, name, _ in gates.attachment.sites]
