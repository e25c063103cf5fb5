"""Stage 1, gates: the multiple-choice knapsack, one option of each choice, that budgets are."""

import math
from dataclasses import dataclass, field

import numpy as np

# Sums that _reach holds at once, times the options of a choice.
SUMS = 2_000_000


@dataclass
class Choice:
    """The options of one decision: what each costs, what it is worth, and what it stands for."""

    costs: np.ndarray
    values: np.ndarray
    options: list = field(repr=False)


def solve(choices: list[Choice], allowance: float, slack: float) -> list[int]:
    """Picks one option per choice: total cost <= allowance if any fits, value nearly greatest.

    If that leaves more than slack unspent, the best change of one or two picks that spends it, or
    else of all of them, if there is one.
    """

    def at_price(price: float) -> list[int]:
        return [int(np.argmax(c.values - price * c.costs)) for c in choices]

    def cost_of(picks) -> float:
        return sum(c.costs[p] for c, p in zip(choices, picks, strict=True))

    scales = (float(np.abs(c.values).max()) / (float(c.costs.max()) or 1.0) for c in choices)
    scale = max(scales) or 1.0
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
    if allowance - spent <= slack:
        return picks
    return (
        _repair(choices, picks, allowance - spent, slack)
        or _reach(choices, allowance, slack)
        or picks
    )


def _repair(
    choices: list[Choice], picks: list[int], unspent: float, slack: float
) -> list[int] | None:
    """The dearest change in value of at most two picks whose cost is within slack below unspent;
    None if there is none."""
    extra = [c.costs - c.costs[p] for c, p in zip(choices, picks, strict=True)]
    worth = [c.values - c.values[p] for c, p in zip(choices, picks, strict=True)]
    best, gain = None, -math.inf
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


def _reach(choices: list[Choice], allowance: float, slack: float) -> list[int] | None:
    """The picks whose cost is within slack below allowance, of the greatest value; None if none is.

    By the sums of the first picks, choice by choice: of equal sums the most valuable goes on. Where
    there are too many, so does one of those that differ by less than their range / SUMS.
    """
    least = np.cumsum([0.0, *(c.costs.min() for c in reversed(choices))])[::-1]
    most = np.cumsum([0.0, *(c.costs.max() for c in reversed(choices))])[::-1]
    sums, values, trail = np.zeros(1), np.zeros(1), []
    for i, choice in enumerate(choices, 1):
        cost = np.add.outer(sums, choice.costs).ravel()
        value = np.add.outer(values, choice.values).ravel()
        going = (cost + least[i] <= allowance) & (cost + most[i] >= allowance - slack)
        index = np.flatnonzero(going)
        if not len(index):
            return None
        index = _most_valuable(index, cost, value, allowance * 1e-12)
        limit = SUMS // len(choices[min(i, len(choices) - 1)].costs)
        if len(index) > limit:
            index = _most_valuable(index, cost, value, float(np.ptp(cost[index])) / limit)
        sums, values = cost[index], value[index]
        trail.append(index)
    best, picks = int(np.argmax(values)), []
    for choice, index in zip(reversed(choices), reversed(trail), strict=True):
        best, pick = divmod(int(index[best]), len(choice.costs))
        picks.append(pick)
    return picks[::-1]


def _most_valuable(
    index: np.ndarray, cost: np.ndarray, value: np.ndarray, grain: float
) -> np.ndarray:
    """Of the entries at index, the most valuable one of each cost, costs rounded to grain."""
    rounded = np.round(cost[index] / grain)
    order = np.lexsort((-value[index], rounded))
    first = np.diff(rounded[order], prepend=-math.inf) > 0
    return index[order[first]]
