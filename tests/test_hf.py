"""attach and the gated forward on every family: equal to the dense masked computation, forward and backward."""

import copy

import pytest
import torch
from tiny import dense_gradients, mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.families import FAMILIES
from gatepack.modules import GatedMLP, is_gated

CONFIG = gp.GateConfig(noise=0.0, target=0.5, width_multiple=4)
PATTERNS = ("open", "closed", "single", "mixed", "ragged")


def logits_of(model, **inputs):
    return model(**inputs).logits


def inputs_for(model, padded: bool = False):
    ids = token_ids()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_equals_masked_dense_model(model_type, pattern):
    model = tiny_model(model_type)
    reference = copy.deepcopy(model)
    gates = gp.attach(model, CONFIG)
    set_gates(gates, pattern)
    model.train()
    values = gates.split(gates.deterministic_values().double())
    mask_dense(reference.train(), values)
    inputs = inputs_for(model, padded=True)
    got, expected = logits_of(model, **inputs), logits_of(reference, **inputs)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-6 * scale
    upstream = torch.randn_like(got)
    (gate_grad,) = torch.autograd.grad(expected, gates.logits, upstream, retain_graph=True)
    got.backward(upstream)
    error = (gates.logits.grad - gate_grad).abs().max()
    assert error <= 1e-5 * gate_grad.abs().max() + 1e-12
    expected.backward(upstream)
    got_grads, expected_grads = dense_gradients(model), dense_gradients(reference)
    assert got_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (got_grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-12, name
