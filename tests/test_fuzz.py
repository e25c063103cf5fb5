"""What gatepack reads from outside, damaged at random: a ValueError that says where, or a result;
never another exception, and nothing on the disk changes.

`make test-slow` runs many more examples: --hypothesis-profile thorough.
"""

import json
import shutil
import struct

import pytest
import torch
from checkpoints import save_tiny
from damage import JSON, damaged_bytes, damaged_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import UNEVEN, packed_model
from tiny import tiny_model, token_ids
from transformers.utils import logging
from typer.testing import CliRunner

import gatepack as gp
from gatepack import checkpoint
from gatepack.cli import app
from gatepack.data import load_documents
from gatepack.models import load_model
from gatepack.plots import draw_tradeoff
from gatepack.regression import FORMAT_VERSION, Bounds, compare, load_report
from gatepack.repack import PackPlan, Part
from gatepack.resume import State
from gatepack.scoring import load_questions
from gatepack.training import FineTuning, TrainConfig, add_lora

WEIGHTS = "model.safetensors"
fuzz = settings(
    max_examples=max(1, settings.default.max_examples // 4),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def refused(read, *where) -> bool:
    """Whether read raised a ValueError that holds one of `where`; any other error passes."""
    try:
        read()
    except ValueError as error:
        assert any(str(each) in str(error) for each in where), repr(error)
        return True
    return False


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Damaged:
    """A folder in which a file is written anew for each example."""

    def __init__(self, folder):
        self.folder = folder
        self.whole = contents(folder)

    def load(self, name, data, **options):
        """Loads the folder with that file; what is there afterwards is what was there before."""
        (self.folder / name).write_bytes(data)
        before = contents(self.folder)
        try:
            return refused(lambda: gp.from_pretrained(self.folder, **options), self.folder)
        finally:
            assert contents(self.folder) == before
            for path in self.folder.iterdir():
                path.unlink()
            for other, bytes_ in self.whole.items():
                (self.folder / other).write_bytes(bytes_)


@pytest.fixture(scope="module", params=["packed", "gated", "rows and columns"])
def damaged(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    if request.param == "packed":
        model = packed_model(**UNEVEN)
    else:
        model = tiny_model("llama", torch.float32)
        units = ("heads", "channels") if request.param == "gated" else ("rows", "columns")
        gates = gp.attach(model, gp.GateConfig(units=units, noise=0.0, width_multiple=1))
        if request.param != "gated":
            gates.snap()
            gp.pack(model)
    gp.save_pretrained(model, folder)
    return Damaged(folder)


@fuzz
@given(st.data())
def test_config_of_a_checkpoint(damaged, data):
    config = json.loads(damaged.whole["config.json"])
    within = data.draw(st.sampled_from([(), (), ("gatepack",)]))
    text = json.dumps(data.draw(damaged_json(config, within)))
    damaged.load("config.json", text.encode())


@fuzz
@given(st.data())
def test_bytes_of_a_config(damaged, data):
    damaged.load("config.json", data.draw(damaged_bytes(damaged.whole["config.json"])))


@fuzz
@given(st.data())
def test_manifest_of_a_checkpoint(damaged, data):
    manifest = json.loads(damaged.whole[checkpoint.MANIFEST])
    text = json.dumps(data.draw(damaged_json(manifest)))
    damaged.load(checkpoint.MANIFEST, text.encode())


@fuzz
@given(st.data())
def test_header_of_weights(damaged, data):
    whole = damaged.whole[WEIGHTS]
    (size,) = struct.unpack_from("<Q", whole)
    if data.draw(st.booleans()):
        header = data.draw(damaged_json(json.loads(whole[8 : 8 + size])))
        text = json.dumps(header).encode()
        damaged.load(WEIGHTS, struct.pack("<Q", len(text)) + text + whole[8 + size :], verify=False)
    else:
        damaged.load(WEIGHTS, data.draw(damaged_bytes(whole, 8 + size)), verify=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    packed_model(**UNEVEN).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / checkpoint.INDEX).is_file()
    return Damaged(folder)


@fuzz
@given(st.data())
def test_index_of_shards(sharded, data):
    index = json.loads(sharded.whole[checkpoint.INDEX])
    text = json.dumps(data.draw(damaged_json(index)))
    sharded.load(checkpoint.INDEX, text.encode())


CONFIG = gp.GateConfig(units=("heads",), target=0.5, targets=("model.*",)).to_dict()


@fuzz
@given(damaged_json(CONFIG) | JSON)
def test_gate_config(value):
    known = [*CONFIG, "GateConfig"]
    if not refused(lambda: gp.GateConfig.from_dict(value), *known):
        config = gp.GateConfig.from_dict(value)
        assert gp.GateConfig.from_json(config.to_json()) == config
    refused(lambda: gp.GateConfig.from_json(json.dumps(value)), *known)


@fuzz
@given(st.text(max_size=20))
def test_gate_config_of_any_text(text):
    assert refused(lambda: gp.GateConfig.from_json(text), "GateConfig", "fields")


def test_json_that_is_nested_too_deep(tmp_path):
    deep = "[" * 100_000
    for name in ("config.json", "r.json", "t.jsonl"):
        (tmp_path / name).write_text(deep)
    for read in (
        lambda: gp.from_pretrained(tmp_path),
        lambda: load_report(tmp_path / "r.json"),
        lambda: load_documents(tmp_path / "t.jsonl"),
        lambda: gp.GateConfig.from_json(deep),
    ):
        assert refused(read, "nested too deep")


RECORD = PackPlan(
    {
        "w": Part((4, 6), torch.tensor([0, 1, 3]), torch.tensor([5]), row_multiple=2),
        "b": Part((4,), torch.tensor([0, 1, 3])),
    }
).to_dict()


@fuzz
@given(damaged_json(RECORD) | JSON)
def test_plan(record):
    if not refused(lambda: PackPlan.from_dict(record), "version", "parts"):
        plan = PackPlan.from_dict(record)
        assert (
            PackPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()
        )


REPORT = {
    "format": FORMAT_VERSION,
    "model": {"name": "m", "class": "M", "kept_fraction": 0.5, "parameters": 3, "state": "packed"},
    "entries": [
        {
            "kind": "text",
            "name": "a",
            "inputs": {"sha256": "a", "length": 4, "stride": 2},
            "tokens": 5,
            "metrics": {"perplexity": 20.0, "bits_per_byte": 1.0},
        },
        {
            "kind": "task",
            "name": "b",
            "inputs": {"version": 1},
            "metrics": {"acc,none": 0.5},
            "higher_is_better": {"acc,none": True},
        },
        {
            "kind": "latency",
            "name": "random prompts",
            "inputs": {"device": "cpu"},
            "metrics": {"decode_ms_per_token": 2.0},
        },
    ],
}


@fuzz
@given(damaged_json(REPORT))
def test_report(tmp_path, report):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report))
    if not refused(lambda: load_report(path), path):
        found = load_report(path)
        compare(found, REPORT, Bounds())
        compare(REPORT, found, Bounds())


@fuzz
@given(damaged_json(REPORT))
def test_report_that_is_drawn(tmp_path, report):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.json"
    path.write_text(json.dumps(report))
    refused(lambda: draw_tradeoff([load_report(path)], tmp_path / "t.png"), path, "report")


LINES = b'{"text": "gates open"}\n\n{"text": "and close", "n": [1, 2]}\n'
QUESTIONS = b'{"question": "Open?", "choices": ["yes", "no"], "answer": "B"}\n' * 2


@fuzz
@given(damaged_bytes(LINES), damaged_bytes(QUESTIONS))
def test_texts_and_questions(tmp_path, lines, questions):
    for name, data in (("t.jsonl", lines), ("t.txt", lines), ("q.jsonl", questions)):
        path = tmp_path / name
        path.write_bytes(data)
        read = load_questions if name.startswith("q") else load_documents
        refused(lambda read=read, path=path: read(path), path)
        assert path.read_bytes() == data


@fuzz
@given(JSON, JSON)
def test_lines_of_any_json(tmp_path, record, answer):
    question = {"question": "Open?", "choices": ["yes", "no"], "answer": answer}
    path = tmp_path / "t.jsonl"
    for value, read in (
        (record, load_documents),
        (record, load_questions),
        (question, load_questions),
    ):
        path.write_text(json.dumps(value))
        refused(lambda read=read: read(path), path)


OPTIONS = {"target": 0.5, "steps": 3, "text": "none.txt", "equal_layers": True, "out": "o"}


@fuzz
@given(damaged_json(OPTIONS) | JSON)
def test_yaml_of_options(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    try:
        path.write_text(yaml.safe_dump(options, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:
        return
    check_command(path, tmp_path)


@fuzz
@given(damaged_bytes(b"target: 0.5\nsteps: 3\ntext: none.txt\nout: o\n"))
def test_bytes_of_yaml(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_bytes(data)
    check_command(tmp_path / "run.yaml", tmp_path)


def check_command(path, folder):
    """gatepack train refuses with 1 or 2, before any work: its model does not exist."""
    assert sorted(p.name for p in folder.iterdir()) == ["run.yaml"]
    done = CliRunner().invoke(app, ["train", "--config", str(path), str(folder / "no-model")])
    assert done.exit_code in (1, 2), (done.output, done.exception)
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert sorted(p.name for p in folder.iterdir()) == ["run.yaml"]


TINY = TrainConfig(steps=3, batch_size=2, window=9, lora_rank=2, calibration_batches=2)


def resumed(folder) -> FineTuning:
    model = add_lora(tiny_model("llama", torch.float32), TINY)
    gates = gp.GateConfig(noise=0.0, width_multiple=1)
    method = gp.methods.CloseAndRepair(gates, close=0.5, bars=False)
    closing = method.start(model, TINY.steps, [token_ids(4)])
    return FineTuning(model, token_ids(4), TINY, folder, beside=closing)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, the bytes of its run.safetensors)"""
    folder = tmp_path_factory.mktemp("run")
    resumed(folder).run()
    return folder, (folder / "run.safetensors").read_bytes()


@fuzz
@given(st.data())
def test_state_of_a_run(run, data):
    folder, whole = run
    (size,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + size])
    if data.draw(st.booleans()):
        within = data.draw(st.sampled_from([(), ("__metadata__",)]))
        text = json.dumps(data.draw(damaged_json(header, within))).encode()
        damaged = struct.pack("<Q", len(text)) + text + whole[8 + size :]
    else:
        damaged = data.draw(damaged_bytes(whole, 8 + size))
    path = folder / "run.safetensors"
    path.write_bytes(damaged)
    refused(lambda: resumed(folder), path)
    assert path.read_bytes() == damaged


@fuzz
@given(damaged_json({"target": 0.5, "model": "m"}) | JSON, JSON)
def test_state_of_a_command(tmp_path, found, results):
    shutil.rmtree(tmp_path / ".resume", ignore_errors=True)
    state = State.open(tmp_path / ".resume", {"target": 0.5, "model": "m"})
    (state.folder / "results.json").write_text(json.dumps(results))
    refused(lambda: state.once("base", lambda: 1.0), state.folder)
    (state.folder / "settings.json").write_text(json.dumps(found))
    refused(lambda: State.open(state.folder, {"target": 0.5, "model": "m"}), state.folder)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """(path, bytes, where its data begins) of a small GGUF file of transformers' kind."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from bpe import byte_tokenizer

    folder = tmp_path_factory.mktemp("gguf") / "m"
    model = packed_model(vocab_size=300)
    gp.export(model, folder, "gguf", tokenizer=byte_tokenizer(("t", "h")))
    data = (folder / "model.gguf").read_bytes()
    elements = sum(p.numel() for p in model.parameters())
    return folder / "model.gguf", data, len(data) - 4 * elements


@fuzz
@given(st.data())
def test_gguf(gguf_file, data):
    path, whole, head = gguf_file
    damaged = data.draw(damaged_bytes(whole, data.draw(st.sampled_from([32, 600, head]))))
    path.write_bytes(damaged)
    refused(lambda: load_model(path), path)
    assert path.read_bytes() == damaged


def test_gguf_that_is_whole(gguf_file):
    path, whole, _ = gguf_file
    path.write_bytes(whole)
    model, _ = load_model(path)
    assert model.config.num_hidden_layers == 2


@fuzz
@given(st.data())
def test_checkpoint_of_transformers(tmp_path, data):
    folder = tmp_path / "m"
    if not folder.exists():
        save_tiny(folder)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    path = folder / data.draw(st.sampled_from(names))
    whole = path.read_bytes()
    try:
        path.write_text(json.dumps(data.draw(damaged_json(json.loads(whole)))))
        refused(lambda: load_model(folder), folder)
    finally:
        path.write_bytes(whole)
