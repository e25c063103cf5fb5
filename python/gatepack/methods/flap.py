"""Stage 4, methods: FLAP, by how much a channel fluctuates, with its mean kept as a bias."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from gatepack.compensation import add_removed_means, check_biases
from gatepack.gates import GateSet
from gatepack.importance import gated_inputs
from gatepack.methods.one_shot import OneShot, worth
from gatepack.methods.statistics import Batch, Sums, gate_input_sums
from gatepack.modules import base_linear, weight_matrix


@dataclass(frozen=True)
class FLAP(OneShot):
    """metric_j = z-score over the lanes of a linear of Var(x_j) * ||W_:j||^2; a head has the mean.

    At o_proj and down_proj of each layer; one threshold over all layers and both kinds, where a
    head counts as its cost in parameters (512/3 channels in LLaMA-7B). compensate: the linear's
    bias takes over the mean of what is removed, b += W[:, c] E[x_c]. square_heads: the attention
    metric is squared before its z-score, as in the released code, not the paper. The variance is
    Welford's, without that code's "old mean" that aliases the new one. equal_layers=True in gates
    gives up the adaptive widths. Source: FLAP, arXiv 2312.11983.
    """

    compensate: bool = True
    square_heads: bool = False

    def _check(self, gates: GateSet) -> None:
        if self.compensate:
            check_biases(gates)

    def _measure(self, gates: GateSet, batches: Iterable[Batch]) -> dict[str, Sums]:
        return gate_input_sums(gates, batches)

    @torch.no_grad()
    def _metric(self, gates: GateSet, measured: dict[str, Sums]) -> dict[str, torch.Tensor]:
        metric = {}
        for gate, linear in gated_inputs(gates):
            weight = weight_matrix(base_linear(linear)).detach().double()
            lanes = measured[gate.name].variance * weight.square().sum(0)
            if self.square_heads and gate.kind == "heads":
                lanes = lanes.square()
            spread = lanes.std().nan_to_num()
            scores = (lanes - lanes.mean()) / torch.where(spread == 0, 1.0, spread)
            metric[gate.name] = scores.reshape(gate.size, gate.lanes).mean(1)
        return metric

    def _score(self, gates: GateSet, measured: dict[str, Sums]) -> dict[str, torch.Tensor]:
        return worth(gates, self._metric(gates, measured))

    def _close(
        self, gates: GateSet, masks: Mapping[str, torch.Tensor], measured: dict[str, Sums]
    ) -> None:
        gates.set_open(masks)
        if self.compensate:
            add_removed_means(gates, masks, {name: s.mean for name, s in measured.items()})
