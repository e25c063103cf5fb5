"""gatepack eval and plot on the command line: exit codes, what is printed, what is written."""

import json

import pytest
import torch
from letters import letter_tokenizer
from tiny import tiny_model
from typer.testing import CliRunner

import gatepack as gp
from gatepack import evaluation
from gatepack.cli import app

WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}
FAST = ["--length", "16", "--windows", "4", "--device", "cpu"]
TIMED = ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1"]


def save(folder, model):
    gp.save_pretrained(model, folder, letter_tokenizer())
    return str(folder)


@pytest.fixture
def files(tmp_path):
    save(tmp_path / "dense", tiny_model("llama", torch.float32))
    for name, text in (("in.txt", "Gates open and close. " * 5), ("out.txt", "QWERTY" * 9)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    question = {"prompt": "Open?", "choices": ["yes", "no"], "answer": "B"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question), encoding="utf-8")
    return {path.name: str(path) for path in tmp_path.iterdir()}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], env=WIDE)


def test_scores_prints_writes_and_compares(files, tmp_path):
    inputs = ["--text", files["in.txt"], "--ood", files["out.txt"], "--choices", files["q.jsonl"]]
    arguments = ["eval", files["dense"], *inputs, *FAST]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    base = ["--base", files["dense"]]
    done = invoke(*arguments, *TIMED, *base, "--out", first)
    assert done.exit_code == 0, done.output
    for text in (
        "text in.txt",
        "ood out.txt",
        "choices q.jsonl",
        "bits per byte",
        "latency: prefill",
    ):
        assert text in done.output
    report = json.loads(first.read_text(encoding="utf-8"))
    kinds = [entry["kind"] for entry in report["entries"]]
    assert kinds == ["text", "ood", "choices", "latency"]
    perplexity = report["entries"][0]["metrics"]["perplexity"]
    assert f"{perplexity:.2f}" in done.output
    assert "base" in done.output and "(+0.0%)" in done.output

    # Without the timing, what the first report measured is missing.
    done = invoke(*arguments, "--no-latency", "--out", second, "--against", first)
    assert done.exit_code == 1
    assert "regression: latency random prompts: missing from the new report" in done.output
    done = invoke(*arguments, "--no-latency", "--against", second)
    assert done.exit_code == 0, done.output
    assert f"9 values compared with {second}, violations: 0" in done.output


def test_dry_run_counts_times_and_writes_nothing(files, tmp_path):
    out = tmp_path / "r.json"
    inputs = ["--text", files["in.txt"], "--ood", files["out.txt"], "--choices", files["q.jsonl"]]
    arguments = ["eval", files["dense"], *inputs, *FAST, *TIMED, "--out", out, "--dry-run"]
    done = invoke(*arguments, "--base", files["dense"])
    assert done.exit_code == 0, done.output
    for text in ("parameters, base", "windows, text in.txt", "questions, q.jsonl", "seconds"):
        assert text in done.output
    done = invoke(*arguments, "--log", "json")
    plan = json.loads(done.stdout.splitlines()[-1])["result"]
    assert plan["texts"] == {"text in.txt": 4, "ood out.txt": 4} and plan["seconds"] > 0
    assert plan["questions"] == {"q.jsonl": 1} and plan["base"] is None
    assert not list(tmp_path.glob("r.json*"))


def test_regression_exits_1_with_a_line_per_bound(files, tmp_path):
    arguments = ["eval", files["dense"], "--text", files["in.txt"], "--no-latency", *FAST]
    out = tmp_path / "r.json"
    assert invoke(*arguments, "--out", out).exit_code == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    now = report["entries"][0]["metrics"]["perplexity"]
    report["entries"][0]["metrics"]["perplexity"] = now / 1.5
    out.write_text(json.dumps(report), encoding="utf-8")
    done = invoke(*arguments, "--against", out)
    assert done.exit_code == 1
    line = f"regression: text in.txt: perplexity is {now:.6g}, was {now / 1.5:.6g}: 1.5000x"
    assert f"{line}, allowed 1.02" in done.output
    assert "violations: 1" in done.output
    done = invoke(*arguments, "--against", out, "--max-perplexity-ratio", "1.6")
    assert done.exit_code == 0, done.output


def test_packed_model_is_scored_and_drawn_beside_the_dense_one(files, tmp_path):
    pytest.importorskip("matplotlib")
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(target=0.5, width_multiple=4))
    gates.close("model.layers.0.mlp:channels", range(30))
    kept = gp.pack(model).kept_fraction
    packed = save(tmp_path / "packed", model)
    reports = []
    for name, folder in (("dense", files["dense"]), ("packed", packed)):
        reports.append(tmp_path / f"{name}.json")
        options = ["--text", files["in.txt"], "--no-latency", "--out", reports[-1], *FAST]
        done = invoke("eval", folder, *options)
        assert done.exit_code == 0, done.output
    assert f"packed, {kept:.1%} of the block weights kept" in done.output
    done = invoke("plot", *reports, "--out", tmp_path / "t.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    done = invoke("plot", *reports, "--out", tmp_path)
    assert done.exit_code == 1 and "is a folder: name the file to write" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "none.txt"], "error: none.txt does not exist"),
        (["--stride", "16"], "error: stride must lie in 1..15"),
        (["--against", "none.json"], "No such file"),
        (["--out", "r.json", "--against", "./r.json"], "--out would overwrite r.json"),
        (["--out", "q.jsonl", "--choices", "./q.jsonl"], "--out would overwrite q.jsonl"),
        (["--max-accuracy-drop", "-1"], "error: accuracy_drop must be >= 0"),
        (["--dtype", "int8"], "error: dtype must be one of"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(files, arguments, message):
    done = invoke("eval", files["dense"], *FAST, *arguments)
    assert done.exit_code == 1
    assert message in done.output and "Traceback" not in done.output


def test_a_folder_in_the_place_of_the_report_is_refused_first(files, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "reports").mkdir()
    done = invoke("eval", files["dense"], *FAST, "--out", tmp_path / "reports")
    assert done.exit_code == 1 and "reports is a folder: name the file to write" in done.output
    assert not list(tmp_path.glob("*.resume"))
