"""from_pretrained with options of transformers, on shards, under adapters, and by way of a Hub."""

import json
import os

import pytest
import torch
import transformers
from packed import UNEVEN, modules_cache, packed_model  # noqa: F401
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.checkpoint import write_manifest


@pytest.fixture(scope="module")
def model():
    return packed_model(**UNEVEN)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "m"
    model.save_pretrained(folder, max_shard_size="20KB")
    write_manifest(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@torch.no_grad()
def logits_of(model):
    return model.eval()(token_ids()).logits


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"torch_dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": {"": "cpu"}, "dtype": "auto"}, torch.float32),
        ({"attn_implementation": "eager"}, torch.float32),
        ({"low_cpu_mem_usage": True}, torch.float32),
    ],
)
def test_options_on_shards(folder, model, options, dtype):
    loaded = gp.from_pretrained(folder, **options)
    assert loaded.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_auto_dtype_is_that_of_the_checkpoint(folder, tmp_path):
    half = gp.from_pretrained(folder, dtype=torch.bfloat16)
    gp.save_pretrained(half, tmp_path / "m")
    loaded = gp.from_pretrained(tmp_path / "m", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits_of(loaded), logits_of(half))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("state", ["packed", "gated"])
def test_generates(tmp_path, folder, cache, state):
    if state == "gated":
        gated = tiny_model("llama", torch.float32)
        gates = gp.attach(gated, gp.GateConfig(noise=0.0, width_multiple=1))
        gates.close("model.layers.0.mlp:channels", [1, 5])
        gp.save_pretrained(gated, folder := tmp_path / "m")
    loaded = gp.from_pretrained(folder).eval()
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 9)}
    expected = loaded.generate(token_ids(), use_cache=False, **arguments)
    found = loaded.generate(token_ids(), cache_implementation=cache, **arguments)
    assert torch.equal(found, expected)


def test_compiles_without_a_break(folder, model):
    compiled = torch.compile(gp.from_pretrained(folder).eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(token_ids(), use_cache=False).logits
    torch.testing.assert_close(found, logits_of(model))


def test_adapters_train_on_top_and_load_again(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(gp.from_pretrained(folder), config)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        wrapped(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(gp.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(wrapped))


def test_a_classifier_loads_as_one(tmp_path):
    model = packed_model("bert", **UNEVEN)
    gp.export(model, tmp_path / "m", "hf")
    loaded = gp.from_pretrained(tmp_path / "m")
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert torch.equal(logits_of(loaded), logits_of(model))


class Hub:
    """The Hub's cache on this disk: blobs, a snapshot of links to them, and a name for it."""

    def __init__(self, cache):
        self.cache = cache
        self.repository = cache / "models--owner--small"

    def push(self, repo_id, operations, **_):
        assert repo_id == "owner/small"
        snapshot = self.repository / "snapshots" / ("0" * 40)
        (self.repository / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True, exist_ok=True)
        for number, operation in enumerate(operations):
            blob = self.repository / "blobs" / str(number)
            with operation.as_file() as handle:
                blob.write_bytes(handle.read())
            os.symlink(os.path.relpath(blob, snapshot), snapshot / operation.path_in_repo)
        (self.repository / "refs").mkdir()
        (self.repository / "refs" / "main").write_text("0" * 40)
        return snapshot


@pytest.mark.usefixtures("modules_cache")
def test_pushed_to_a_hub_and_pulled(model, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd

    gp.export(model, tmp_path / "m", "hf")
    hub = Hub(tmp_path / "cache")
    files = sorted((tmp_path / "m").iterdir())
    hub.push("owner/small", [CommitOperationAdd(path.name, str(path)) for path in files])
    options = {"cache_dir": hub.cache, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        "owner/small", trust_remote_code=True, **options
    )
    assert torch.equal(logits_of(loaded), logits_of(model))
    snapshot = huggingface_hub.snapshot_download("owner/small", **options)
    assert torch.equal(logits_of(gp.from_pretrained(snapshot)), logits_of(model))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["gatepack"] == loaded.config.gatepack
