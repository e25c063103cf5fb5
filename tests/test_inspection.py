"""explain: the backend of every gated and packed linear, and why."""

import os
import subprocess
import sys

import pytest
from tiny import set_gates, tiny_model, token_ids
from torch import nn

import gatepack as gp
from gatepack import modules
from gatepack.gates import GateSet, GateSpec
from gatepack.inspection import Explained, identify

CONFIG = gp.GateConfig(noise=0.0, target=0.5, width_multiple=4)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def gated(model_type="llama", pattern="mixed"):
    model = tiny_model(model_type)
    set_gates(gp.attach(model, CONFIG), pattern)
    return model


def adapted(model, **lora):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(LINEARS), **lora))


def row_of(model, ending):
    (row,) = (row for row in gp.explain(model).rows if row.module.endswith(ending))
    return row


def test_what_is_no_model_is_named():
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, got NoneType"):
        gp.explain(None)


def test_gated_model_on_cpu(free_calls):
    explanation = gp.explain(gated(pattern="closed"))
    assert [row.module for row in explanation.rows] == [
        f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        for layer in (0, 1)
        for name in LINEARS
    ]
    why = "at most 6 tokens with 0% open; folded: more than 6 tokens with 0% open"
    assert explanation.rows[0] == Explained(
        "model.layers.0.self_attn.q_proj", "rows heads", "dense", "folded", f"dense: {why}"
    )
    roles = [row.role for row in explanation.rows[:7]]
    assert roles == ["rows heads"] * 3 + ["in heads"] + ["rows channels"] * 2 + ["in channels"]


def test_prints_as_a_table_with_the_fold_pack_backend():
    explanation = gp.explain(gated(pattern="open"))
    lines = str(explanation).splitlines()
    assert lines[0].split() == ["module", "role", "few", "tokens", "more", "why"]
    assert len(lines) == 16
    assert lines[4].split() == [
        "model.layers.0.self_attn.o_proj",
        "in",
        "heads",
        "dense",
        "dense",
        "nothing",
        "is",
        "closed",
    ]
    name, _, reason = lines[-1].removeprefix("fold_pack: ").partition(" ")
    assert name in ("cuda", "cpp", "torch") and reason.startswith("(") and len(reason) > 4


def test_opaque_adapter_is_named():
    model = adapted(gated(), use_dora=True)
    row = row_of(model, "layers.1.mlp.up_proj")
    assert (row.few, row.many, row.why) == (
        "dense",
        "dense",
        "adapter 'default' is a DoraLinearVariant",
    )
    with model.disable_adapter():
        assert row_of(model, "layers.1.mlp.up_proj").many == "folded"


@pytest.mark.parametrize(
    ("kind", "fields", "layer"),
    [
        ("AdaLoraConfig", {"init_r": 4, "total_step": 10}, "adalora.layer.SVDLinear"),
        ("IA3Config", {"feedforward_modules": ["down_proj"]}, "ia3.layer.Linear"),
    ],
)
def test_adapter_that_is_not_lora_is_named(kind, fields, layer):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(target_modules=list(LINEARS), **fields)
    model = peft.get_peft_model(gated(), config)
    rows = gp.explain(model).rows
    assert {(row.few, row.many, row.why) for row in rows} == {
        ("dense", "dense", f"adapter type peft.tuners.{layer} is not LoRA")
    }


def test_wrapping_after_attach_needs_no_forward_first():
    model = adapted(gated())
    explanation = gp.explain(model)
    assert len(explanation.rows) == 14
    assert explanation.rows[0].module == "base_model.model.model.layers.0.self_attn.q_proj"
    assert {row.many for row in explanation.rows} == {"folded"}


def test_explains_what_runs(free_calls, monkeypatch):
    model = gated()
    ran = []
    original = modules.path_of
    monkeypatch.setattr(modules, "path_of", lambda *args: ran.append(original(*args)) or ran[-1])
    rows = gp.explain(model).rows
    model(token_ids(5, 60))
    assert ran == [row.many for row in rows] == ["folded"] * 14
    ran.clear()
    model(token_ids(1, 1))
    # The pass of SwiGLU has the gate of the down projection inside it.
    assert ran == [row.few for row in rows if "down_proj" not in row.module] == ["dense"] * 12


def test_noise_is_not_drawn():
    model = gated()
    gates = model.gatepack_gates
    model.train(), gp.explain(model)
    assert int(gates.draws) == 0 and gates._sample is None


def test_forced_backend(monkeypatch):
    model = gated()
    for forced in ("folded", "triton", "dense"):
        monkeypatch.setenv("GATEPACK_BACKEND", forced)
        row = row_of(model, "layers.0.self_attn.o_proj")
        assert (row.few, row.many, row.why) == (forced, forced, "GATEPACK_BACKEND")


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("GATEPACK_BACKEND", "torch")
    with pytest.raises(ValueError, match="must be folded, triton or dense, got 'torch'"):
        gp.explain(gated())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_packed_model_says_its_widths(model_type):
    model = gated(model_type, "single")
    before = len(gp.explain(model).rows)
    gp.pack(model)
    rows = gp.explain(model).rows
    assert len(rows) == before
    assert {(row.few, row.many, row.why) for row in rows} == {
        ("packed", "packed", "closed units are removed")
    }
    expected = {"llama": "48 -> 8 of 48 -> 48", "gpt2": "48 -> 24", "bert": "48 -> 8 of 48 -> 48"}
    assert rows[0].role == expected[model_type]


def test_packed_and_gated_again():
    model = gated(pattern="single")
    gp.pack(model)
    gp.attach(model, gp.GateConfig(units=("channels",), target=0.95, width_multiple=1))
    rows = gp.explain(model).rows
    assert [row.few for row in rows[:7]] == ["packed"] * 4 + ["dense"] * 3


def test_model_packed_by_rows_and_columns_is_identified():
    model = tiny_model("llama")
    config = gp.GateConfig(units=("rows", "columns"), noise=0.0, target=0.5, width_multiple=1)
    set_gates(gp.attach(model, config), "mixed")
    report = gp.pack(model)
    found = identify(model)
    assert found["state"] == "packed" and found["widths"] is None
    assert (
        found["kept_fraction"] == pytest.approx(report.kept_fraction) and report.kept_fraction < 1
    )
    assert identify(tiny_model("llama"))["widths"]["heads"] == [6, 6]


def test_any_module():
    assert gp.explain(nn.Linear(2, 2)).rows == ()
    gates = GateSet(CONFIG, {"mine:channels": GateSpec("channels", 8)})
    module = nn.Sequential(
        gp.GatedLinear(8, 8, in_gate=gates["mine:channels"], out_gate=gates["mine:channels"])
    )
    assert gp.explain(module).rows == (
        Explained("0", "in channels, out channels", "dense", "dense", "nothing is closed"),
    )


def test_kernels_are_not_imported():
    code = (
        "import sys, torch, gatepack as gp; gp.explain(torch.nn.Linear(2, 2)); "
        "sys.exit('gatepack.kernels' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert done.returncode == 0
