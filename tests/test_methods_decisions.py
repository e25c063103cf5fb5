"""ATP's decisions: formulas against literal fp64 transcriptions, the generator, and the layout."""

import logging
import math

import pytest
import torch
from tiny import tiny_model

import gatepack as gp
from gatepack.layers import layers_of
from gatepack.methods.decisions import (
    DecisionGenerator,
    budget_loss,
    gumbel_sigmoid,
    layout_of,
    straight_through,
)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gumbel_sigmoid_is_the_published_one():
    logits, uniform = [-3.4, -0.2, 1.5], [0.1, 0.7, 0.999]
    expected = []
    for value, u in zip(logits, uniform, strict=True):
        noise = -math.log(-math.log(u + 1e-10) + 1e-10)
        expected.append(1 / (1 + math.exp(-(value + noise + 3.0) / 0.4)))
    found = gumbel_sigmoid(float64(logits), float64(uniform), 0.4, 3.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_one_gumbel_gives_its_own_probability():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=generator)
    for shift in (math.log(math.log(2)), -1.0, 0.5):
        logits = torch.full_like(uniform, shift - 3.0)
        kept = (gumbel_sigmoid(logits, uniform, 0.4, 3.0) >= 0.5).double().mean()
        assert float(kept) == pytest.approx(1 - math.exp(-math.exp(shift)), abs=0.005)
    assert bool((gumbel_sigmoid(torch.zeros_like(uniform), uniform, 0.4, 3.0) >= 0.5).all())


def test_straight_through_and_budget():
    soft = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    hard = straight_through(soft)
    assert hard.tolist() == [0, 1, 1]
    weights = float64([1.0, 2.0, 3.0])
    (grad,) = torch.autograd.grad((hard * weights).sum(), soft)
    assert torch.equal(grad, weights)
    for kept in (0.3, 0.6, 1.0):
        expected = math.log(max(kept, 0.6) / min(kept, 0.6))
        found = budget_loss(float64(kept), 0.6)
        assert float(found) == pytest.approx(expected, abs=1e-12)


def test_generator_has_the_published_size_and_slots():
    with torch.device("meta"):
        shapes = [p.numel() for p in DecisionGenerator(32, (128, 128, 11008)).parameters()]
    assert sum(shapes) == 99_968 + 128 + 64 * 11_264 * 32
    generator = DecisionGenerator(2, (4, 8, 40))
    product = generator.slots @ generator.slots.t()
    torch.testing.assert_close(product, torch.eye(2))
    assert generator().shape == (2 * 52,)
    assert torch.equal(generator.slots, DecisionGenerator(2, (4, 8, 40)).slots)


def test_layout_of_one_vector_for_all_heads():
    layers = layers_of(tiny_model("llama"))
    layout = layout_of(layers, per_head=False, tie_pairs=True)
    assert layout.lengths == (4, 8, 40) and len(layout.costs) == 104
    places = {place.name: place for place in layout.places}
    q = places["model.layers.1.self_attn.q_proj"].rows.tolist()
    assert q == [52 + lane % 4 for lane in range(48)]
    v = places["model.layers.0.self_attn.v_proj"].rows.tolist()
    assert v == [4 + lane % 8 for lane in range(16)]
    out = places["model.layers.0.self_attn.o_proj"].columns.tolist()
    assert out == [4 + lane % 8 for lane in range(48)]
    down = places["model.layers.0.mlp.down_proj"]
    assert down.columns.tolist() == list(range(12, 52)) and down.power == 2


def test_layout_by_head():
    layout = layout_of(layers_of(tiny_model("llama")), per_head=True, tie_pairs=False)
    assert layout.lengths == (16, 16, 40)
    places = {place.name: place for place in layout.places}
    k = places["model.layers.0.self_attn.k_proj"].rows.tolist()
    assert k == list(range(16))
    q = places["model.layers.0.self_attn.q_proj"].rows.reshape(6, 8)
    assert q[2].tolist() == list(range(8)) and q[3].tolist() == list(range(8, 16))


def test_closest_fills_up_to_the_target():
    layout = layout_of(layers_of(tiny_model("llama")), False, True)
    scores = torch.arange(104.0)
    chosen = layout.closest(scores, 0.6)
    kept = float(layout.kept_fraction(chosen.double()))
    assert abs(kept - 0.6) <= 0.003  # half a channel
    assert bool(chosen[-20:].all()) and not bool(chosen[:20].all())


def test_channels_are_kept_in_multiples():
    layers = layers_of(tiny_model("llama", num_hidden_layers=8, intermediate_size=160))
    layout = layout_of(layers, False, True)
    scores = torch.rand(len(layout.costs), generator=torch.Generator().manual_seed(0))
    chosen = layout.closest(scores, 0.6, 8)
    assert abs(float(layout.kept_fraction(chosen.double())) - 0.6) <= 0.005
    parts = chosen.view(8, -1)
    assert bool((parts[:, -160:].sum(1) % 8 == 0).all())
    inner, worth = parts[:, :-160], scores.view(8, -1)[:, :-160]
    assert worth[inner].min() > worth[~inner].max()


def test_multiple_is_refined_and_logged(caplog):
    layout = layout_of(layers_of(tiny_model("llama")), False, True)
    scores = torch.rand(len(layout.costs), generator=torch.Generator().manual_seed(2))
    with caplog.at_level(logging.WARNING, logger="gatepack.budget"):
        chosen = layout.closest(scores, 0.6, 32)
    assert abs(float(layout.kept_fraction(chosen.double())) - 0.6) <= 0.005
    assert [record.getMessage() for record in caplog.records] == [
        "width_multiple 32 cannot meet the target 0.6000 within 0.5 %; using 16"
    ]


def test_layers_of_different_sizes_are_refused():
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(noise=0.0))
    gates.close("model.layers.0.mlp:channels", [1])
    gp.pack(model)
    with pytest.raises(ValueError, match="expected the same heads and channels in each"):
        layout_of(layers_of(model), False, False)
