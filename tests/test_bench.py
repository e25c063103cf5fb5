"""gatepack bench: dense beside packed, the files it writes, and a page that needs no other file."""

import base64
import json
import re
import struct
from html.parser import HTMLParser

import pytest
import torch
from checkpoints import save_tiny
from letters import letter_tokenizer
from tiny import tiny_model
from typer.testing import CliRunner

import gatepack as gp
from gatepack import latency_bench, timing
from gatepack.bench import BenchConfig, page, plan, run
from gatepack.cli import app
from gatepack.progress import Log
from gatepack.timing import Measurement

pytest.importorskip("matplotlib")
QUIET = Log("quiet")
SIZES = {"prompt_tokens": 8, "new_tokens": 2, "repeats": 2}


def save_gated(folder, packed):
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(target=0.5, width_multiple=4))
    gates.close("model.layers.0.mlp:channels", range(30))
    if packed:
        gp.pack(model)
    gp.save_pretrained(model, folder, letter_tokenizer())
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def no_warm_up():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "WARMUP_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return save_gated(tmp_path_factory.mktemp("models") / "packed", packed=True)


@pytest.fixture(scope="module")
def done(packed, tmp_path_factory):
    """(the report of the packed model, the folder of its files); both are only read."""
    config = config_of(packed, tmp_path_factory.mktemp("done"))
    return run(config, QUIET), config.out


def config_of(model, tmp_path, **options):
    return BenchConfig(model=model, out=tmp_path / "bench", device="cpu", **{**SIZES, **options})


def test_packed_beside_its_dense_twin(done):
    report, out = done
    assert report["model"]["state"] == "packed" and report["dense"]["state"] == "dense"
    assert report["dense"]["kept_fraction"] == 1.0 > report["model"]["kept_fraction"]
    assert report["dense"]["parameters"] == sum(
        p.numel() for p in tiny_model("llama", torch.float32).parameters()
    )
    speed = report["speed"]
    assert speed["ratios"].keys() == {"prefill", "decode"}
    assert speed["model"]["parameter_bytes"] == report["model"]["bytes"]
    channels = [row for row in report["layers"] if row["kind"] == "channels"]
    assert [(row["before"], row["kept"]) for row in channels] == [(40, 10), (40, 40)]
    assert json.loads((out / "bench.json").read_text()) == json.loads(json.dumps(report))
    content = (out / "bench.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1200, 800)


def test_page_is_whole_and_holds_what_was_measured(done):
    report, out = done
    text = (out / "bench.html").read_text(encoding="utf-8")
    png = re.search(r'src="data:image/png;base64,([^"]+)"', text).group(1)
    assert base64.b64decode(png) == (out / "bench.png").read_bytes()
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text
    cells = []

    class Cells(HTMLParser):
        def handle_data(self, data):
            cells.append(data)

    Cells().feed(text)
    for row in Measurement.from_dict(report["speed"]).rows():
        assert set(filter(None, row)) <= set(cells)


def test_page_escapes_names(done):
    report, _ = done
    model = {**report["model"], "name": "<script>alert(1)</script>"}
    text = page({**report, "model": model}, b"")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_gated_is_packed_first_and_dense_is_timed_alone(tmp_path):
    gated = save_gated(tmp_path / "gated", packed=False)
    report = run(config_of(gated, tmp_path), QUIET)
    assert report["model"]["state"] == "packed" and report["model"]["kept_fraction"] < 1
    dense = str(save_tiny(tmp_path / "dense"))
    report = run(config_of(dense, tmp_path), QUIET)
    assert report["dense"] is None and report["speed"]["ratios"] is None
    report = run(config_of(dense, tmp_path, dense=dense), QUIET)
    assert report["dense"]["name"] == dense


def test_packed_by_rows_and_columns_is_timed_beside_its_dense_twin(tmp_path):
    model = tiny_model("llama", torch.float32)
    units = {"units": ("rows", "columns"), "noise": 0.0}
    gates = gp.attach(model, gp.GateConfig(target=0.9, **units))
    gates.close("model.layers.0.self_attn.q_proj:rows", range(5))
    gp.pack(model)
    gp.save_pretrained(model, tmp_path / "m", letter_tokenizer())
    report = run(config_of(str(tmp_path / "m"), tmp_path), QUIET)
    assert report["model"]["state"] == "packed" and report["dense"]["state"] == "dense"
    assert report["dense"]["kept_fraction"] == 1.0 > report["model"]["kept_fraction"]
    assert report["speed"]["ratios"].keys() == {"prefill", "decode"} and report["layers"] == []
    table = config_of(str(tmp_path / "m"), tmp_path)
    with pytest.raises(ValueError, match="model: expected a dense one, whose layers are cut"):
        latency_bench.run(table, tmp_path / "table.json", QUIET)
    assert not (tmp_path / "table.json").exists()


def test_plan_times_one_repeat_and_writes_nothing(packed, tmp_path):
    found = plan(config_of(packed, tmp_path), QUIET)
    assert found["seconds"] > 0
    assert found["dense"]["parameters"] > found["model"]["parameters"]
    assert not (tmp_path / "bench").exists()


def test_measurement_comes_back_from_its_record():
    model = tiny_model("llama", torch.float32)
    for dense in (None, tiny_model("llama", torch.float32)):
        measured = gp.measure(model, dense=dense, **SIZES)
        record = json.loads(json.dumps(measured.to_dict()))
        assert Measurement.from_dict(record) == measured


def test_command(packed, tmp_path):
    arguments = ["bench", packed, "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    arguments += ["--out", str(tmp_path / "b"), "--device", "cpu"]
    wide = {"COLUMNS": "200", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [*arguments, "--dry-run"], env=wide)
    assert done.exit_code == 0 and "parameters, dense" in done.output
    assert not (tmp_path / "b").exists()
    done = CliRunner().invoke(app, arguments, env=wide)
    assert done.exit_code == 0, done.output
    for words in ("prefill, tokens/s", "decode, tokens/s", "parameters, MB", "bench.html"):
        assert words in done.output
    done = CliRunner().invoke(app, [*arguments, "--prompt-tokens", "0"], env=wide)
    assert done.exit_code == 1 and "prompt_tokens must be at least 1, got 0" in done.output
