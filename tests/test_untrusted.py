"""Folders from strangers: none of their code runs, no pickle is read, and refusals say where."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from checkpoints import save_tiny, write_documents
from letters import letter_tokenizer
from packed import UNEVEN, packed_model
from typer.testing import CliRunner

import gatepack as gp
from gatepack.cli import app
from gatepack.models import load_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A file that exists once any code of a folder has run; asking the user counts as that."""
    path = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: path.write_text("asked"))
    yield path
    assert not path.exists(), path.read_text()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).write_text, (self.path, "unpickled"))


def edit(path, **values):
    record = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**record, **values}))


@pytest.fixture
def ours(tmp_path):
    gp.save_pretrained(packed_model(**UNEVEN), tmp_path / "m", letter_tokenizer())
    return tmp_path / "m"


@pytest.fixture
def plain(tmp_path):
    return save_tiny(tmp_path / "plain")


def put_code(folder, ran, **config):
    """Code of the folder for every class that transformers looks up in one."""
    code = f"open({str(ran)!r}, 'w').write('imported')\nclass Evil: pass\n"
    for name in ("evil.py", "custom_generate/generate.py", "modeling_gatepack.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    edit(folder / "config.json", auto_map=dict.fromkeys(names, "evil.Evil"), **config)
    tokenizer = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit(folder / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Evil")


def put_pickle(path, ran):
    path.write_bytes(pickle.dumps(Payload(ran)))


class TestCode:
    def test_of_a_checkpoint_of_ours(self, ours, ran):
        put_code(ours, ran)
        gp.from_pretrained(ours)
        with pytest.raises(ValueError, match=str(ours)):
            load_model(ours)  # which needs its tokenizer

    @pytest.mark.parametrize("load", [gp.from_pretrained, load_model])
    @pytest.mark.parametrize("model_type", ["evil", "llama", None])
    def test_of_classes_that_transformers_lacks(self, ours, ran, load, model_type):
        put_code(ours, ran, model_type=model_type, architectures=["Evil"])
        with pytest.raises(ValueError, match=str(ours)):
            load(ours)

    def test_of_a_plain_checkpoint(self, plain, ran):
        put_code(plain, ran, model_type="evil")
        with pytest.raises(ValueError, match=str(plain)):
            load_model(plain)

    @pytest.mark.parametrize("command", ["pack", "bench", "export", "eval", "train"])
    def test_of_a_model_on_the_command_line(self, plain, ran, command, tmp_path):
        put_code(plain, ran, model_type="evil")
        text = ["--text", str(write_documents(tmp_path / "text.jsonl"))]
        options = [] if command == "bench" else text
        done = CliRunner().invoke(
            app, [command, str(plain), *options, "--out", str(tmp_path / "out")]
        )
        assert done.exit_code == 1 and str(plain) in done.output, done.output

    def test_of_the_hub_for_attention(self, ours, ran):
        edit(ours / "config.json", attn_implementation="someone/attention")
        with pytest.raises(ValueError, match="attn_implementation is 'someone/attention', code of"):
            gp.from_pretrained(ours)


class TestPickles:
    @pytest.fixture(autouse=True)
    def no_pickle(self, monkeypatch):
        for name in ("load", "loads"):
            monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))

    @pytest.mark.parametrize("load", [gp.from_pretrained, load_model])
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
    @pytest.mark.parametrize("kind", ["ours", "plain"])
    def test_in_the_place_of_weights(self, request, ran, load, name, kind):
        folder = request.getfixturevalue(kind)
        (folder / WEIGHTS).unlink()
        (folder / "gatepack.json").unlink(missing_ok=True)
        put_pickle(folder / name, ran)
        if (load, kind) == (gp.from_pretrained, "plain"):
            return  # refused before, as it has no record
        with pytest.raises(ValueError, match=f"no safetensors file, only {name}, and pickles are"):
            load(folder)

    @pytest.mark.parametrize("load", [gp.from_pretrained, load_model])
    @pytest.mark.parametrize("name", ["evil.bin", "../evil.safetensors", "/etc/passwd", 3, None])
    def test_that_an_index_names(self, ours, ran, load, name):
        (ours / "gatepack.json").unlink()
        shutil.move(ours / WEIGHTS, ours.parent / "evil.safetensors")
        put_pickle(ours / "evil.bin", ran)
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (ours / INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match="'lm_head.weight' must be in a safetensors file of"):
            load(ours)

    @pytest.mark.parametrize("kind", ["ours", "plain"])
    def test_of_an_adapter(self, request, ran, kind):
        folder = request.getfixturevalue(kind)
        put_pickle(folder / "adapter_model.bin", ran)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        with pytest.raises(ValueError, match="has an adapter_config.json beside the model"):
            load_model(folder)

    def test_named_safetensors(self, ours, ran):
        (ours / "gatepack.json").unlink()
        put_pickle(ours / WEIGHTS, ran)
        with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be read"):
            gp.from_pretrained(ours)

    def test_beside_weights_are_left_alone(self, ours, ran):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            put_pickle(ours / name, ran)
        gp.from_pretrained(ours)


class TestSizes:
    """Numbers for which a loop or an allocation would take forever."""

    @pytest.mark.parametrize(
        "field, value",
        [
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", "2"),
            ("num_labels", 10**9),
            ("vocab_size", 10**15),
            ("hidden_size", 10**8),
            ("intermediate_size", 10**12),
            ("num_attention_heads", 10**9),
            ("head_dim", 2 * 10**9),
        ],
    )
    def test_of_a_config(self, ours, field, value):
        edit(ours / "config.json", **{field: value})
        with pytest.raises(ValueError, match=str(ours)):
            gp.from_pretrained(ours)

    def test_of_a_gguf_file(self, tmp_path):
        pytest.importorskip("gguf")
        pytest.importorskip("accelerate")

        def text(value):
            return struct.pack("<Q", len(value)) + value

        array = text(b"tokens") + struct.pack("<IIQ", 9, 5, 2**60)
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
        with pytest.raises(ValueError, match="key 'tokens' takes .* bytes from byte"):
            load_model(tmp_path / "a.gguf")
        layers = text(b"llama.block_count") + struct.pack("<II", 4, 10**9)
        family = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
        data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + family + layers
        (tmp_path / "a.gguf").write_bytes(data + bytes(32))
        with pytest.raises(ValueError, match="llama.block_count is 1000000000, which does not fit"):
            load_model(tmp_path / "a.gguf")
