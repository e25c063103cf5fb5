"""Running statistics: against explicit sums, in parts and at once, with and without padding."""

import pytest
import torch
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.methods.statistics import gate_input_sums, sums_of

CONFIG = gp.GateConfig(noise=0.0)


def expected(x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.double()
    return {
        "sum": x.sum(0),
        "abs_sum": x.abs().sum(0),
        "square_sum": x.square().sum(0),
        "deviation": (x - x.mean(0)).square().sum(0),
    }


def check(sums, x: torch.Tensor, rtol: float) -> None:
    assert int(sums.count) == len(x)
    for name, value in expected(x).items():
        found = getattr(sums, name)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.cpu(), value, rtol=rtol, atol=rtol)
    torch.testing.assert_close(sums.variance, sums.deviation / len(x))
    torch.testing.assert_close(sums.mean_abs, sums.abs_sum / len(x))


@pytest.mark.parametrize("backend", ["folded", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_in_parts_are_those_of_all_tokens(backend, dtype, monkeypatch, device):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("GATEPACK_BACKEND", backend)
    torch.manual_seed(0)
    # A mean far from 0 with a small spread: E[x^2] - E[x]^2 in fp32 would lose the variance.
    x = (torch.randn(3, 7, 5, dtype=torch.float64) * 0.05 + torch.arange(5.0) * 30).to(dtype)
    keep = torch.rand(3, 7) > 0.3
    x[~keep] = torch.nan
    total = None
    for rows, mask in zip(x, keep, strict=True):
        part = sums_of(rows[None].to(device), mask[None].to(device))
        total = part if total is None else total.merge(part)
    check(type(total)(*(part.cpu() for part in total)), x[keep], rtol=1e-4)


def test_shift_and_no_tokens():
    x = torch.randn(4, 3)
    bias = torch.randn(3)
    check(sums_of(x, shift=bias), x.double() - bias.double(), rtol=1e-5)
    nothing = sums_of(x, torch.zeros(4, dtype=torch.bool))
    assert int(nothing.count) == 0
    assert all(bool((part == 0).all()) for part in nothing)
    check(nothing.merge(sums_of(x)), x, rtol=1e-5)


def test_the_whole_batch_counts_and_padding_does_not():
    model = tiny_model("llama")
    gates = gp.attach(model, CONFIG)
    ids = token_ids(batch=3, length=8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    sums = gate_input_sums(gates, [padded])
    parts = gate_input_sums(gates, [ids[:1], ids[1:2, :5], ids[2:]])
    for name in gates:
        assert int(sums[name].count) == 8 + 5 + 8
        for field in ("sum", "abs_sum", "square_sum", "deviation"):
            a, b = getattr(sums[name], field), getattr(parts[name], field)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_leaves_the_model_as_it_was():
    model = tiny_model("gpt2").train()
    gates = gp.attach(model, CONFIG)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    gate_input_sums(gates, [token_ids()])
    assert model.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_errors_say_what_is_missing():
    gates = gp.attach(tiny_model("llama"), CONFIG)
    with pytest.raises(ValueError, match="at least one batch of token ids, got none"):
        gate_input_sums(gates, [])
    ids = token_ids()
    with pytest.raises(ValueError, match="no token that attention_mask keeps"):
        gate_input_sums(gates, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\]"):
        mask = torch.ones(2, 1, 9, 9)
        gate_input_sums(gates, [{"input_ids": ids, "attention_mask": mask}])
