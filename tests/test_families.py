"""Family and register_family: refusals that name the field, and names that are taken."""

import dataclasses

import pytest

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
