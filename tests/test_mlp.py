"""GatedMLP: a stand-in for the MLP it replaces, and one op where its linears allow it."""

import pytest
import torch
from tiny import set_gates, tiny_model, token_ids
from torch import nn

import gatepack as gp
from gatepack import mlp as mlps
from gatepack.mlp import ungate_mlp

CONFIG = gp.GateConfig(noise=0.0, target=0.5, width_multiple=4)


def test_keeps_keys_attributes_and_function():
    mlp = tiny_model("llama").model.layers[0].mlp
    gated = gp.GatedMLP.from_mlp(mlp, ("gate_proj", "up_proj"), "down_proj")
    assert list(gated.state_dict()) == list(mlp.state_dict())
    for name in ("hidden_size", "intermediate_size", "act_fn", "config"):
        assert getattr(gated, name) is getattr(mlp, name)
    assert gated.gate_proj is mlp.gate_proj
    x = torch.randn(2, 3, 48, dtype=torch.float64)
    assert torch.equal(gated(x), mlp(x))
    back = ungate_mlp(gated)
    assert type(back) is type(mlp) and back.__dict__.keys() == mlp.__dict__.keys()
    assert torch.equal(back(x), mlp(x))


def test_replacing_a_child_of_the_twin_leaves_the_original():
    mlp = tiny_model("llama").model.layers[0].mlp
    gated = gp.GatedMLP.from_mlp(mlp, ("gate_proj", "up_proj"), "down_proj")
    original = mlp.up_proj
    gated.up_proj = nn.Linear(48, 40)
    assert mlp.up_proj is original


def gated_model(lora=False, dropout=0.0, bias=False, **config):
    model = tiny_model("llama", torch.float32, num_hidden_layers=1, mlp_bias=bias)
    if lora:
        peft = pytest.importorskip("peft")
        names = ["gate_proj", "up_proj", "down_proj"]
        torch.manual_seed(1)
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, lora_dropout=dropout, target_modules=names)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    gates = gp.attach(model, gp.GateConfig(**{**CONFIG.to_dict(), **config}))
    gates.unfreeze()
    model.train()
    return model, gates, next(m for m in model.modules() if isinstance(m, gp.GatedMLP))


def results(model):
    """Logits and every gradient of a training forward."""
    logits = model(token_ids(1, 5)).logits
    torch.manual_seed(2)
    logits.backward(torch.randn_like(logits))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert any(name.endswith("logits") for name in grads)
    return {"logits": logits.detach()} | grads


@pytest.fixture
def kernels(monkeypatch):
    """Kernels run on this device, in Triton's interpreter; the many-token path is "folded"."""
    pytest.importorskip("triton")
    monkeypatch.delenv("GATEPACK_BACKEND", raising=False)
    monkeypatch.setattr(mlps, "has_kernels", lambda device: True)


@pytest.mark.parametrize("pattern", ["open", "closed", "single", "mixed", "ragged"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_packed_op_equals_linear_by_linear(lora, pattern, kernels, monkeypatch):
    model, gates, mlp = gated_model(lora, bias=not lora)
    set_gates(gates, pattern)
    calls = []
    real = mlps._fused
    monkeypatch.setattr(mlps, "_fused", lambda *args: calls.append(1) or real(*args))
    got = results(model)
    assert calls
    monkeypatch.setenv("GATEPACK_BACKEND", "folded")
    assert mlp.why_not_fused() == "GATEPACK_BACKEND"
    expected = results(model)
    assert len(calls) == 1 and got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (got[name] - tensor).abs().max()
        assert error <= 1e-4 * tensor.abs().max() + 1e-7, name


def test_what_keeps_an_mlp_from_being_one_op(kernels, monkeypatch):
    model, _, mlp = gated_model()
    assert not mlp.why_not_fused()
    handle = mlp.down_proj.register_forward_hook(lambda *_: None)
    assert mlp.why_not_fused() == "hooks on its parts"
    handle.remove()
    assert not mlp.why_not_fused()
    handle = mlp.act_fn.register_forward_pre_hook(lambda *_: None)
    assert mlp.why_not_fused() == "hooks on its parts"
    handle.remove()
    act = mlp.act_fn
    mlp.act_fn = nn.Tanh()
    assert mlp.why_not_fused() == "activation Tanh"
    mlp.act_fn = act
    monkeypatch.setattr(mlps, "has_kernels", lambda device: False)
    assert mlp.why_not_fused() == "no kernels on cpu"


def test_explain_names_the_op(kernels, monkeypatch):
    model, _, mlp = gated_model()

    def said():
        rows = {row.module.rpartition(".")[2]: row.why for row in gp.explain(model).rows}
        return {name for name, why in rows.items() if "the MLP is one op" in why}

    assert said() == {"gate_proj", "up_proj", "down_proj"}
    mlp.down_proj.register_forward_hook(lambda *_: None)
    assert said() == set()


def test_adapters_that_the_op_cannot_take(kernels):
    assert gated_model(lora=True, dropout=0.2)[2].why_not_fused() == "LoRA dropout"
    model, _, mlp = gated_model(lora=True, dropout=0.2)
    model.eval()
    assert not mlp.why_not_fused()
    peft = pytest.importorskip("peft")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert mlp.why_not_fused() == "several adapters"


def test_an_mlp_without_a_channel_gate_runs_linear_by_linear(kernels):
    mlp = tiny_model("llama").model.layers[0].mlp
    gated = gp.GatedMLP.from_mlp(mlp, ("gate_proj", "up_proj"), "down_proj")
    assert gated.why_not_fused() == "no channel gate"


def test_hooks_see_what_they_asked_for(kernels):
    """A listener makes the MLP run linear by linear, with the same result."""
    model, gates, mlp = gated_model()
    set_gates(gates, "mixed")
    got = model(token_ids(1, 5)).logits
    seen = []
    mlp.down_proj.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    assert torch.allclose(model(token_ids(1, 5)).logits, got, atol=1e-5)
    assert seen
