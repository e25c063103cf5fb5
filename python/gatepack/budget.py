"""Stage 1, gates: what open units cost, which to keep, and the controller that gets there."""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from gatepack.config import GateConfig

logger = logging.getLogger(__name__)

TOLERANCE = 0.005

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

    def refresh(self) -> None:
        """To be called where specs have changed."""
        self._tensors = {}

    def without(self, names: Collection[str]) -> "Costs":
        """The same cost, where the gates named lose nothing."""
        fixed = sum(gate_cost(self.specs[name]) for name in names)
        specs = {name: spec for name, spec in self.specs.items() if name not in names}
        return Costs(specs, self.fixed + fixed)

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
        if abs(kept - target) <= TOLERANCE:
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
    if abs(found.kept_fraction - target) > TOLERANCE:
        raise ValueError(
            f"target={target} cannot be met within {TOLERANCE:.1%} of the {target_of}: the nearest "
            f"reachable kept fraction is {found.kept_fraction:.4f}. {advice}"
        )
    return found


@dataclass
class _Choice:
    """Gates that share one shape decision, with the shapes they may take, dearest last."""

    gates: list[str]
    costs: np.ndarray
    values: np.ndarray
    masks: list = field(repr=False)


def plan(
    costs: Costs,
    scores: Mapping[str, torch.Tensor],
    config: GateConfig,
    target: float | None = None,
    width_multiple: int | None = None,
) -> Plan:
    """The most valuable units that cost target of the budget, in shapes that engines load.

    scores: name -> fp [size], additive over the units of all gates. target: kept fraction,
    config.target by default. Solves the multiple-choice knapsack (one shape per gate, or one per
    group of equal gates with equal_layers) by bisection on the price of a parameter, then spends
    what is left greedily. width_multiple is halved until the result is within 0.5 % of the target;
    raises ValueError if even 1 is too coarse.
    """
    for name, spec in costs.specs.items():
        if name not in scores:
            raise ValueError(f"scores must have an entry for each gate; {name!r} has none")
        if scores[name].shape != (spec.size,) or not bool(scores[name].isfinite().all()):
            raise ValueError(
                f"scores[{name!r}] must be finite [{spec.size}], got {list(scores[name].shape)}"
                f"{'' if scores[name].isfinite().all() else ' with infinite or NaN values'}"
            )
    target = config.target if target is None else target
    wanted = config.width_multiple if width_multiple is None else width_multiple

    def find(multiple: int) -> tuple[dict[str, torch.Tensor], float]:
        choices = _choices(costs, scores, config, multiple)
        picks = _solve(choices, target * costs.total - costs.fixed, TOLERANCE * costs.total)
        masks = {}
        for choice, pick in zip(choices, picks, strict=True):
            masks.update(choice.masks[pick])
        return masks, costs.kept_fraction(masks)

    advice = "Choose that, gate more units, or set equal_layers=False or tp_divisor=1"
    return plan_in_multiples(find, target, wanted, config.target_of, advice)


def _choices(costs: Costs, scores, config: GateConfig, multiple: int) -> list[_Choice]:
    groups: dict[tuple, list[str]] = {}
    for name, spec in costs.specs.items():
        key = (spec,) if config.equal_layers else (spec, name)
        groups.setdefault(key, []).append(name)
    choices = []
    for (spec, *_), names in groups.items():
        shapes = _head_shapes if spec.kind == "heads" else _channel_shapes
        per_gate = [shapes(costs, spec, scores[name], config, multiple) for name in names]
        options = zip(*per_gate, strict=True)
        rows = [
            (
                sum(option.cost for option in same),
                sum(option.value for option in same),
                {name: option.mask for name, option in zip(names, same, strict=True)},
            )
            for same in options
        ]
        rows.sort(key=lambda row: row[0])
        choices.append(
            _Choice(
                names,
                np.array([row[0] for row in rows], dtype=np.float64),
                np.array([row[1] for row in rows], dtype=np.float64),
                [row[2] for row in rows],
            )
        )
    return choices


@dataclass(frozen=True)
class _Shape:
    cost: float
    value: float
    mask: torch.Tensor


def _channel_shapes(
    costs: Costs, spec, scores: torch.Tensor, config: GateConfig, multiple: int
) -> list[_Shape]:
    step = math.lcm(multiple, config.tp_divisor)
    order = torch.argsort(scores, descending=True, stable=True)
    prefix = torch.cumsum(scores[order].double(), 0)
    widths = list(range(step, spec.size + 1, step))
    if not widths or widths[-1] != spec.size:
        widths.append(spec.size)
    shapes = []
    for width in widths:
        mask = torch.zeros(spec.size, dtype=torch.bool)
        mask[order[:width]] = True
        shapes.append(_Shape(costs.price(spec, mask), float(prefix[width - 1]), mask))
    return shapes


def _head_shapes(
    costs: Costs, spec, scores: torch.Tensor, config: GateConfig, multiple: int
) -> list[_Shape]:
    blocks = spec.size // spec.shared_size
    grid = scores.double().reshape(blocks, spec.shared_size)
    order = torch.argsort(grid, dim=1, descending=True, stable=True)
    prefix = torch.cumsum(torch.gather(grid, 1, order), 1)
    shapes = []
    for per_block in range(1, spec.shared_size + 1):
        worth = prefix[:, per_block - 1]
        best = torch.argsort(worth, descending=True, stable=True)
        for kept in range(1, blocks + 1):
            if kept % config.tp_divisor and kept != blocks:
                continue
            mask = torch.zeros_like(grid, dtype=torch.bool)
            for block in best[:kept].tolist():
                mask[block, order[block, :per_block]] = True
            mask = mask.reshape(-1)
            shapes.append(_Shape(costs.price(spec, mask), float(worth[best[:kept]].sum()), mask))
    if not config.q_per_kv_uniform and spec.shared_size > 1:
        shapes += _ragged_head_shapes(costs, spec, grid, config.tp_divisor)
    return shapes


def _ragged_head_shapes(costs: Costs, spec, grid: torch.Tensor, divisor: int) -> list[_Shape]:
    """Every count of key/value and query heads: the best of each kept block, then of the rest."""
    blocks = spec.size // spec.shared_size
    ranked = torch.argsort(grid.max(1).values, descending=True, stable=True)
    shapes = []
    for kept in range(1, blocks + 1):
        if kept % divisor and kept != blocks:
            continue
        worth = torch.full_like(grid, -math.inf)
        worth[ranked[:kept]] = grid[ranked[:kept]]
        first = worth.argmax(1)[ranked[:kept]]
        worth[ranked[:kept], first] = math.inf
        order = torch.argsort(worth.reshape(-1), descending=True, stable=True)
        value = torch.cumsum(grid.reshape(-1)[order], 0)
        for count in range(kept, kept * spec.shared_size + 1):
            if count % divisor and count != spec.size:
                continue
            mask = torch.zeros(spec.size, dtype=torch.bool)
            mask[order[:count]] = True
            shapes.append(_Shape(costs.price(spec, mask), float(value[count - 1]), mask))
    return shapes


def _solve(choices: list[_Choice], allowance: float, slack: float) -> list[int]:
    """Picks one option per choice: total cost <= allowance if any fits, value nearly greatest.

    If that leaves more than slack unspent, the best change of one or two picks that spends it, if
    there is one.
    """

    def at_price(price: float) -> list[int]:
        return [int(np.argmax(c.values - price * c.costs)) for c in choices]

    def cost_of(picks) -> float:
        return sum(c.costs[p] for c, p in zip(choices, picks, strict=True))

    scale = max(float(np.abs(c.values).max()) / float(c.costs.max()) for c in choices) or 1.0
    low, high = 0.0, 4 * scale
    while cost_of(at_price(high)) > allowance and high < scale * 1e12:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        if cost_of(at_price(middle)) > allowance:
            low = middle
        else:
            high = middle
    picks = at_price(high)
    spent = cost_of(picks)
    while True:
        best, gain = None, -math.inf
        for i, c in enumerate(choices):
            extra = c.costs - c.costs[picks[i]]
            worth = c.values - c.values[picks[i]]
            fits = (extra > 0) & (spent + extra <= allowance)
            if fits.any():
                rate = np.where(fits, worth / np.where(fits, extra, 1.0), -math.inf)
                top = int(np.argmax(rate))
                if rate[top] > gain:
                    best, gain = (i, top), rate[top]
        if best is None:
            break
        i, option = best
        spent += choices[i].costs[option] - choices[i].costs[picks[i]]
        picks[i] = option
    return (
        picks if allowance - spent <= slack else _repair(choices, picks, allowance - spent, slack)
    )


def _repair(choices: list[_Choice], picks: list[int], unspent: float, slack: float) -> list[int]:
    """The dearest change in value of at most two picks whose cost is within slack below unspent;
    picks if none is."""
    extra = [c.costs - c.costs[p] for c, p in zip(choices, picks, strict=True)]
    worth = [c.values - c.values[p] for c, p in zip(choices, picks, strict=True)]
    best, gain = picks, -math.inf
    for i in range(len(choices)):
        for j in range(i, len(choices)):
            if i == j:
                cost, value = extra[i][:, None], worth[i][:, None]
            else:
                cost, value = extra[i][:, None] + extra[j], worth[i][:, None] + worth[j]
            value = np.where((cost <= unspent) & (cost >= unspent - slack), value, -math.inf)
            a, b = np.unravel_index(int(np.argmax(value)), value.shape)
            if value[a, b] > gain:
                gain, best = value[a, b], list(picks)
                best[i] = int(a)
                if i != j:
                    best[j] = int(b)
    return best
