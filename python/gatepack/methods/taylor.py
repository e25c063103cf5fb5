"""Stage 4, methods: first-order Taylor pruning (LLM-Pruner), by weight times gradient."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from gatepack.calibration import (
    Batch,
    frozen,
    inputs_of,
    label_count,
    require_batches,
    with_labels,
)
from gatepack.gates import GateSet
from gatepack.layers import layers_of
from gatepack.methods.coupling import gated_linears, unit_totals
from gatepack.methods.one_shot import OneShot, comparable, plan_masks, worth
from gatepack.modules import is_conv1d, weight_matrix
from gatepack.quality import input_device

VARIANTS = ("param_first", "vectorize", "unit")


@dataclass(frozen=True)
class Taylor(OneShot):
    """metric = sum over a unit's coupled weights of |w dL/dw|, L the mean loss of all batches.

    variant: "param_first" is that (LLM-Pruner's element-wise first order, groups added up);
    "vectorize" takes |sum of w dL/dw| over each row or column and adds those up (its vector-wise
    one); "unit" is |sum of w dL/dw| over the whole unit, the first-order change of the loss itself
    (Molchanov et al. 2019, arXiv 1906.10771). keep_first, keep_last: layers that stay whole; 4 and
    2 are the published ones, for 32 layers. per_layer: the same fraction of every other gate, as
    published; False takes the metric itself as what a unit is worth, over all layers.

    batches: token ids of a causal language model, or dicts with labels. Gradients of every gated
    linear are held at once, in fp32. Second-order variants (param_second, param_mix) are left out.
    Source: LLM-Pruner, arXiv 2305.11627.
    """

    variant: str = "param_first"
    keep_first: int = 4
    keep_last: int = 2
    per_layer: bool = True

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {self.variant!r}")
        for field in ("keep_first", "keep_last"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be >= 0, got {getattr(self, field)}")

    def _check(self, gates: GateSet) -> None:
        if not self._prunable(gates):
            raise ValueError(
                f"keep_first={self.keep_first} and keep_last={self.keep_last} leave no gate of "
                f"{len(layers_of(gates.attachment.root))} layers to prune"
            )

    def _measure(self, gates: GateSet, batches: Iterable[Batch]) -> dict[int, torch.Tensor]:
        return _gradients(gates.attachment.root, gated_linears(gates), batches)

    @torch.no_grad()
    def _metric(self, gates: GateSet, measured: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        def products(linear):
            product = weight_matrix(linear).detach() * measured[id(linear)]
            return product.abs() if self.variant == "param_first" else product

        lane = torch.abs if self.variant == "vectorize" else None
        return {name: total.abs() for name, total in unit_totals(gates, products, lane).items()}

    def _score(self, gates: GateSet, measured: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        metric = self._metric(gates, measured)
        if self.per_layer:
            return worth(gates, comparable(metric, True))
        return {name: value.float() for name, value in metric.items()}

    def _masks(self, gates: GateSet, measured) -> Mapping[str, torch.Tensor]:
        whole = set(gates) - set(self._prunable(gates))
        return plan_masks(gates, self._score(gates, measured), self.per_layer, whole)

    def _prunable(self, gates: GateSet) -> list[str]:
        layers = layers_of(gates.attachment.root)
        inner = layers[self.keep_first : len(layers) - self.keep_last]
        names = {f"{layer.heads_name}:heads" for layer in inner}
        names |= {f"{layer.channels_name}:channels" for layer in inner}
        return [name for name in gates if name in names]


def _gradients(
    root: nn.Module, linears: list[nn.Module], batches: Iterable[Batch]
) -> dict[int, torch.Tensor]:
    """id(linear) -> dL/dW [N, K], at least fp32, L the mean over the labels of all batches.

    Gradients, requires_grad and modes of the model stay as they were.
    """
    weights = [linear.weight for linear in linears]
    sums = None
    tokens = done = 0
    with frozen(root, but=weights):
        for batch in tqdm(batches, desc="gradients", unit="batch", leave=False, disable=None):
            inputs = with_labels(root, inputs_of(batch, input_device(root)))
            count = label_count(root, inputs["labels"])
            loss = root(**inputs).loss * count
            found = torch.autograd.grad(loss, weights)
            found = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in found]
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
            tokens += count
            done += 1
    require_batches(done)
    return {
        id(linear): (total.t() if is_conv1d(linear) else total) / tokens
        for linear, total in zip(linears, sums, strict=True)
    }
