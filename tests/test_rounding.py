"""What rounding explains: also in a model that multiplies it, where a wrong one is still told."""

import copy
from dataclasses import replace

import pytest
import torch
from packed import EVEN, packed_model, spoil
from tiny import token_ids

import gatepack as gp
from gatepack.exporters import uniform
from gatepack.quality import ParityError, rounding_bound
from gatepack.rounding import (
    LEEWAY,
    Apart,
    compare,
    last_place,
    linears_of,
    logits_by_window,
    rounding_effect,
)

IDS = token_ids(4, 32)


@pytest.fixture
def touchy():
    """Attention that all but picks one token: where two are close, rounding decides."""
    model = packed_model(**EVEN)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


def test_sound_models_are_within_the_bound():
    model = packed_model(**EVEN)
    figures = compare(model, copy.deepcopy(model).double(), IDS, "torch in double")
    assert 0 < figures["max_abs_difference"] <= figures["bound"] and "rounding" not in figures
    assert figures["bound"] == rounding_bound(model, IDS[:1])[0]
    with pytest.raises(ParityError, match="it gives logits that differ from the model's by"):
        compare(model, spoil(copy.deepcopy(model)), IDS, "it")


def test_a_model_that_multiplies_rounding_is_compared_with_its_own(touchy):
    figures = compare(touchy, copy.deepcopy(touchy).double(), IDS, "torch in double")
    assert figures["max_abs_difference"] > 10 * figures["bound"]
    for found, alone in zip(*(figures["rounding"][n] for n in ("found", "rounding")), strict=True):
        assert alone / LEEWAY < found < LEEWAY * alone
    with pytest.raises(ParityError, match="it gives logits that differ from the model's"):
        compare(touchy, spoil(copy.deepcopy(touchy)), IDS, "it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(value):
    model = packed_model(**EVEN)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[3, 3] = value
    with pytest.raises(ParityError, match="gives logits"):
        compare(model, other, IDS, "it")


def test_effect_is_of_the_rounding_alone(touchy):
    same = rounding_effect(touchy, IDS, {})
    assert not same.logits.any() and not same.nats.any()
    assert len(same.logits) == 4 * 32 and len(same.nats) == 4 * 31
    moved = rounding_effect(touchy, IDS, dict.fromkeys(linears_of(touchy), last_place))
    again = rounding_effect(touchy, IDS, dict.fromkeys(linears_of(touchy), last_place))
    assert moved.largest > 0 and torch.equal(moved.logits, again.logits)
    assert not touchy.lm_head._forward_pre_hooks
    x = torch.ones(300)
    found = set(((last_place(x) - 1) / torch.finfo(x.dtype).eps).tolist())
    assert found == {-1.0, 0.0, 1.0}


def test_logits_of_other_shapes_are_refused():
    models = packed_model(**EVEN), packed_model(**EVEN, vocab_size=101)
    with pytest.raises(ValueError, match="differ in shape"):
        Apart.of(*(logits_by_window(model, IDS) for model in models), IDS)


def test_an_export_of_such_a_model_is_written_and_a_wrong_one_is_not(touchy, tmp_path, monkeypatch):
    gp.export(touchy, tmp_path / "m", windows=IDS)
    write = uniform.write

    def wrong(source, folder):
        return write(replace(source, model=spoil(copy.deepcopy(source.model))), folder)

    monkeypatch.setattr(uniform, "write", wrong)
    with pytest.raises(ParityError, match="transformers .* gives logits that differ"):
        gp.export(touchy, tmp_path / "n", windows=IDS)
    assert not (tmp_path / "n").exists()
