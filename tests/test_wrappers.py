"""Models inside torch.compile and PEFT: gates find each linear once, whatever wraps it."""

import pytest
import torch
from tiny import mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.layers import hf_model

SHAPES = {"target": 0.6, "noise": 0.0, "width_multiple": 4}


def logits_of(model, ids=None):
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


class TestCompiled:
    """Wrapped only: nothing here is compiled."""

    def test_gates_and_packing_go_to_the_model_inside(self, tmp_path):
        model = tiny_model("llama", torch.float32).eval()
        compiled = torch.compile(model)
        gates = gp.attach(compiled, gp.GateConfig(**SHAPES))
        assert gp.gates_of(model) is gates and "model.layers.0.mlp:channels" in gates
        gates.snap()
        expected, before = logits_of(model), sum(p.numel() for p in model.parameters())
        report = gp.pack(compiled)
        assert report.params[1] < before - gates.logits.numel()
        assert sum(p.numel() for p in model.parameters()) == report.params[1]
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
        gp.save_pretrained(compiled, tmp_path)
        again = gp.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(again), logits_of(model))

    def test_closed_units_leave_it(self):
        model = tiny_model("llama")
        gates = gp.attach(model, gp.GateConfig(**SHAPES))
        gates.close("model.layers.0.mlp:channels", range(8))
        report = gp.remove_closed(torch.compile(model))
        assert model.model.layers[0].mlp.down_proj.weight.shape == (48, 32)
        assert report.block_params[1] < report.block_params[0]

    def test_around_and_inside_peft(self):
        peft = pytest.importorskip("peft")
        model = tiny_model("llama")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        assert hf_model(torch.compile(wrapped)) is hf_model(wrapped) is model


class TestModulesToSave:
    """PEFT trains a copy of them, and keeps the first one: both were gated linears."""

    def test_a_linear_of_the_blocks(self):
        peft = pytest.importorskip("peft")
        model = tiny_model("llama").eval()
        dense = tiny_model("llama").eval()
        gates = gp.attach(model, gp.GateConfig(**SHAPES))
        set_gates(gates, "mixed")
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]),
        ).eval()
        expected = logits_of(mask_dense(dense, gates.split(gates.deterministic_values())))
        torch.testing.assert_close(logits_of(wrapped), expected, rtol=1e-6, atol=1e-7)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(logits_of(merged), expected, rtol=1e-6, atol=1e-7)
        gp.pack(merged)
        torch.testing.assert_close(logits_of(merged), expected, rtol=1e-6, atol=1e-7)

    def test_the_head_that_peft_saves_by_itself(self):
        peft = pytest.importorskip("peft")
        model, ids = tiny_model("bert").eval(), token_ids()
        shapes = {"units": ("columns",), "target": 0.9, "noise": 0.0}
        config = gp.GateConfig(targets=("*.query", "classifier"), **shapes)
        gates = gp.attach(model, config)
        gates.unfreeze()
        with torch.no_grad():
            gates.logits.zero_()
        expected = logits_of(model, ids)
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        wrapped = peft.get_peft_model(model, lora).eval()
        torch.testing.assert_close(logits_of(wrapped, ids), expected, rtol=1e-6, atol=1e-7)
        with torch.no_grad():
            gates.logits.fill_(2.0)  # all open
        dense = logits_of(tiny_model("bert").eval(), ids)
        torch.testing.assert_close(logits_of(wrapped, ids), dense, rtol=1e-6, atol=1e-7)


def test_adapters_on_packed_rows_and_columns_where_the_trunk_runs_first():
    peft = pytest.importorskip("peft")
    outputs = []
    for whole_first in (True, False):
        model = tiny_model("llama", torch.float32).eval()
        gates = gp.attach(model, gp.GateConfig(units=("rows", "columns"), target=0.6, noise=0.0))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            gates.logits.copy_(torch.rand(gates.logits.shape, generator=generator) * 1.2 - 0.7)
        gp.pack(model)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, lora).eval()
        if whole_first:
            logits_of(wrapped)
        with torch.no_grad():
            outputs.append(hf_model(wrapped).model(token_ids())[0])
    assert torch.equal(*outputs)
