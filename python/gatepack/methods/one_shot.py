"""Stage 4, methods: what one-shot methods share: score, close to the target, pack, then LoRA."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from gatepack.budget import plan
from gatepack.config import GateConfig
from gatepack.gates import GateSet
from gatepack.hf import attach, detach, gates_of
from gatepack.importance import check_units
from gatepack.layers import GATES_NAME, hf_model
from gatepack.methods.statistics import Batch
from gatepack.modules import base_linear
from gatepack.packing import PackReport, pack
from gatepack.training import FineTuning, TrainConfig, add_lora, closing_batches

UNEVEN = GateConfig(noise=0.0, equal_layers=False)


@dataclass(frozen=True)
class MethodRun:
    """model: pruned and fine-tuned, adapters merged. report: what was removed. losses: by step."""

    model: nn.Module
    report: PackReport
    losses: list[float]


@dataclass(frozen=True)
class OneShot:
    """A one-shot method: its metric decides, everything else is the same for all of them.

    gates: used where the model has none yet: target, shapes (width_multiple, equal_layers, ...)
    and targets. A method defines what it measures and its metric.
    """

    gates: GateConfig = UNEVEN

    def metric(self, model: nn.Module, batches: Iterable[Batch] = ()) -> dict[str, torch.Tensor]:
        """Gate name -> the published metric of each unit, fp32 [units]; the model needs gates."""
        gates = open_gates(model)
        values = self._metric(gates, self._measure(gates, batches))
        return {name: value.float() for name, value in _finite(values).items()}

    def score(self, model: nn.Module, batches: Iterable[Batch] = ()) -> dict[str, torch.Tensor]:
        """Gate name -> what each unit is worth, fp32 [units], as GateSet.snap takes it."""
        gates = open_gates(model)
        return self._score(gates, self._measure(gates, batches))

    def prune(self, model: nn.Module, batches: Iterable[Batch] = ()) -> PackReport:
        """Scores the model, closes it down to the target of its gates, compensates and packs.

        In place. batches: token ids [B, S] or dicts of what the model takes. A model without gates
        is given those of `gates`. Raises ValueError for closed or fractional gates, unmerged
        adapters, no batches, scores that are not finite, or a target out of reach; then the model
        is as it was.
        """
        with _gated(model, self.gates) as gates:
            self._check(gates)
            measured = self._measure(gates, batches)
            masks = self._masks(gates, measured)
        self._close(gates, masks, measured)
        return pack(model)

    def prepare(self, model: nn.Module, batches: Iterable[Batch] = ()) -> PackReport:
        """prune, under the name by which GateCallback calls a method."""
        return self.prune(model, batches)

    def start(self, model: nn.Module, steps: int, batches: Iterable[Batch] = ()) -> None:
        """Nothing is left to step once the model is pruned."""

    def run(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        train: TrainConfig | None = None,
        folder: str | os.PathLike | None = None,
        on_step: Callable[[FineTuning], None] | None = None,
    ) -> MethodRun:
        """Prunes a causal language model, then trains LoRA on it and merges it.

        windows: training token ids [n, length]; train.calibration_batches batches of them serve for
        scoring, the same ones as in gatepack.training.close_to_budget. folder and on_step are those
        of FineTuning.
        """
        train = TrainConfig() if train is None else train
        report = self.prune(model, calibration_batches(windows, train))
        losses, model = fine_tune(model, windows, train, folder, on_step)
        return MethodRun(model, report, losses)

    def _check(self, gates: GateSet) -> None:
        """Refuses, before anything is run, what this method cannot prune."""

    def _measure(self, gates: GateSet, batches: Iterable[Batch]):
        """What the metric needs from one pass over the batches."""

    def _metric(self, gates: GateSet, measured) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _score(self, gates: GateSet, measured) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _masks(self, gates: GateSet, measured) -> Mapping[str, torch.Tensor]:
        return plan_masks(gates, self._score(gates, measured), getattr(self, "per_layer", False))

    def _close(self, gates: GateSet, masks: Mapping[str, torch.Tensor], measured) -> None:
        gates.set_open(masks)


def plan_masks(
    gates: GateSet,
    scores: Mapping[str, torch.Tensor],
    per_layer: bool = False,
    whole: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Gate name -> bool [units] that stay, by the knapsack of GateSet.plan for its target.

    per_layer: the same shape for equal gates whatever the gates' config says. whole: names of
    gates that lose nothing.
    """
    gates.check_device()
    config = replace(gates.config, equal_layers=True) if per_layer else gates.config
    chosen = plan(gates.costs.without(whole), scores, config)
    masks = {name: torch.ones(gates[name].size, dtype=torch.bool) for name in whole}
    return {**masks, **chosen.masks}


def calibration_batches(windows: torch.Tensor, train: TrainConfig) -> list[torch.Tensor]:
    """The batches of windows [n, length] that gatepack.training.close_to_budget calibrates on."""
    return closing_batches(windows, train)[: train.calibration_batches]


def run_beside_lora(
    method,
    model: nn.Module,
    windows: torch.Tensor,
    train: TrainConfig | None = None,
    folder: str | os.PathLike | None = None,
    on_step: Callable[[FineTuning], None] | None = None,
) -> MethodRun:
    """Trains a causal language model's gates by method, with LoRA inside them; merges and packs.

    method: what GateCallback takes besides a one-shot method (FineGates, ATP, CloseAndRepair,
    GateRecipe); it gets the batches that one-shot methods calibrate on. windows, folder, on_step:
    as in OneShot.run.
    """
    train = TrainConfig() if train is None else train
    calibration = calibration_batches(windows, train)
    wrapped = add_lora(model, train)
    method.prepare(wrapped, calibration)
    beside = method.start(wrapped, train.steps, calibration)
    losses, merged = fine_tune(wrapped, windows, train, folder, on_step, beside=beside)
    return MethodRun(merged, pack(merged), losses)


def fine_tune(
    model: nn.Module,
    windows: torch.Tensor,
    train: TrainConfig,
    folder=None,
    on_step=None,
    *,
    beside=None,
    objective=None,
) -> tuple[list[float], nn.Module]:
    """(losses, model with LoRA trained and merged); a model that is no PEFT model gets LoRA."""
    wrapped = model if hasattr(model, "merge_and_unload") else add_lora(model, train)
    folder = None if folder is None else Path(folder)
    tuning = FineTuning(wrapped, windows, train, folder, beside=beside, objective=objective)
    losses = tuning.run(on_step)
    if beside is not None:
        beside.finish()
    return losses, wrapped.merge_and_unload().eval()


def open_gates(model: nn.Module) -> GateSet:
    """The gates of a model that is scored as it stands: all exactly 1, and no adapters."""
    gates = gates_of(model)
    check_units(gates, "a one-shot method")
    if not bool((gates.deterministic_values() == 1).all()):
        raise ValueError("one-shot methods need every gate open and exactly 1; reopen them first")
    for parent, name, _ in gates.attachment.sites:
        if base_linear(parent._modules[name]) is not parent._modules[name]:
            raise ValueError(
                f"{name} carries an adapter, which one-shot methods do not score: merge it first "
                "(model.merge_and_unload())"
            )
    return gates


@contextmanager
def _gated(model: nn.Module, config: GateConfig) -> Iterator[GateSet]:
    """The open gates of a model; those put on here are taken off again if the body fails."""
    given = hasattr(hf_model(model), GATES_NAME)
    if not given:
        attach(model, config)
    try:
        yield open_gates(model)
    except BaseException:
        if not given:
            detach(model)
        raise


def worth(gates: GateSet, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """cost_i * (value_i - the least value), fp32 [units]: the knapsack's best choice at any price
    of a parameter is then one threshold on value over all gates. A head costs its share of k and v.
    """
    least = min(float(value.min()) for value in _finite(values).values())
    result = {}
    for name, value in values.items():
        cost = gates.costs.unit_price(name)
        result[name] = (cost * (value.double() - least)).float()
    return result


def ranks(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """1 - (units of the gate that are better) / (its units): one threshold on it keeps the same
    fraction of every gate."""
    result = {}
    for name, value in _finite(values).items():
        order = torch.argsort(value, descending=True, stable=True)
        result[name] = torch.empty_like(value, dtype=torch.float64)
        better = torch.arange(len(value), dtype=torch.float64, device=value.device)
        result[name][order] = 1 - better / len(value)
    return result


def comparable(metric: Mapping[str, torch.Tensor], per_layer: bool) -> Mapping[str, torch.Tensor]:
    """Values that one threshold may be set on: ranks by gate, or metric / its mean by gate."""
    if per_layer:
        return ranks(metric)
    return {name: m / m.mean().clamp(min=torch.finfo(m.dtype).tiny) for name, m in metric.items()}


def _finite(values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"the scores of {name!r} hold infinite or NaN values: its weights, its "
                "activations or its gradients do"
            )
    return values
