"""Fused linears of q, k and v, in either order of their rows: LoRA on every path, rows by name."""

import copy

import pytest
import torch
from tiny import fused_row, mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.layers import layers_of

FUSED = ["gpt2", "gpt_neox", "phi3"]
CONFIG = gp.GateConfig(noise=0.0, target=0.5, width_multiple=4)


@pytest.mark.parametrize("model_type", FUSED)
def test_rows_are_those_of_each_head(model_type):
    layer = layers_of(tiny_model(model_type))[0]
    dim, ratio = layer.head_dim, layer.queries // layer.kv_heads
    for block, rows in enumerate(layer.fused_rows):
        heads = range(0, layer.queries, ratio if block else 1)
        expected = [fused_row(layer, block, head, lane) for head in heads for lane in range(dim)]
        assert rows.tolist() == expected
    parts = [torch.full((len(rows),), float(block)) for block, rows in enumerate(layer.fused_rows)]
    together = layer.fused(*parts)
    assert all((together[rows] == block).all() for block, rows in enumerate(layer.fused_rows))


@pytest.mark.parametrize("path", ["folded", "dense", "triton"])
@pytest.mark.parametrize("pattern", ["mixed", "ragged"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "phi3"])
def test_lora_on_a_fused_linear(model_type, pattern, path, monkeypatch):
    peft = pytest.importorskip("peft")
    if path == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("GATEPACK_BACKEND", path)
    model = tiny_model(model_type, torch.float32)
    reference = copy.deepcopy(model)
    gates = gp.attach(model, CONFIG)
    set_gates(gates, pattern)
    mask_dense(reference, gates.split(gates.deterministic_values()))
    found = []
    for each in (model, reference):
        fused = layers_of(each)[0].family.qkv.rpartition(".")[2]
        lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[fused], init_lora_weights=False)
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(each, lora)
        gates.unfreeze()
        logits = wrapped(token_ids()).logits
        upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6))
        factors = [p for name, p in wrapped.named_parameters() if "lora_" in name]
        grads = torch.autograd.grad(logits, [*factors, gates.logits], upstream)
        found.append((logits, *grads))
    for got, expected in zip(*found, strict=True):
        assert (got - expected).abs().max() <= 2e-4 * expected.abs().max()
    expected = found[1][0]
    gp.pack(model.eval())
    with torch.no_grad():
        packed = model(token_ids()).logits
    assert (packed - expected).abs().max() <= 2e-4 * expected.abs().max()
