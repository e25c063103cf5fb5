"""Plans reach every target that some choice of shapes reaches, whatever the scores are."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gatepack as gp
from gatepack import knapsack
from gatepack.budget import TOLERANCE
from gatepack.gate_specs import GateSpec
from gatepack.gates import GateSet
from gatepack.knapsack import Choice, solve


@st.composite
def gate_sets(draw):
    """(GateSet, reachable kept fractions by width multiple) of a few gates with coarse units."""
    layers, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    blocks, alike = draw(st.integers(1, 3)), draw(st.booleans())
    unit = draw(st.sampled_from([40, 96, 144]))
    specs = {}
    for i in range(layers):
        shared = draw(st.sampled_from([0, 64])) if ratio > 1 else 0
        specs[f"{i}:heads"] = GateSpec("heads", blocks * ratio, 4, unit, ratio, shared)
        width = 5 if alike else draw(st.integers(2, 6))
        specs[f"{i}:channels"] = GateSpec("channels", width, 1, draw(st.sampled_from([24, 30])))
    config = gp.GateConfig(
        target=draw(st.floats(0.2, 0.99)),
        width_multiple=draw(st.sampled_from([1, 2, 4])),
        equal_layers=draw(st.booleans()),
        q_per_kv_uniform=draw(st.booleans()),
        tp_divisor=draw(st.sampled_from([1, 2])),
    )
    return GateSet(config, specs, fixed_cost=draw(st.sampled_from([0, 50, 400])))


def shapes_of(spec, config, multiple):
    """Shape -> its cost, of a gate."""
    tp = config.tp_divisor
    if spec.kind == "channels":
        step = math.lcm(multiple, tp)
        widths = {*range(step, spec.size + 1, step), spec.size}
        return {width: width * spec.unit_cost for width in widths}
    blocks, found = spec.size // spec.shared_size, {}
    for kept in range(1, blocks + 1):
        if kept % tp and kept != blocks:
            continue
        for count in range(kept, kept * spec.shared_size + 1):
            uniform = count % kept == 0
            ragged = not config.q_per_kv_uniform and (count % tp == 0 or count == spec.size)
            if uniform or ragged:
                found[kept, count] = count * spec.unit_cost + kept * spec.shared_cost
    return found


def reachable(gates):
    """Every kept fraction of some choice of shapes, tried one by one."""
    config, total, found = gates.config, gates.costs.total, set()
    groups = {}
    for name, spec in gates.costs.specs.items():
        key = (spec.kind, spec.size, spec.shared_size) if config.equal_layers else name
        groups.setdefault(key, []).append(spec)
    multiple = config.width_multiple
    while multiple:
        costs = []
        for specs in groups.values():
            shapes = [shapes_of(spec, config, multiple) for spec in specs]
            costs.append({sum(s[shape] for s in shapes) for shape in shapes[0]})
        sums = {gates.costs.fixed}
        for options in costs:
            sums = {a + b for a, b in itertools.product(sums, options)}
        found |= {each / total for each in sums}
        multiple //= 2
    return found


def plans(gates, seed):
    """Whether the plan for random scores meets the target."""
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(gate.size, generator=generator) for n, gate in gates.items()}
    try:
        found = gates.plan(scores)
    except ValueError as error:
        assert "cannot be met within" in str(error)
        return False
    assert abs(found.kept_fraction - gates.config.target) <= TOLERANCE * (1 + 1e-9)
    return True


@settings(deadline=None)
@given(gate_sets())
def test_a_target_is_met_whatever_the_scores_if_it_can_be(gates):
    target, kept = gates.config.target, reachable(gates)
    gap = min(abs(each - target) for each in kept)
    possible = gap <= TOLERANCE * (1 + 1e-9)
    assert [plans(gates, seed) for seed in range(4)] == [possible] * 4
    if possible:
        assert abs(gates.check_target() - target) <= TOLERANCE * (1 + 1e-9)
    else:
        nearest = [f"{each:.4f}" for each in kept if abs(each - target) <= gap * (1 + 1e-5)]
        with pytest.raises(ValueError, match=f"nearest reachable .* is ({'|'.join(nearest)})"):
            gates.check_target()


def choices_of(costs, values):
    return [
        Choice(np.array(c, float), np.array(v, float), list(c))
        for c, v in zip(costs, values, strict=True)
    ]


def test_all_picks_change_at_once_where_two_do_not_reach():
    costs = [[0, 7], [0, 7], [0, 7], [0, 20]]
    choices = choices_of(costs, [[0, 1], [0, 1], [0, 1], [0, 100]])
    assert solve(choices, 21.5, 1.0) == [1, 1, 1, 0]


def test_a_choice_that_costs_nothing():
    choices = choices_of([[0, 0], [10, 20]], [[1, 3], [1, 2]])
    assert solve(choices, 20.0, 1.0) == [1, 1]


@pytest.mark.parametrize("seed", range(6))
def test_reaches_with_the_greatest_value_of_all(seed, monkeypatch):
    random = np.random.default_rng(seed)
    costs = [np.sort(random.integers(0, 400, 4)).astype(float) for _ in range(6)]
    choices = choices_of(costs, [random.random(4) for _ in range(6)])
    every = list(itertools.product(range(4), repeat=6))
    pairs = [list(zip(choices, picks, strict=True)) for picks in every]
    spent = np.array([sum(c.costs[p] for c, p in each) for each in pairs])
    worth = np.array([sum(c.values[p] for c, p in each) for each in pairs])
    inside = (spent <= 1000) & (spent >= 990)
    picks = knapsack._reach(choices, 1000.0, 10.0)
    assert worth[every.index(tuple(picks))] == pytest.approx(worth[inside].max())
    monkeypatch.setattr(knapsack, "SUMS", 400)  # of hundreds of sums, a hundred go on
    rough = every.index(tuple(knapsack._reach(choices, 1000.0, 10.0)))
    assert inside[rough] and worth[rough] >= 0.8 * worth[inside].max()
    assert knapsack._reach(choices, spent.min() - 1.0, 0.5) is None
