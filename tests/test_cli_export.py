"""gatepack export on the command line: what it writes, prints, refuses and plans."""

import json

import pytest
import torch
import transformers
from bpe import byte_tokenizer
from checkpoints import write_documents
from letters import letter_tokenizer
from packed import EVEN, UNEVEN, modules_cache, packed_model  # noqa: F401
from tiny import tiny_model
from typer.testing import CliRunner

import gatepack as gp
from gatepack.cli import app

WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}
FAST = ["--window", "16", "--windows", "2", "--prompt-tokens", "8", "--new-tokens", "2"]


@pytest.fixture
def text(tmp_path):
    return ["--text", write_documents(tmp_path / "text.jsonl")]


def save(folder, model):
    gp.save_pretrained(model, folder, letter_tokenizer())
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", *(str(each) for each in arguments)], env=WIDE)


def test_writes_prints_and_can_be_loaded(tmp_path, text):
    folder, out = save(tmp_path / "packed", packed_model(**EVEN)), tmp_path / "out"
    done = invoke(folder, *text, *FAST, "--out", out, "--base", "owner/model", "--data", "d")
    assert done.exit_code == 0, done.output
    assert "LlamaForCausalLM as uniform" in done.output
    assert "AutoModelForCausalLM" in done.output and "logits differ by at most" in done.output
    transformers.AutoModelForCausalLM.from_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(out)
    card = (out / "README.md").read_text()
    for line in (
        "| prefill, tokens/s |",
        "- pruned or trained on: d",
        "on 2 x 16 tokens",
        "# owner/model, packed",
    ):
        assert line in card


@pytest.mark.usefixtures("modules_cache")
def test_a_gated_model_is_packed_and_the_log_is_json(tmp_path, text):
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(target=0.5, noise=0.0))
    gates.close("model.layers.0.mlp:channels", [0, 1, 2])
    folder, out = save(tmp_path / "gated", model), tmp_path / "out"
    done = invoke(folder, *text, *FAST, "--out", out, "--format", "hf", "--no-speed", "--log=json")
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    report = events[-1]["result"]
    assert report["parity"]["max_abs_difference"] == 0
    assert report["model"]["widths"]["channels"] == [37, 40]


def test_dry_run_writes_nothing(tmp_path, text):
    model, folder = packed_model(**EVEN, vocab_size=300), tmp_path / "packed"
    gp.save_pretrained(model, folder, byte_tokenizer())
    for arguments, size in ((["--format", "uniform"], 4), (["--format", "gguf"], 34 / 32)):
        if size != 4:
            pytest.importorskip("gguf")
            arguments += ["--dtype", "q8_0"]
        options = [*text, *FAST, *arguments, "--out", tmp_path / "out", "--dry-run"]
        done = invoke(folder, *options)
        assert done.exit_code == 0, done.output
        assert "24, 24" in done.output and "seconds of timing" in done.output
        done = invoke(folder, *options, "--log", "json")
        plan = json.loads(done.stdout.splitlines()[-1])["result"]
        assert plan["bytes"] == round(size * plan["model"]["parameters"])
        assert plan["seconds"]["comparing"] > 0 and not (tmp_path / "out").exists()


def test_dtype_makes_a_half_precision_model_fit_for_onnx(tmp_path, text):
    pytest.importorskip("onnxruntime")
    folder = save(tmp_path / "packed", packed_model(**EVEN).to(torch.bfloat16))
    options = [*text, *FAST, "--format", "onnx", "--no-speed", "--out", tmp_path / "out"]
    refused = invoke(folder, *options)
    assert refused.exit_code == 1 and "pass dtype='float32'" in refused.output
    done = invoke(folder, *options, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format", "uniform"], "needs equally many query heads in every layer"),
        (["--format", "uniform", "--dry-run"], "needs equally many query heads in every layer"),
        (["--format", "decilm"], "format 'decilm'"),
        (["--format", "zip"], "format must be one of uniform, hf, gguf, decilm, onnx, got 'zip'"),
        (["--dtype", "q8_0"], "dtype must be one of"),
        (["--windows", "0"], "windows must be >= 1, got 0"),
    ],
)
def test_refusals(tmp_path, text, arguments, message):
    folder = save(tmp_path / "packed", packed_model(**UNEVEN))
    done = invoke(folder, *text, *FAST, *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()
