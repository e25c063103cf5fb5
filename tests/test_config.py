"""GateConfig: refusals that name field, value and what is allowed, and the JSON round trip."""

import dataclasses
import json

import pytest

import gatepack as gp

REFUSALS = [
    ({"units": "heads"}, ["units", "'heads'", "list or tuple of strings"]),
    ({"units": None}, ["units", "None", "list or tuple of strings"]),
    ({"units": 3}, ["units", "3", "list or tuple of strings"]),
    ({"units": ()}, ["units", "none", "heads", "channels"]),
    ({"units": ("heads", "rows")}, ["units", "'heads'", "'rows'", "among"]),
    ({"units": ("heads", "lanes")}, ["units", "'lanes'", "heads", "channels"]),
    ({"estimator": "gumbel"}, ["estimator", "'gumbel'", "stg", "hard_concrete"]),
    ({"target_of": "bytes"}, ["target_of", "'bytes'", "params", "flops", "latency"]),
    (
        {"target_of": "latency", "units": ("rows",)},
        ["target_of", "'latency'", "'params' or 'flops'", "'rows'", "gather and scatter"],
    ),
    ({"target_of": "latency"}, ["latency_table", "NoneType", "'latency'"]),
    ({"latency_phase": "training"}, ["latency_phase", "'training'", "prefill", "decode"]),
    ({"latency_table": "t.json"}, ["latency_table", "str", "target_of='params'"]),
    ({"latency_device": 7}, ["latency_device", "7", "name or None"]),
    ({"sequence_length": 0}, ["sequence_length", "0", "integer >= 1"]),
    ({"target": 0.0}, ["target", "0.0", "(0, 1)"]),
    ({"target": 1.0}, ["target", "1.0", "(0, 1)"]),
    ({"target": float("nan")}, ["target", "nan", "(0, 1)"]),
    ({"target": "0.5"}, ["target", "'0.5'", "(0, 1)"]),
    ({"target": True}, ["target", "True", "(0, 1)"]),
    ({"noise": -0.1}, ["noise", "-0.1", ">= 0"]),
    ({"noise": float("inf")}, ["noise", "inf", "finite"]),
    ({"init_logit": float("inf")}, ["init_logit", "inf", "finite number or None"]),
    ({"width_multiple": 0}, ["width_multiple", "0", "integer >= 1"]),
    ({"width_multiple": 64.0}, ["width_multiple", "64.0", "integer >= 1"]),
    ({"tp_divisor": True}, ["tp_divisor", "True", "integer >= 1"]),
    ({"tp_divisor": 2, "units": ("rows",)}, ["tp_divisor", "2", "must be 1", "'rows'", "'heads'"]),
    ({"seed": -1}, ["seed", "-1", "integer >= 0"]),
    ({"targets": "model.*"}, ["targets", "'model.*'", "list or tuple of strings"]),
    ({"targets": (1,)}, ["targets", "(1,)", "list or tuple of strings"]),
    ({"equal_layers": "no"}, ["equal_layers", "'no'", "True or False"]),
    ({"q_per_kv_uniform": 1}, ["q_per_kv_uniform", "1", "True or False"]),
    ({"version": 2}, ["version", "2", "must be 1", "another release"]),
]


@pytest.mark.parametrize(("fields", "words"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refusal_names_field_value_and_allowed(fields, words):
    with pytest.raises(ValueError) as error:
        gp.GateConfig(**fields)
    for word in words:
        assert word in str(error.value)


def test_every_field_has_a_refusal():
    refused = {field for fields, _ in REFUSALS for field in fields}
    assert refused == {field.name for field in dataclasses.fields(gp.GateConfig)}


def test_json_round_trip():
    config = gp.GateConfig(
        units=["channels"],
        estimator="hard_concrete",
        noise=0.25,
        target=0.37,
        width_multiple=8,
        equal_layers=False,
        q_per_kv_uniform=False,
        tp_divisor=2,
        targets=["model.layers.1*", "model.layers.?.mlp"],
        sequence_length=512,
        latency_phase="prefill",
        latency_device="cpu",
        init_logit=-0.5,
        seed=11,
    )
    assert gp.GateConfig.from_json(config.to_json()) == config
    assert gp.GateConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    default = gp.GateConfig()
    assert all(
        getattr(config, field.name) != getattr(default, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("version", "target_of", "latency_table")
    )
    assert gp.GateConfig.from_json(default.to_json()) == default


def test_missing_fields_take_their_defaults():
    assert gp.GateConfig.from_dict({"target": 0.5}) == gp.GateConfig(target=0.5)


def test_unknown_field_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"unknown GateConfig field 'with_multiple'; known: .*width_multiple"
    ):
        gp.GateConfig.from_dict({"with_multiple": 64})


def test_text_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"object of fields, got \[1\]"):
        gp.GateConfig.from_json("[1]")
    with pytest.raises(ValueError, match="Expecting"):
        gp.GateConfig.from_json("{")


def test_is_frozen_and_hashable():
    config = gp.GateConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.target = 0.5
    assert hash(config) == hash(gp.GateConfig())
