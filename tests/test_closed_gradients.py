import pytest
import torch
import torch.nn.functional as F
from linears import N, check, make_inputs
from ops import DTYPES, ids, make_gate, run, to

from gatepack.kernels import gated_linear_fn, gated_linear_ref, open_set_fn
from gatepack.kernels.closed_gradients import (
    complement,
    sampled_count,
    sampled_tokens,
    sampled_tokens_ref,
)
from gatepack.kernels.open_sets import Axis

T = 19


def uncut(x, w, bias, z_in, z_out, lora_a, lora_b, form, scale=0.7):
    """gated_linear_fn as autograd sees it when gates are plain factors."""
    low_rank = scale * F.linear(F.linear(x if form == "masked" else x * z_in, lora_a), lora_b)
    h = F.linear(x * z_in, w)
    if form == "masked":
        return h * z_out + low_rank + bias
    return (h + low_rank + bias) * z_out


@pytest.mark.parametrize("form", ["gated", "masked"])
def test_the_reference_does_not_cut_when_exact(form, device):
    inputs = {k: t.double() for k, t in to(make_inputs(torch.float32, t=T), device).items()}
    dy = torch.randn(T, N, dtype=torch.float64, device=device)
    ours = run(gated_linear_ref, inputs, dy, form=form, scale=0.7, closed_grad="exact")
    for name, expected in run(uncut, inputs, dy, form=form).items():
        torch.testing.assert_close(ours[name], expected)


@pytest.mark.parametrize("closed_grad", ["exact", "sampled"])
@pytest.mark.parametrize("form", ["gated", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_against_fp64(dtype, form, closed_grad, device):
    settings = {"closed_grad": closed_grad, "closed_fraction": 0.3, "seed": 4}
    results = check(make_inputs(dtype, t=T), device, form=form, **settings)
    for gate in ("dz_in", "dz_out"):
        assert (results[gate] != 0).all()


@pytest.mark.parametrize("gates", ["closed", "one", "open"])
def test_kinds_of_gates(gates, device):
    inputs = make_inputs(torch.float32, t=T, z_in=gates, z_out=gates)
    check(inputs, device, closed_grad="exact", dropout=0.3, seed=1)


@pytest.mark.parametrize("form", ["gated", "masked"])
@pytest.mark.parametrize("groups", [(16, 20), (8, 4)], ids=str)
def test_groups_and_dropout(groups, form, device):
    sizes = {"group_in": groups[0], "group_out": groups[1]}
    settings = {"form": form, "closed_grad": "sampled", "dropout": 0.3, "seed": 4}
    check(make_inputs(torch.float32, t=T, **sizes), device, **sizes, **settings)


@pytest.mark.parametrize("present", [("z_in",), ("z_out",), ("z_out", "bias")], ids=str)
def test_without_some_arguments(present, device):
    inputs = make_inputs(torch.float32, t=T)
    inputs = {k: t for k, t in inputs.items() if k in ("x", "w", *present)}
    check(inputs, device, closed_grad="exact")


@pytest.mark.parametrize("t", [0, 1])
def test_few_tokens(t, device):
    check(make_inputs(torch.float32, t=t), device, closed_grad="sampled", seed=1)


def test_a_fraction_of_one_is_exact(device):
    inputs, dy = to(make_inputs(torch.float32, t=T), device), torch.randn(T, N, device=device)
    exact = run(gated_linear_fn, inputs, dy, closed_grad="exact")
    sampled = run(gated_linear_fn, inputs, dy, closed_grad="sampled", closed_fraction=1.0, seed=1)
    for name in exact:
        assert torch.equal(exact[name], sampled[name]), name


def test_open_units_do_not_notice(device):
    inputs, dy = to(make_inputs(torch.float32, t=T), device), torch.randn(T, N, device=device)
    without = run(gated_linear_fn, inputs, dy)
    exact = run(gated_linear_fn, inputs, dy, closed_grad="exact")
    for name in without:
        is_open = inputs[name[1:]] != 0 if name in ("dz_in", "dz_out") else ...
        assert torch.equal(without[name][is_open], exact[name][is_open]), name


def test_the_sample_is_unbiased(device):
    """The mean over 32 seeds of every dz is within 5 standard errors of the exact sum.

    The standard error is that of the 32 estimates themselves.
    """
    inputs = make_inputs(torch.float32, t=T, n=8, k=8, z_in="mixed", z_out="mixed", rank=0)
    inputs, dy = to(inputs, device), torch.randn(T, 8, device=device)
    gates = [inputs[name].requires_grad_() for name in ("z_in", "z_out")]

    def dz(**settings):
        return torch.cat(torch.autograd.grad(gated_linear_fn(**inputs, **settings), gates, dy))

    exact, closed = dz(closed_grad="exact"), torch.cat(gates) == 0
    estimates = torch.stack(
        [dz(closed_grad="sampled", closed_fraction=0.25, seed=seed) for seed in range(32)]
    ).double()
    error = estimates.std(0) / len(estimates) ** 0.5
    assert closed.any() and (error[closed] > 0).all()
    assert ((estimates.mean(0) - exact).abs() <= 5 * error + 1e-6).all()


def test_every_token_is_as_likely(device):
    """Over 500 seeds, each token's frequency is within 5 standard errors of m / T."""
    count = sampled_count(T, 0.25)
    times = torch.zeros(T, device=device)
    for seed in range(500):
        drawn = sampled_tokens_ref(torch.tensor(seed, device=device), T, count)
        assert len(drawn.unique()) == count
        times[drawn] += 1
    p = count / T
    assert ((times / 500 - p).abs() < 5 * (p * (1 - p) / 500) ** 0.5).all()


@pytest.mark.parametrize("seed", [0, 2**40, -3])
def test_the_kernel_draws_the_tokens_of_the_reference(seed, device):
    seed = torch.tensor(seed, device=device)
    got, expected = sampled_tokens(seed, 3000, 700), sampled_tokens_ref(seed, 3000, 700)
    assert torch.equal(got, expected)


def test_complement(device):
    z = make_gate("mixed", 9).to(device)
    other = complement(Axis(9, z, open_set_fn(z), 1)).open_set
    closed = (z == 0).nonzero().squeeze(1)
    assert other[-1] == len(closed)
    assert other[: len(closed)].sort().values.tolist() == closed.tolist()
    assert other[:-1].sort().values.tolist() == list(range(9))


def test_deterministic(device):
    inputs, dy = to(make_inputs(torch.bfloat16, t=33), device), torch.randn(33, N, device=device)
    settings = {"closed_grad": "sampled", "seed": 3, "dropout": 0.2, "form": "masked"}
    first, second = (run(gated_linear_fn, inputs, dy, **settings) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
