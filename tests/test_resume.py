"""Commands that are killed half-way and given again: the same result, and no work twice."""

import json
import os
import signal

import pytest
import torch
from checkpoints import save_tiny, write_documents
from typer.testing import CliRunner

import gatepack as gp
from gatepack import evaluation, exporters, training
from gatepack.cli import app
from gatepack.resume import STATE

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
TRAIN = "--steps 3 --batch-size 2 --window 16 --lora-rank 2 --calibration-batches 2 --target 0.7"
TRAIN += " --width-multiple 8 --eval-windows 2 --learning-rate 1e-3"


@pytest.fixture
def text(tmp_path):
    return str(write_documents(tmp_path / "text.jsonl"))


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)


def killed(*arguments):
    """Runs a command in a child that has to be killed before it ends."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        CliRunner().invoke(app, [str(each) for each in arguments])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def die_at(monkeypatch, owner, name, call):
    """Kills the process at the call-th call of owner.name; counts the calls."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
    return calls


def test_train(tmp_path, text, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    command = ["train", model, "--text", text, *TRAIN.split(), "-q", "--out"]
    invoke(*command, tmp_path / "whole")
    monkeypatch.setattr(training.FineTuning, "save_every", 0.0)
    with monkeypatch.context() as patch:
        die_at(patch, training.FineTuning, "_train_step", 3)
        killed(*command, tmp_path / "out")
    assert (tmp_path / "out" / STATE / "gated" / "run.safetensors").is_file()
    assert not (tmp_path / "out" / "config.json").exists()
    steps = die_at(monkeypatch, training.FineTuning, "_train_step", 99)
    invoke(*command, tmp_path / "out")
    assert len(steps) == 1
    whole, resumed = (
        json.loads((tmp_path / name / "train.json").read_text()) for name in ("whole", "out")
    )
    assert resumed["losses"] == whole["losses"] and resumed["perplexity"] == whole["perplexity"]
    states = [gp.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_eval(tmp_path, text, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    (tmp_path / "more.txt").write_text("Gates open and close. " * 9)
    (tmp_path / "q.jsonl").write_text('{"prompt": "Open?", "choices": ["yes", "no"], "answer": 1}')
    command = ["eval", model, "--text", text, "--text", tmp_path / "more.txt", "--no-latency", "-q"]
    command += ["--choices", tmp_path / "q.jsonl", "--length", 16, "--windows", 4, "--out"]
    invoke(*command, tmp_path / "whole.json")
    with monkeypatch.context() as patch:
        die_at(patch, evaluation, "score_questions", 1)
        killed(*command, tmp_path / "r.json")
    assert (tmp_path / f"r.json{STATE}").is_dir() and not (tmp_path / "r.json").exists()
    done = CliRunner().invoke(app, [*map(str, command), str(tmp_path / "r.json"), "--length", "8"])
    assert done.exit_code == 1 and "unfinished run with another settings" in done.output
    texts = die_at(monkeypatch, evaluation, "score_text", 99)
    invoke(*command, tmp_path / "r.json")
    assert texts == []
    whole, resumed = (json.loads((tmp_path / n).read_text()) for n in ("whole.json", "r.json"))
    assert resumed["entries"] == whole["entries"]
    assert not (tmp_path / f"r.json{STATE}").exists()


def test_export(tmp_path, text, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    command = ["export", model, "--text", text, "--window", 16, "--windows", 2, "--no-speed", "-q"]
    command += ["--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        die_at(patch, exporters, "write_card", 1)
        killed(*command)
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    invoke(*command)
    assert (tmp_path / "out" / "README.md").is_file()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
