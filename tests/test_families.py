"""Family and register_family: refusals that name the field, and names that are taken."""

import dataclasses

import pytest
import torch
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.families import BERT, FAMILIES, GPT2, LLAMA


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention": ""}, ["attention", "path of a module", "''"]),
        ({"out": None}, ["out", "path of a module", "None"]),
        ({"down": "mlp..down"}, ["down", "'mlp..down'"]),
        ({"q": 3}, ["q must be", "3"]),
        ({"mlp": "a b"}, ["mlp", "or None", "'a b'"]),
        ({"kv": "self_attn.k_proj"}, ["kv", "tuple of paths", "'self_attn.k_proj'"]),
        ({"up": ["mlp.up"]}, ["up", "tuple of paths"]),
        ({"up": ()}, ["up", "at least one"]),
        ({"qkv": "attn.c_attn"}, ["either q and kv or", "qkv='attn.c_attn'"]),
        ({"q": ""}, ["either q and kv or", "q=''"]),
        ({"kv": ()}, ["either q and kv or", "kv=()"]),
        ({"fused_up": True}, ["fused_up", "one path in up", "'mlp.up_proj'"]),
        ({"fused_up": True, "up": ("mlp.both",)}, ["fused_up", "no mlp", "mlp='mlp'"]),
        ({"across_heads": "self_attn.q_norm"}, ["across_heads", "tuple of paths"]),
        ({"by_head": True}, ["by_head", "qkv", "q='self_attn.q_proj'"]),
        ({"head_attributes": (("rope.heads", "queries"),)}, ["head_attributes", "config.NAME"]),
        ({"head_attributes": (("heads", "count"),)}, ["head_attributes", "'queries'", "'count'"]),
        ({"head_attributes": [("heads", "queries")]}, ["head_attributes", "tuple of pairs"]),
        ({"head_attributes": ("heads",)}, ["head_attributes", "tuple of pairs"]),
    ],
    ids=str,
)
def test_refusal_names_the_field(fields, words):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(LLAMA, **fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "model_type, options, path",
    [
        ("olmo2", {}, "self_attn.q_norm"),
        ("olmo3", {}, "self_attn.q_norm"),
        ("cohere", {"use_qk_norm": True}, "self_attn.q_norm"),
        ("stablelm", {"qk_layernorm": True}, "self_attn.q_layernorm"),
    ],
)
def test_heads_that_share_a_norm_are_refused(model_type, options, path):
    model = tiny_model(model_type, **options)
    keys = list(model.state_dict())
    words = rf"model.layers.0.self_attn cannot be gated, because {path} .*units=\(\"channels\",\)"
    with pytest.raises(ValueError, match=words):
        gp.attach(model, gp.GateConfig(target=0.8))
    assert list(model.state_dict()) == keys
    gates = gp.attach(model, gp.GateConfig(units=("channels",), target=0.8))
    assert {gate.kind for _, gate in gates.items()} == {"channels"}
    gp.detach(model)
    ids = token_ids()
    gates = gp.attach(model.eval(), gp.GateConfig(units=("rows", "columns"), noise=0.0, target=0.6))
    gates.close("model.layers.0.self_attn.q_proj:rows", [1, 9])
    expected = model(ids).logits
    gp.pack(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_dropout_at_the_end_of_an_mlp_stays():
    model = tiny_model("seed_oss", residual_dropout=1.0).train()
    expected = model(token_ids()).logits
    assert not torch.equal(model.eval()(token_ids()).logits, expected)
    gates = gp.attach(model.train(), gp.GateConfig(noise=0.0, target=0.6))
    assert bool((gates.deterministic_values() == 1).all())
    assert torch.equal(model(token_ids()).logits, expected)


def test_values_that_are_clipped_in_place_are_refused():
    model = tiny_model("olmo", clip_qkv=0.5)
    for units in (("heads", "channels"), ("rows", "columns")):
        with pytest.raises(ValueError, match=r"clip_qkv=0\.5: expected None"):
            gp.attach(model, gp.GateConfig(units=units))
    with pytest.raises(ValueError, match=r"clip_qkv=0\.5: expected None"):  # not as late as finish
        gp.methods.ATP().prepare(model)


def test_linears_are_named_once_each():
    for family in FAMILIES.values():
        assert len(set(family.linears)) == len(family.linears)
    assert GPT2.linears == ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("name", ["", None, 3])
def test_model_type_must_be_a_name(name):
    with pytest.raises(ValueError, match="model_type must be a name"):
        gp.register_family(name, LLAMA)


def test_a_taken_name_is_refused_unless_it_is_the_same_or_replaced(monkeypatch):
    monkeypatch.setitem(FAMILIES, "theirs", LLAMA)
    gp.register_family("theirs", LLAMA)
    with pytest.raises(ValueError, match="'theirs' already has the family"):
        gp.register_family("theirs", BERT)
    gp.register_family("theirs", BERT, replace=True)
    assert FAMILIES["theirs"] == BERT
