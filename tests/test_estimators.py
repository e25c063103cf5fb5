"""Estimators against a literal transcription of their formulas in fp64."""

import math

import pytest
import torch

from gatepack.estimators import ESTIMATORS, STG, HardConcrete

LOGITS = torch.cat(
    [torch.linspace(-4.0, 4.0, 81, dtype=torch.float64), torch.tensor([-50.0, 50.0])]
)
NAMES = sorted(ESTIMATORS)


def clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def normal_cdf(value: float) -> float:
    return 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))


def logistic(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def literal_value(name: str, logit: float, noise: float | None) -> float:
    if name == "stg":
        return clamp(math.tanh(logit) + 0.5 + (noise or 0.0))
    s = logistic(logit if noise is None else (noise + logit) / (2.0 / 3.0))
    return clamp(s * (1.1 - -0.1) + -0.1)


def literal_open_probability(name: str, logit: float) -> float:
    if name == "stg":
        return normal_cdf((math.tanh(logit) + 0.5) / 0.5)
    return logistic(logit - (2.0 / 3.0) * math.log(0.1 / 1.1))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_formula(name, noisy):
    noise = torch.randn(
        LOGITS.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    got = ESTIMATORS[name](sigma=0.1).values(LOGITS, noise if noisy else None)
    expected = torch.tensor(
        [
            literal_value(name, logit, eps if noisy else None)
            for logit, eps in zip(LOGITS.tolist(), noise.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    assert (got - expected).abs().max() <= 1e-14
    assert torch.equal(got == 0, expected == 0) and torch.equal(got == 1, expected == 1)
    assert (got == 0).any() and (got == 1).any() and ((got > 0) & (got < 1)).any()


@pytest.mark.parametrize("name", NAMES)
def test_open_probability_is_the_formula(name):
    got = ESTIMATORS[name](sigma=0.1).open_probability(LOGITS)
    expected = torch.tensor(
        [literal_open_probability(name, logit) for logit in LOGITS.tolist()], dtype=torch.float64
    )
    assert (got - expected).abs().max() <= 1e-14


def test_hard_concrete_opens_as_often_as_its_probability_says():
    estimator = HardConcrete(sigma=1.0)
    logits = torch.tensor([-3.0, -1.0, 0.0, 1.0]).repeat_interleave(40_000)
    noise = estimator.noise_like(logits, torch.Generator().manual_seed(3))
    frequency = (estimator.values(logits, noise) > 0).float().reshape(4, -1).mean(1)
    expected = estimator.open_probability(torch.tensor([-3.0, -1.0, 0.0, 1.0]))
    deviation = (expected * (1 - expected) / 40_000).sqrt()
    assert ((frequency - expected).abs() <= 4 * deviation).all()


@pytest.mark.parametrize("name", NAMES)
def test_clamped_gates_have_zero_gradient_and_others_do_not(name):
    logits = LOGITS[:-2].float().requires_grad_()
    z = ESTIMATORS[name](sigma=0.1).values(logits)
    upstream = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    (grad,) = torch.autograd.grad(z, logits, upstream)
    inside = (z > 0) & (z < 1)
    assert inside.any() and (~inside).any()
    assert (grad[~inside] == 0).all()
    assert (grad[inside] > 0).all()


def test_penalty_gradient_survives_where_the_gate_is_clamped():
    logits = torch.tensor([-2.0, 2.0], requires_grad=True)
    estimator = STG(sigma=0.1)
    assert estimator.values(logits).tolist() == [0.0, 1.0]
    (grad,) = torch.autograd.grad(
        estimator.open_probability(logits), logits, torch.tensor([1.0, 2.0])
    )
    assert (grad > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_inverts_values(name):
    estimator = ESTIMATORS[name](sigma=0.1)
    z = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    assert (estimator.values(estimator.logits_of(z)) - z).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("name", "low", "high"), [("stg", -0.4, 1.4), ("hard_concrete", -0.09, 1.09)]
)
def test_logits_of_reaches_past_the_clamp(name, low, high):
    estimator = ESTIMATORS[name](sigma=0.1)
    logits = estimator.logits_of(torch.tensor([low, high, -9.0, 9.0]))
    assert logits.isfinite().all()
    assert estimator.values(logits).tolist() == [0.0, 1.0, 0.0, 1.0]
    assert logits[2] < logits[0] and logits[1] < logits[3]


@pytest.mark.parametrize("name", NAMES)
def test_default_logit_is_open(name):
    estimator = ESTIMATORS[name](sigma=0.1)
    assert estimator.values(torch.tensor(estimator.default_logit)) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_noise_follows_the_generator(name):
    estimator = ESTIMATORS[name](sigma=0.1)
    first, again, other = (
        estimator.noise_like(torch.zeros(64), torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert first.dtype == torch.float32 and first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_stg_noise_has_its_standard_deviation():
    noise = STG(sigma=0.3).noise_like(torch.zeros(100_000), torch.Generator().manual_seed(0))
    assert abs(float(noise.std()) - 0.3) <= 4 * 0.3 / math.sqrt(2 * 100_000)
    assert abs(float(noise.mean())) <= 4 * 0.3 / math.sqrt(100_000)
