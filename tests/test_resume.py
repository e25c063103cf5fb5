"""Commands that are killed half-way and given again: the same result, and no work twice."""

import copy
import importlib
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from bpe import byte_tokenizer
from checkpoints import save_tiny, write_documents
from kills import contents
from letters import letter_tokenizer
from packed import EVEN, packed_model, spoil
from tiny import tiny_model
from typer.testing import CliRunner

import gatepack as gp
from gatepack import bench, evaluation, exporters, files, recipe, timing, training
from gatepack.cli import app
from gatepack.exporters import uniform
from gatepack.files import read_json
from gatepack.resume import STATE, State, fingerprint

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
TRAIN = "--steps 3 --batch-size 2 --window 16 --lora-rank 2 --calibration-batches 2"
TRAIN += " --repair-batches 3 --target 0.7 --width-multiple 8 --eval-windows 2 --learning-rate 1e-3"


@pytest.fixture
def text(tmp_path):
    return str(write_documents(tmp_path / "text.jsonl"))


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process has no other; what was cut off goes on with as many as it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, (done.output, done.exception)


def killed(*arguments):
    """Runs a command in a child that has to be killed before it ends."""
    process = os.fork()
    if process == 0:
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
    monkeypatch.setattr(training.FineTuning, "save_share", math.inf)
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


def test_a_model_that_has_changed_since_is_noticed(tmp_path, text, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    command = ["train", model, "--text", text, *TRAIN.split(), "-q", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        die_at(patch, training.FineTuning, "_train_step", 2)
        killed(*command)
    changed = tiny_model("llama", torch.float32, seed=1)
    changed.save_pretrained(model)
    done = CliRunner().invoke(app, [str(each) for each in command], env={"COLUMNS": "300"})
    assert done.exit_code == 1 and "unfinished run with another model (" in done.output


def test_a_run_with_nothing_finished_does_not_stand_in_the_way(tmp_path):
    State.open(tmp_path, {"train": {"steps": 2}, "text": "a"})
    state = State.open(tmp_path, {"train": {"steps": 3}, "text": "a"})
    assert state.once("base", lambda: 1.5) == 1.5
    with pytest.raises(ValueError, match=r"with another train\.steps \(3, now 4\); pass --restart"):
        State.open(tmp_path, {"train": {"steps": 4}, "text": "a"})


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
    assert (
        done.exit_code == 1
        and "unfinished run with another settings.length (16, now 8)" in done.output
    )
    texts = die_at(monkeypatch, evaluation, "score_text", 99)
    invoke(*command, tmp_path / "r.json")
    assert texts == []
    whole, resumed = (json.loads((tmp_path / n).read_text()) for n in ("whole.json", "r.json"))
    assert resumed["entries"] == whole["entries"]
    assert not (tmp_path / f"r.json{STATE}").exists()


def events(monkeypatch, *places):
    """Notes the calls of owner.name; returns the list of their names."""
    noted = []
    for owner, name in places:
        original = getattr(owner, name)

        def noting(*args, original=original, name=name, **kwargs):
            noted.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)
    return noted


@pytest.fixture
def steady_clock(monkeypatch):
    """Every repeat takes as long as it has a number, so that two runs can be compared."""

    def run(runner, prompts, new_tokens):
        repeat = len(runner.records) + 1
        return 0.5 * repeat, 0.25 * repeat

    monkeypatch.setattr(timing._Runner, "run", run)
    monkeypatch.setattr(timing, "WARMUP_SECONDS", -1.0)


def without(report, *names):
    return {name: value for name, value in report.items() if name not in names}


@pytest.mark.usefixtures("steady_clock")
def test_bench(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    command = ["bench", model, "--dense", model, "--prompt-tokens", 8, "--new-tokens", 2, "-q"]
    command += ["--repeats", 4, "--device", "cpu", "--out"]
    invoke(*command, tmp_path / "whole")
    out = tmp_path / "out"
    for done in (1, 2, 3):  # within the second repeat of each process
        with monkeypatch.context() as patch:
            die_at(patch, timing._Runner, "timed", 3)
            killed(*command, out)
        assert len(read_json(out / STATE / "results.json")) == done
    refused = CliRunner().invoke(app, [str(each) for each in (*command, out, "--repeats", 2)])
    assert (
        refused.exit_code == 1
        and "unfinished run with another settings.repeats (4, now 2)" in refused.output
    )
    with monkeypatch.context() as patch:
        die_at(patch, bench, "page", 1)
        killed(*command, out)
    noted = events(monkeypatch, (timing._Runner, "timed"), (timing, "_warm_up"))
    invoke(*command, out)
    assert noted == []
    whole, resumed = (read_json(path / "bench.json") for path in (tmp_path / "whole", out))
    assert without(resumed, "settings") == without(whole, "settings")
    assert sorted(path.name for path in out.iterdir()) == ["bench.html", "bench.json", "bench.png"]
    with monkeypatch.context() as patch:
        die_at(patch, timing._Runner, "timed", 3)
        killed(*command, out)
    noted.clear()
    invoke(*command, out, "--restart")
    assert noted.count("timed") == 2 * 4


def save_gated(folder):
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(target=0.5, noise=0.0))
    gates.close("model.layers.0.mlp:channels", [0, 1])
    gates.close("model.layers.1.mlp:channels", [3])
    gp.save_pretrained(model, folder, letter_tokenizer())
    return folder


def test_pack(tmp_path, text, monkeypatch):
    gated, out = save_gated(tmp_path / "gated"), tmp_path / "out"
    command = ["pack", gated, "--text", text, "--window", 16, "--windows", 3, "-q", "--out"]
    invoke(*command, tmp_path / "whole")
    # Within the first score, the second, before it is written, and after that.
    for name, call in (("score", 1), ("score", 2), ("saving", 1), ("check_reload", 1)):
        with monkeypatch.context() as patch:
            die_at(patch, recipe, name, call)
            killed(*command, out)
        assert not (out / "config.json").exists()
    noted = events(monkeypatch, (recipe, "score"))
    invoke(*command, out)
    assert noted == []
    whole, resumed = (read_json(path / "pack.json") for path in (tmp_path / "whole", out))
    assert without(resumed, "settings") == without(whole, "settings")
    assert files_of(out) == files_of(tmp_path / "whole")


def files_of(folder):
    """name -> bytes, or those of the tensors; without the report, which names its folder."""
    paths = (path for path in folder.iterdir() if path.name != "pack.json")
    return {path.name: contents(path) for path in paths if path.is_file()}


def test_models_of_equal_sums_are_told_apart():
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(noise=0.0))
    digests = set()
    for channel in (0, 1):
        gates.close("model.layers.0.mlp:channels", [channel])
        digests.add(fingerprint(model))
        assert fingerprint(model) in digests
        gates.reopen("model.layers.0.mlp:channels", [channel])
    assert len(digests) == 2


@pytest.mark.usefixtures("steady_clock")
@pytest.mark.parametrize("form", ["uniform", "gguf"])
def test_export(tmp_path, text, monkeypatch, form):
    if form == "gguf":
        pytest.importorskip("gguf")
    model, out = packed_model(**EVEN, vocab_size=300), tmp_path / "out"
    gp.save_pretrained(model, tmp_path / "packed", byte_tokenizer())
    command = ["export", tmp_path / "packed", "--text", text, "--window", 16, "--windows", 2, "-q"]
    command += ["--format", form, "--prompt-tokens", 4, "--new-tokens", 2, "--out"]
    invoke(*command, tmp_path / "whole")
    writer = importlib.import_module(f"gatepack.exporters.{form}")
    for owner, name, call in (
        (timing._Runner, "timed", 2),
        (writer, "write", 1),
        (writer, "check", 1),
        (exporters, "write_card", 1),
        (files, "_carry_over", 1),
    ):
        with monkeypatch.context() as patch:
            die_at(patch, owner, name, call)
            killed(*command, out)
        assert not (out / "README.md").exists()
    noted = events(monkeypatch, (timing._Runner, "timed"), (writer, "write"), (writer, "check"))
    invoke(*command, out)
    assert noted == []
    assert files_of(out) == files_of(tmp_path / "whole")
    assert list(tmp_path.rglob(".*")) == []


SMALL = ["--window", 16, "--windows", 2, "--no-speed"]


def test_export_writes_again_what_was_changed_since(tmp_path, text, monkeypatch):
    out = tmp_path / "out"
    command = ["export", save_tiny(tmp_path / "tiny"), "--text", text, *SMALL, "-q", "--out", out]
    with monkeypatch.context() as patch:
        die_at(patch, exporters, "write_card", 1)
        killed(*command)
    kept = out / STATE / "files" / "config.json"
    kept.write_text(kept.read_text() + " ")
    noted = events(monkeypatch, (uniform, "write"), (uniform, "check"))
    invoke(*command)
    assert noted == ["write"]  # to the same bytes, which have been compared


def test_export_of_a_tokenizer_with_a_subfolder(tmp_path, text, monkeypatch):
    """transformers writes each of several chat templates to a file in one."""
    model, tokenizer = packed_model(**EVEN, vocab_size=300), byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "x{{ messages }}"}
    gp.save_pretrained(model, tmp_path / "packed", tokenizer)
    out, rag = tmp_path / "out", "additional_chat_templates/rag.jinja"
    command = ["export", tmp_path / "packed", "--text", text, *SMALL, "-q", "--out", out]
    with monkeypatch.context() as patch:
        die_at(patch, exporters, "write_card", 1)
        killed(*command)
    kept = out / STATE / "files" / rag
    noted = events(monkeypatch, (uniform, "write"))
    kept.write_text("changed")
    invoke(*command)
    assert noted == ["write"] and (out / rag).read_text() == "x{{ messages }}"
    report = gp.export(model, tmp_path / "again", tokenizer=tokenizer)
    assert report["files"][rag] == len("x{{ messages }}")
    assert "additional_chat_templates" not in report["files"]


def test_an_export_that_is_refused_keeps_nothing(tmp_path, text, monkeypatch):
    out, write = tmp_path / "out", uniform.write

    def wrong(source, folder):
        return write(replace(source, model=spoil(copy.deepcopy(source.model))), folder)

    monkeypatch.setattr(uniform, "write", wrong)
    command = ["export", save_tiny(tmp_path / "tiny"), "--text", text, *SMALL, "--out", out]
    done = CliRunner().invoke(app, [str(each) for each in command])
    assert done.exit_code == 1 and "gives logits that differ" in done.output
    assert not out.exists()
