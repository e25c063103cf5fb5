"""Stage 4, methods: magnitude pruning, by the norm of the weights that a unit couples."""

from dataclasses import dataclass

import torch

from gatepack.gates import GateSet
from gatepack.methods.coupling import unit_totals
from gatepack.methods.one_shot import OneShot, comparable, worth
from gatepack.modules import weight_matrix


@dataclass(frozen=True)
class Magnitude(OneShot):
    """metric = (sum over a unit's coupled weights of |w|^order)^(1/order), needs no batches.

    order: 2 or 1. per_layer: the same fraction of every gate, as published; False sets one
    threshold on norm / mean norm of the gate (ours). Biases do not count. Source: the L1 and L2
    baselines of LLM-Pruner, arXiv 2305.11627, whose sum of |w|^order ranks units alike.
    """

    order: int = 2
    per_layer: bool = True

    def __post_init__(self):
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order!r}")

    @torch.no_grad()
    def _metric(self, gates: GateSet, measured) -> dict[str, torch.Tensor]:
        def powers(linear):
            return weight_matrix(linear).detach().double().abs() ** self.order

        totals = unit_totals(gates, powers)
        return {name: total ** (1 / self.order) for name, total in totals.items()}

    def _score(self, gates: GateSet, measured) -> dict[str, torch.Tensor]:
        return worth(gates, comparable(self._metric(gates, measured), self.per_layer))
