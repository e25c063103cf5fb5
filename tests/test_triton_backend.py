"""Gated models on the Triton op, under the interpreter: equal to the masked dense model."""

import copy

import pytest
import torch
from tiny import dense_gradients, mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack import modules

pytest.importorskip("triton")

CONFIG = gp.GateConfig(noise=0.0, target=0.5, width_multiple=4)


@pytest.fixture(autouse=True)
def forced_triton(monkeypatch):
    monkeypatch.setenv("GATEPACK_BACKEND", "triton")
    if torch.cuda.is_available():
        pytest.skip("these sizes are for the interpreter; GPU tests are in test_gated_linear.py")


@pytest.fixture
def op_calls(monkeypatch):
    """Counts the calls of the Triton op."""
    calls = []
    real = modules._triton

    def counting(*args):
        calls.append(args[0])
        return real(*args)

    monkeypatch.setattr(modules, "_triton", counting)
    return calls


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("pattern", ["open", "closed", "single", "mixed", "ragged"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_equals_masked_dense_model(model_type, pattern, op_calls):
    model = tiny_model(model_type, torch.float32, num_hidden_layers=1)
    reference = copy.deepcopy(model).double()
    gates = gp.attach(model, CONFIG)
    set_gates(gates, pattern)
    ids = token_ids(1, 5)
    values = gates.split(gates.deterministic_values().double())
    expected = mask_dense(reference, values)(ids).logits
    got = model.train()(ids).logits
    linears = 7 if model_type == "llama" else 4
    assert len(op_calls) == linears * len(gates) // 2
    assert relative(got, expected) < 1e-5
    upstream = torch.randn_like(got)
    (gate_grad,) = torch.autograd.grad(expected, gates.logits, upstream.double(), retain_graph=True)
    got.backward(upstream)
    assert relative(gates.logits.grad, gate_grad) < 1e-4 or not gate_grad.any()
    expected.backward(upstream.double())
    expected_grads = dense_gradients(reference)
    for name, grad in dense_gradients(model).items():
        error = (grad - expected_grads[name]).abs().max()
        assert error <= 1e-4 * expected_grads[name].abs().max() + 1e-8, name


def test_lora_is_part_of_the_op(op_calls):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]
    )
    model = peft.get_peft_model(tiny_model("llama", torch.float32, num_hidden_layers=1), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    reference = copy.deepcopy(model).double()
    gates = gp.attach(model, CONFIG)
    gates.unfreeze()
    set_gates(gates, "mixed")
    ids = token_ids(1, 5)
    values = gates.split(gates.deterministic_values().detach().double())
    expected = mask_dense(reference.get_base_model(), values)(ids).logits
    got = model.train()(ids).logits
    assert len(op_calls) == 7
    assert relative(got, expected) < 1e-5
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream.double())
    expected_grads = dense_gradients(reference)
    assert any("lora_A" in name for name in expected_grads)
    for name, grad in dense_gradients(model).items():
        error = (grad - expected_grads[name]).abs().max()
        assert error <= 1e-4 * expected_grads[name].abs().max() + 1e-8, name
