"""export(format="onnx"): onnxruntime gives the packed model's logits, of texts and of tokens."""

import pytest
import torch
from packed import EVEN, UNEVEN, packed_model, spoil
from tiny import token_ids

import gatepack as gp
from gatepack.exporters import onnx
from gatepack.layers import layers_of
from gatepack.quality import ParityError

pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")

SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        *("qwen3", "gpt2", "opt", "mistral", "gemma2", "granite", "smollm3", "glm", "phi"),
        *("phi3", "gpt_neox", "cohere2", "exaone4"),
    )
]


# Every other layer of this gemma3_text sees a window of 4 tokens.
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", *SLOW])
def test_texts_tokens_and_padding(tmp_path, model_type):
    model = packed_model(model_type, **UNEVEN)
    report = gp.export(model, tmp_path / "m", "onnx")
    bound = report["parity"]["bound"]
    assert report["parity"]["max_abs_difference"] <= bound
    assert report["parity"]["greedy"] == {"same": 5, "prompts": 5, "tokens": 16}
    assert report["notes"] == []
    session = onnx.Session(tmp_path / "m" / "model.onnx", model.config)
    inputs = {each.name: each.shape for each in session.runtime.get_inputs()}
    heads = [layer.kv_heads for layer in layers_of(model)]
    assert inputs["input_ids"] == ["batch", "tokens"]
    for i, count in enumerate(heads):
        for what in ("key", "value"):
            assert inputs[f"past_key_values.{i}.{what}"] == ["batch", count, "past", 8]

    def expected(ids):
        with torch.no_grad():
            return model(ids).logits

    for shape in ((1, 3), (3, 17)):
        ids = token_ids(*shape)
        logits, past = session.run(ids)
        assert (logits - expected(ids)).abs().max() <= bound
        for step in range(2):
            ids = torch.cat([ids, token_ids(shape[0], 1, seed=step)], 1)
            logits, past = session.run(ids[:, -1:], past)
            assert logits.shape[1] == 1
            assert (logits - expected(ids)[:, -1:]).abs().max() <= bound
        assert past["past_key_values.0.key"].shape == (shape[0], heads[0], shape[1] + 2, 8)
    ids = token_ids(2, 6)
    padding = torch.zeros(2, 3, dtype=torch.long)
    feeds = {
        "input_ids": torch.cat([padding, ids], 1),
        "attention_mask": torch.cat([padding, torch.ones_like(ids)], 1),
    }
    found, *_ = session.runtime.run(
        ["logits"], {n: t.numpy() for n, t in feeds.items()} | session._no_past(2)
    )
    assert (torch.from_numpy(found)[:, 3:] - expected(ids)).abs().max() <= bound


def test_a_wrong_file_is_refused(tmp_path, monkeypatch):
    model = packed_model(**EVEN)
    check = onnx.check

    def spoiled(source, folder, windows):
        spoil(source.model, 0.01)
        return check(source, folder, windows)

    monkeypatch.setattr(onnx, "check", spoiled)
    with pytest.raises(ParityError, match="onnxruntime .* gives logits that differ"):
        gp.export(model, tmp_path / "m", "onnx")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "model_type, dtype, message",
    [
        ("bert", "auto", "cannot hold BertForSequenceClassification: expected a ...ForCausalLM"),
        ("llama", "bfloat16", "needs weights in float32, got torch.bfloat16"),
    ],
)
def test_refusals(tmp_path, model_type, dtype, message):
    with pytest.raises(ValueError, match=message):
        gp.export(packed_model(model_type, **UNEVEN), tmp_path / "m", "onnx", dtype=dtype)
