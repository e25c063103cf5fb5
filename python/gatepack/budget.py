"""Stage 1, gates: what open units cost, which to keep, and the controller that gets there."""

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from gatepack.config import GateConfig
from gatepack.knapsack import Choice, solve

logger = logging.getLogger(__name__)

TOLERANCE = 0.005
# Sums of weights on the very edge of it stay on one side, however they round.
_EDGE = TOLERANCE * (1 + 1e-9)

Found = TypeVar("Found")


class Costs:
    """Parameters behind the gates of a model, or another cost that adds up over their units.

    specs: name -> GateSpec, whose unit_cost and shared_cost are counted. fixed: what the budget
    counts and no gate removes.
    """

    def __init__(self, specs: Mapping, fixed: int):
        self.specs = dict(specs)
        self.fixed = fixed
        self.total = fixed + sum(gate_cost(spec) for spec in self.specs.values())
        self._tensors = {}

    def kept_fraction(self, masks: Mapping[str, torch.Tensor]) -> float:
        """Kept fraction of the whole cost for open masks (name -> bool [size])."""
        kept = sum(self.price(spec, masks[name]) for name, spec in self.specs.items())
        return (self.fixed + kept) / self.total

    def price(self, spec, mask: torch.Tensor) -> float:
        """Cost of the open units of a gate, mask bool [size]."""
        blocks = mask.reshape(-1, spec.shared_size)
        return spec.unit_cost * int(blocks.sum()) + spec.shared_cost * int(blocks.any(1).sum())

    def unit_price(self, name: str) -> float:
        """Cost of one unit of a gate and its share of what several units share."""
        spec = self.specs[name]
        return spec.unit_cost + spec.shared_cost / spec.shared_size

    def cut(self, masks: Mapping[str, torch.Tensor]) -> "Costs":
        """The same budget, where units that masks (name -> bool [size]) leave out are removed."""
        other = copy.copy(self)
        other.specs = {name: spec.cut(masks[name]) for name, spec in self.specs.items()}
        other.refresh()
        return other

    def refresh(self) -> None:
        """To be called where specs have changed."""
        self._tensors = {}

    def without(self, names: Collection[str]) -> "Costs":
        """The same cost, where the gates named lose nothing."""
        other = copy.copy(self)
        other.fixed += sum(self.price(s, all_units(s)) for n, s in self.specs.items() if n in names)
        other.specs = {name: spec for name, spec in self.specs.items() if name not in names}
        other.refresh()
        return other

    def expected(self, probability: torch.Tensor) -> torch.Tensor:
        """Expected kept fraction, a differentiable scalar, without a host sync.

        probability fp32 [N]: how likely each unit is open; 0 and 1 give the kept fraction itself.
        """
        unit_cost, blocks = self._on(probability.device)
        kept = (unit_cost * probability).sum() + self.fixed
        for units, cost in blocks:
            kept = kept + (cost * (1.0 - (1.0 - probability[units]).prod(1))).sum()
        return kept / self.total

    def _on(self, device: torch.device):
        """Cost of each unit [N], and (units [blocks, size], cost [blocks]) per block size."""
        if device not in self._tensors:
            costs, blocks, start = [], {}, 0
            for spec in self.specs.values():
                costs += [float(spec.unit_cost)] * spec.size
                if spec.shared_cost:
                    units = torch.arange(start, start + spec.size).reshape(-1, spec.shared_size)
                    blocks.setdefault(spec.shared_size, []).append((units, spec.shared_cost))
                start += spec.size
            self._tensors[device] = (
                torch.tensor(costs, device=device),
                [
                    (
                        torch.cat([units for units, _ in same]).to(device),
                        torch.cat([torch.full((len(u),), float(c)) for u, c in same]).to(device),
                    )
                    for same in blocks.values()
                ],
            )
        return self._tensors[device]


def gate_cost(spec) -> int:
    """Cost of one gate vector with everything open."""
    return spec.unit_cost * spec.size + spec.shared_cost * (spec.size // spec.shared_size)


def all_units(spec) -> torch.Tensor:
    return torch.ones(spec.size, dtype=torch.bool, device="cpu")  # also where models are on meta


def meets(kept: float, target: float) -> bool:
    """Whether a kept fraction is within 0.5 % of the target."""
    return abs(kept - target) <= _EDGE


def moved_only(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """fn of nn.Module._apply without what it casts: tensors move and keep their bits."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


class BudgetController(nn.Module):
    """Augmented Lagrangian on the kept fraction c: penalty = (multiplier + rho * (c - t)) * E[c].

    t moves from 1 to target along a cubic ramp, 1 - (1 - target) * (1 - (1 - s / ramp_steps)^3),
    after warmup_steps; ramp_steps=0 asks for the target at once. c is measured on exact zeros
    (FineGates' soft penalty can be met with no zero at all), E[c] is its differentiable
    expectation. Each step adds RATE * rho * (c - t) to the multiplier, so the pressure grows for as
    long as the budget is missed. c answers late, when a logit has walked to 0: once the budget is
    met, a multiplier that still pushes past it is dropped.
    """

    # Simulated with Adam on 400 gates, losses 0.1 and 1 per kept fraction, 300 steps at 0.05 and
    # 1500 at 0.01, with and without a ramp: within 0.06 of the target; rho 20 with a rate of 1
    # swings between all open and all closed.
    RATE = 0.01

    def __init__(self, target: float, rho: float = 5.0, warmup_steps: int = 0, ramp_steps: int = 0):
        super().__init__()
        self.target = target
        self.rho = rho
        self.warmup_steps = warmup_steps
        self.ramp_steps = ramp_steps
        self.register_buffer("state", torch.zeros(2, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # The state moves with the model, so that no step waits for the host, but is never cast.
        return super()._apply(moved_only(fn), recurse)

    @property
    def multiplier(self) -> float:
        return float(self.state[0])

    @property
    def steps(self) -> int:
        return int(self.state[1])

    def current_target(self) -> float:
        """The kept fraction asked for at this step."""
        return float(self._target())

    def _target(self) -> torch.Tensor:
        progress = self.state[1].double() - self.warmup_steps
        left = (1.0 - progress / max(self.ramp_steps, 1)).clamp(0.0, 1.0)
        ramp = 1.0 - (1.0 - self.target) * (1.0 - left**3)
        ramp = torch.where(progress >= self.ramp_steps, self.target, ramp)
        return torch.where(progress < 0, 1.0, ramp)

    def penalty(self, expected: torch.Tensor, kept_fraction: torch.Tensor | float) -> torch.Tensor:
        """Scalar term for the loss; expected is E[c], a differentiable scalar."""
        pressure = self.state[0] + self.rho * (kept_fraction - self._target())
        return pressure.to(expected.dtype) * expected

    @torch.no_grad()
    def step(self, kept_fraction: torch.Tensor | float) -> None:
        """Multiplier update after an optimizer step that left kept_fraction open."""
        violation = kept_fraction - self._target()
        multiplier = torch.where(self.state[0] * violation < 0, 0.0, self.state[0])
        self.state[0] = multiplier + self.RATE * self.rho * violation
        self.state[1] += 1


@dataclass(frozen=True)
class Plan:
    """masks: name -> bool [size], the units to keep. width_multiple: the one in use."""

    masks: dict[str, torch.Tensor]
    kept_fraction: float
    width_multiple: int


def in_multiples(
    find: Callable[[int], tuple[Found, float]], target: float, width_multiple: int
) -> tuple[Found, float, int]:
    """What find, which gives (result, kept fraction), finds for a width multiple, and the multiple.

    The multiple is the greatest of width_multiple, its half, quarter, ..., 1 with which the kept
    fraction is within 0.5 % of the target, or the one that comes nearest to it.
    """
    nearest, multiple = None, width_multiple
    while multiple >= 1:
        result, kept = find(multiple)
        if meets(kept, target):
            if multiple != width_multiple:
                logger.warning(
                    "width_multiple %d cannot meet the target %.4f within %.1f %%; using %d",
                    width_multiple, target, 100 * TOLERANCE, multiple,
                )  # fmt: skip
            return result, kept, multiple
        if nearest is None or abs(kept - target) < abs(nearest[1] - target):
            nearest = result, kept, multiple
        multiple //= 2
    return nearest


def plan_in_multiples(
    find: Callable[[int], tuple[dict[str, torch.Tensor], float]],
    target: float,
    width_multiple: int,
    target_of: str,
    advice: str,
) -> Plan:
    """The plan of in_multiples; ValueError, with advice, where it is not within 0.5 % of target."""
    found = Plan(*in_multiples(find, target, width_multiple))
    if not meets(found.kept_fraction, target):
        raise ValueError(
            f"target={target} cannot be met within {TOLERANCE:.1%} of the {target_of}: the nearest "
            f"reachable kept fraction is {found.kept_fraction:.4f}. {advice}"
        )
    return found


def plan(
    costs: Costs,
    scores: Mapping[str, torch.Tensor],
    config: GateConfig,
    target: float | None = None,
    width_multiple: int | None = None,
    within: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """The most valuable units that cost target of the budget, in shapes that engines load.

    scores: name -> fp [size], on any device, additive over the units of all gates. target: kept
    fraction, config.target by default. within: name -> bool [size] on the CPU, of which no other
    unit is kept. Solves the multiple-choice knapsack (one shape per gate, or one per group of equal
    gates with equal_layers) by bisection on the price of a parameter, then spends what is left
    greedily. width_multiple is halved until the result is within 0.5 % of the target;
    raises ValueError if even 1 is too coarse. Whether a target can be met does not depend on the
    scores, unless there is `within`.
    """
    for name, spec in costs.specs.items():
        if name not in scores:
            raise ValueError(f"scores must have an entry for each gate; {name!r} has none")
        if scores[name].shape != (spec.size,) or not bool(scores[name].isfinite().all()):
            raise ValueError(
                f"scores[{name!r}] must be finite [{spec.size}], got {list(scores[name].shape)}"
                f"{'' if scores[name].isfinite().all() else ' with infinite or NaN values'}"
            )
    scores = {name: scores[name].float().cpu() for name in costs.specs}
    if within is not None:
        scores = {name: _last(score, ~within[name]) for name, score in scores.items()}
    target = config.target if target is None else target
    wanted = config.width_multiple if width_multiple is None else width_multiple

    def gap(found: tuple[dict[str, torch.Tensor], float]) -> float:
        return abs(found[1] - target)

    def find(multiple: int) -> tuple[dict[str, torch.Tensor], float]:
        choices = _choices(costs, scores, config, multiple)
        if within is not None:
            choices = [_limited(choice, within) for choice in choices]
        if not all(choice.options for choice in choices):
            return {}, math.inf

        found = _between(costs, choices, target - _EDGE, target)
        if not meets(found[1], target):  # more than the target only where nothing is right below it
            found = min(found, _between(costs, choices, target - _EDGE, target + _EDGE), key=gap)
        while multiple == 1 and not meets(found[1], target):  # what is nearest, for the error
            reach = gap(found) * (1 - 1e-6)
            nearer = _between(costs, choices, target - reach, target + reach)
            if gap(nearer) >= gap(found):
                break
            found = nearer
        return found

    ways = ["Choose that", "gate more units"]
    ways += ["set equal_layers=False"] if config.equal_layers else []
    ways += ["set tp_divisor=1"] if config.tp_divisor > 1 else []
    advice = " or ".join([", ".join(ways[:-1]), ways[-1]])
    return plan_in_multiples(find, target, wanted, config.target_of, advice)


def _between(
    costs: Costs, choices: list[Choice], low: float, high: float
) -> tuple[dict[str, torch.Tensor], float]:
    """(masks, kept fraction) of the most valuable units that keep low to high of the cost, if any
    do."""
    picks = solve(choices, high * costs.total - costs.fixed, (high - low) * costs.total)
    masks = {
        name: _mask(costs.specs[name].size, units)
        for choice, pick in zip(choices, picks, strict=True)
        for name, units in choice.options[pick].items()
    }
    return masks, costs.kept_fraction(masks)


def _last(scores: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Scores by which those units come behind all others, of their block and of their gate."""
    return scores.masked_fill(units, -1.0 - 2.0 * float(scores.abs().sum()))


def _limited(choice: Choice, within: Mapping[str, torch.Tensor]) -> Choice:
    """The options that keep no unit outside of within."""
    fits = [
        all(bool(within[name][units].all()) for name, units in option.items())
        for option in choice.options
    ]
    left = [option for option, fit in zip(choice.options, fits, strict=True) if fit]
    return Choice(choice.costs[fits], choice.values[fits], left)


def _choices(costs: Costs, scores, config: GateConfig, multiple: int) -> list[Choice]:
    # Gates that attach saw alike stay alike, whatever has been removed of them since.
    groups: dict[tuple, list[str]] = {}
    for name, spec in costs.specs.items():
        key = (spec.kind, spec.lanes, *spec.whole)
        groups.setdefault(key if config.equal_layers else (*key, name), []).append(name)
    choices = []
    for (kind, *_), names in groups.items():
        specs = [costs.specs[name] for name in names]
        shared = min(spec.shared_size for spec in specs)
        left = min(spec.size // spec.shared_size for spec in specs), shared
        shapes = _head_shapes if kind == "heads" else _channel_shapes
        per_gate = [
            shapes(costs, spec, scores[name], config, multiple, left)
            for spec, name in zip(specs, names, strict=True)
        ]
        if not per_gate[0] and multiple == 1:
            raise ValueError(
                f"tp_divisor={config.tp_divisor} cannot be met by the units that are left of "
                f"{names[0]!r}{' and gates like it' if len(names) > 1 else ''}: set tp_divisor=1"
            )
        options = zip(*per_gate, strict=True)
        rows = [
            (
                sum(option.cost for option in same),
                sum(option.value for option in same),
                {name: option.units for name, option in zip(names, same, strict=True)},
            )
            for same in options
        ]
        rows.sort(key=lambda row: row[0])
        choices.append(
            Choice(
                np.array([row[0] for row in rows], dtype=np.float64),
                np.array([row[1] for row in rows], dtype=np.float64),
                [row[2] for row in rows],
            )
        )
    return choices


@dataclass(frozen=True)
class _Shape:
    """units: indices of those that it keeps, int64."""

    cost: float
    value: float
    units: torch.Tensor


def _mask(size: int, units: torch.Tensor) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, units, True)


def _channel_shapes(
    costs: Costs, spec, scores: torch.Tensor, config: GateConfig, multiple: int, left: tuple
) -> list[_Shape]:
    """A gate's shapes that all gates of its group have, of which (units, 1) are left."""
    step, most = math.lcm(multiple, config.tp_divisor), left[0]
    order = torch.argsort(scores, descending=True, stable=True)
    prefix = torch.cumsum(scores[order].double(), 0)
    widths = list(range(step, most + 1, step))
    if most == spec.whole[0] and most % step:
        widths.append(most)
    shapes, mask = [], torch.zeros(spec.size, dtype=torch.bool)
    for width in widths:
        units = order[:width]
        mask[units] = True
        shapes.append(_Shape(costs.price(spec, mask), float(prefix[width - 1]), units))
    return shapes


def _head_shapes(
    costs: Costs, spec, scores: torch.Tensor, config: GateConfig, multiple: int, left: tuple
) -> list[_Shape]:
    """A gate's shapes that all gates of its group have, of which (blocks, units of a block) are
    left."""
    blocks, whole_size, whole_shared = spec.size // spec.shared_size, *spec.whole
    grid = scores.double().reshape(blocks, spec.shared_size)
    order = torch.argsort(grid, dim=1, descending=True, stable=True)
    prefix = torch.cumsum(torch.gather(grid, 1, order), 1)
    shapes = []
    for per_block in range(1, left[1] + 1):
        worth = prefix[:, per_block - 1]
        best = torch.argsort(worth, descending=True, stable=True)
        for kept in range(1, left[0] + 1):
            if kept % config.tp_divisor and kept != whole_size // whole_shared:
                continue
            mask = torch.zeros_like(grid, dtype=torch.bool)
            for block in best[:kept].tolist():
                mask[block, order[block, :per_block]] = True
            mask = mask.reshape(-1)
            units = mask.nonzero().squeeze(1)
            shapes.append(_Shape(costs.price(spec, mask), float(worth[best[:kept]].sum()), units))
    # Latency counts heads as they are packed, equally many per block.
    if not config.q_per_kv_uniform and left[1] > 1 and config.target_of != "latency":
        shapes += _ragged_head_shapes(costs, spec, grid, config.tp_divisor, left)
    return shapes


def _ragged_head_shapes(
    costs: Costs, spec, grid: torch.Tensor, divisor: int, left: tuple
) -> list[_Shape]:
    """Every count of key/value and query heads: the best of each kept block, then of the rest."""
    whole_size, whole_shared = spec.whole
    ranked = torch.argsort(grid.max(1).values, descending=True, stable=True)
    shapes = []
    for kept in range(1, left[0] + 1):
        if kept % divisor and kept != whole_size // whole_shared:
            continue
        worth = torch.full_like(grid, -math.inf)
        worth[ranked[:kept]] = grid[ranked[:kept]]
        first = worth.argmax(1)[ranked[:kept]]
        worth[ranked[:kept], first] = math.inf
        order = torch.argsort(worth.reshape(-1), descending=True, stable=True)
        value = torch.cumsum(grid.reshape(-1)[order], 0)
        for count in range(kept, kept * left[1] + 1):
            if count % divisor and count != whole_size:
                continue
            units = order[:count]
            cost = costs.price(spec, _mask(spec.size, units))
            shapes.append(_Shape(cost, float(value[count - 1]), units))
    return shapes
