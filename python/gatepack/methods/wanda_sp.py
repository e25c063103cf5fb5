"""Stage 4, methods: Wanda-sp, by weight times activation norm at the linears that units feed."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gatepack.gates import GateSet
from gatepack.importance import gated_inputs
from gatepack.methods.one_shot import OneShot, comparable, worth
from gatepack.methods.statistics import Batch, Sums, gate_input_sums
from gatepack.modules import base_linear, weight_matrix


@dataclass(frozen=True)
class WandaSP(OneShot):
    """metric_j = mean_i |W_ij| * ||x_j||_2 at o_proj and down_proj; a head sums its lanes.

    ||x_j||_2 runs over all calibration tokens. per_layer: the same fraction of every gate, as
    published; False sets one threshold on metric / mean metric of the gate (ours: activation norms
    grow with depth, so the metric itself does not compare layers). Statistics come from one pass
    through the dense model; the released code prunes each layer before it measures the next.
    Source: Wanda, arXiv 2306.11695; its structured form is a baseline of FLAP, arXiv 2312.11983.
    """

    per_layer: bool = True

    def _measure(self, gates: GateSet, batches: Iterable[Batch]) -> dict[str, Sums]:
        return gate_input_sums(gates, batches)

    @torch.no_grad()
    def _metric(self, gates: GateSet, measured: dict[str, Sums]) -> dict[str, torch.Tensor]:
        metric = {}
        for gate, linear in gated_inputs(gates):
            weight = weight_matrix(base_linear(linear)).detach().double()
            lanes = weight.abs().mean(0) * measured[gate.name].square_sum.sqrt()
            metric[gate.name] = lanes.reshape(gate.size, gate.lanes).sum(1)
        return metric

    def _score(self, gates: GateSet, measured: dict[str, Sums]) -> dict[str, torch.Tensor]:
        return worth(gates, comparable(self._metric(gates, measured), self.per_layer))
