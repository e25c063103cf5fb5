"""The pictures: their size, what they show, and what they leave alone."""

import struct
import sys

import pytest
import torch
from tiny import set_gates, tiny_model

import gatepack as gp
from gatepack import plots
from gatepack.plots import draw_gate_map, draw_report, draw_tradeoff, draw_training

pytest.importorskip("matplotlib")

CHANNELS = "38,976 of 46,080 (85%)"


def rate(median):
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median}


def a_report(layers=30):
    rows = []
    for i in range(layers):
        name = f"model.layers.{i}"
        rows.append({"gate": f"{name}.self_attn:heads", "kind": "heads", "before": 9, "kept": 6})
        kept = 1536 - 64 * (i % 9)
        rows.append(
            {"gate": f"{name}.mlp:channels", "kind": "channels", "before": 1536, "kept": kept}
        )
    return {
        "pack": {"layers": rows, "kept_fraction": 0.8013},
        "speed": {
            "model": {"prefill": rate(900.0), "decode": rate(31.5)},
            "dense": {"prefill": rate(640.0), "decode": rate(24.0)},
            "ratios": {"prefill": 900 / 640, "decode": 31.5 / 24},
        },
        "perplexity": {"base": 17.9, "lora": 12.1, "packed": 13.9},
        "model": "SmolLM2-135M-Instruct",
        "target": 0.8,
    }


def draw(report, tmp_path, monkeypatch):
    """Draws a report and returns its axes by title."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs),
    )
    draw_report(report, tmp_path / "report.png")
    return {axes.get_title("left"): axes for axes in figures[0].axes}


def test_png_has_the_promised_size_and_global_state_stays(tmp_path):
    import matplotlib

    backend = dict.__getitem__(matplotlib.rcParams, "backend")
    draw_report(a_report(), tmp_path / "report.png")
    content = (tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1200, 800)
    assert dict.__getitem__(matplotlib.rcParams, "backend") is backend


def test_bars_are_the_reports_numbers(tmp_path, monkeypatch):
    report = a_report()
    axes = draw(report, tmp_path, monkeypatch)
    assert sorted(axes) == [
        "Decode: 1.31x",
        f"Kept channels: {CHANNELS}",
        "Kept heads: 180 of 270 (67%)",
        "Perplexity on held-out text (lower is better)",
        "Prefill: 1.41x",
    ]
    heights = {title: [bar.get_height() for bar in each.patches] for title, each in axes.items()}
    channels = [row for row in report["pack"]["layers"] if row["kind"] == "channels"]
    assert heights[f"Kept channels: {CHANNELS}"] == [row["kept"] for row in channels] + [1536] * 30
    assert heights["Kept heads: 180 of 270 (67%)"] == [6] * 30 + [9] * 30
    assert heights["Prefill: 1.41x"] == [640.0, 900.0]
    assert heights["Decode: 1.31x"] == [24.0, 31.5]
    assert heights["Perplexity on held-out text (lower is better)"] == [17.9, 12.1, 13.9]
    whiskers = axes["Prefill: 1.41x"].collections[0].get_segments()
    assert [list(segment[:, 1]) for segment in whiskers] == [[576.0, 768.0], [810.0, 1080.0]]


def test_bars_stand_at_the_layers_own_numbers(tmp_path, monkeypatch):
    report = a_report()
    report["pack"]["layers"] = report["pack"]["layers"][10:20]
    bars = draw(report, tmp_path, monkeypatch)["Kept heads: 30 of 45 (67%)"].patches[:5]
    assert [round(bar.get_center()[0], 6) for bar in bars] == [5, 6, 7, 8, 9]


def test_what_was_not_measured_is_left_out(tmp_path, monkeypatch):
    report = a_report(layers=2)
    report["pack"]["layers"] = report["pack"]["layers"][:1]
    report["speed"] = {
        "model": {"prefill": rate(10.0), "decode": None},
        "dense": None,
        "ratios": None,
    }
    report["perplexity"] = {"base": 17.9, "packed": None}
    axes = draw(report, tmp_path, monkeypatch)
    assert [bar.get_height() for bar in axes["Prefill"].patches] == [10.0]
    assert [text.get_text() for text in axes["Decode"].texts] == ["not measured"]
    assert [text.get_text() for text in axes[""].texts] == ["channels were not gated"]
    assert len(axes["Perplexity on held-out text (lower is better)"].patches) == 1


def test_reports_of_pack_and_measure_are_drawn(tmp_path):
    model, dense = tiny_model("llama", torch.float32), tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(target=0.5, width_multiple=4))
    gates.close("model.layers.0.mlp:channels", range(20))
    pack = gp.pack(model).to_dict()
    speed = gp.measure(model, dense=dense, prompt_tokens=8, new_tokens=2, repeats=1).to_dict()
    report = {"pack": pack, "speed": speed, "perplexity": {}, "model": "tiny", "target": 0.5}
    draw_report(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_missing_key_and_missing_matplotlib_are_named(tmp_path, monkeypatch):
    report = a_report()
    del report["speed"]
    with pytest.raises(ValueError, match="report has no 'speed'"):
        draw_report(report, tmp_path / "report.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_report(a_report(), tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def test_layer_number_is_the_first_number_of_the_name():
    assert plots._layer_number("model.layers.12.mlp:channels", 3) == 12
    assert plots._layer_number("mlp:channels", 3) == 3


def an_evaluation(name, kept, perplexity, decode_ms=None, sha256="a", tokens=9):
    entries = [
        {
            "kind": "text",
            "name": "t",
            "inputs": {"sha256": sha256},
            "tokens": tokens,
            "metrics": {"perplexity": perplexity, "bits_per_byte": perplexity / 10},
        }
    ]
    if decode_ms is not None:
        metrics = {"prefill_ms_per_token": 1.0, "decode_ms_per_token": decode_ms}
        entries.append({"kind": "latency", "name": "l", "inputs": {}, "metrics": metrics})
    return {"model": {"name": name, "class": "Llama", "kept_fraction": kept}, "entries": entries}


def points(axes):
    return [tuple(point) for line in axes.lines for point in line.get_xydata().tolist()]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    found = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **kw: found.append(self) or save(self, *a, **kw)
    )
    return found


def test_tradeoff_has_sparsity_quality_and_speed(tmp_path, figures):
    reports = [
        an_evaluation("half", 0.5, 20.0, 25.0),
        an_evaluation("dense", 1.0, 16.0, 50.0),
        an_evaluation("", 0.75, 17.0),
    ]
    draw_tradeoff(reports, tmp_path / "t.png")
    content = (tmp_path / "t.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1500, 500)
    quality, speed, both = figures[0].axes
    assert points(quality) == [(0.0, 16.0), (25.0, 17.0), (50.0, 20.0)]
    assert points(speed) == [(0.0, 20.0), (50.0, 40.0)]
    assert points(both) == [(20.0, 16.0), (40.0, 20.0)]
    assert [text.get_text() for text in quality.texts] == ["dense", "Llama", "half"]
    assert (quality.get_ylabel(), speed.get_ylabel()) == (
        "perplexity (lower is better)",
        "decode, tokens/s",
    )


def test_tradeoff_across_tokenizers_is_in_bits_and_without_speed(tmp_path, figures):
    reports = [an_evaluation("a", 1.0, 16.0), an_evaluation("b", 0.5, 20.0, tokens=12)]
    draw_tradeoff(reports, tmp_path / "t.png")
    quality, speed, both = figures[0].axes
    assert points(quality) == [(0.0, 1.6), (50.0, 2.0)]
    assert quality.get_ylabel() == "bits per byte (lower is better)"
    assert speed.texts[0].get_text() == both.texts[0].get_text() == "not measured"


def test_tradeoff_refuses_what_is_not_comparable(tmp_path):
    one = an_evaluation("a", 1.0, 16.0)
    with pytest.raises(ValueError, match="at least one report, got none"):
        draw_tradeoff([], tmp_path / "t.png")
    with pytest.raises(ValueError, match="score different texts"):
        draw_tradeoff([one, an_evaluation("b", 1.0, 16.0, sha256="b")], tmp_path / "t.png")
    with pytest.raises(ValueError, match="the report of 'a' has no in-domain text"):
        draw_tradeoff([{**one, "entries": []}], tmp_path / "t.png")
    assert not list(tmp_path.iterdir())


def test_gate_map_shows_each_value_in_its_layer(tmp_path, figures):
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(target=0.5, width_multiple=4))
    set_gates(gates, "mixed")
    gates.close("model.layers.1.mlp:channels", range(7))
    draw_gate_map(gates, tmp_path / "g.png")
    content = (tmp_path / "g.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1200, 800)
    values = gates.split(gates.deterministic_values().detach())
    for axes, kind, size in zip(figures[0].axes, ("heads", "channels"), (6, 40), strict=False):
        rows = [values[name] for name, gate in gates.items() if gate.kind == kind]
        shown = torch.as_tensor(axes.images[0].get_array().filled())
        assert torch.equal(shown, torch.stack(rows).double())
        is_open = sum(int((row > 0).sum()) for row in rows)
        assert axes.get_title("left") == f"Open {kind}: {is_open} of {2 * size}"
    assert (shown[1, :7] == 0).all()


def test_training_curves_are_the_losses(tmp_path, figures):
    long = [4.0 - i / 10 for i in range(30)]
    draw_training({"gates and LoRA": long, "LoRA": [3.0, 2.0]}, tmp_path / "l.png")
    axes = figures[0].axes[0]
    raw, mean, short = (line.get_xydata().tolist() for line in axes.lines)
    assert raw == [[i + 1, loss] for i, loss in enumerate(long)]
    assert mean[0] == pytest.approx([3, 3.9]) and len(mean) == 28  # over 3 steps
    assert short == [[1.0, 3.0], [2.0, 2.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gates and LoRA", "LoRA"]
    with pytest.raises(ValueError, match="the run 'none' has no steps"):
        draw_training({"none": []}, tmp_path / "l.png")
