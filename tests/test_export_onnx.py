"""export(format="onnx"): onnxruntime gives the packed model's logits, for any batch and length."""

import pytest
import torch
from packed import UNEVEN, packed_model
from tiny import token_ids

import gatepack as gp

pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "opt"])
def test_any_batch_and_length(tmp_path, model_type):
    model = packed_model(model_type, **UNEVEN)
    report = gp.export(model, tmp_path / "m", "onnx")
    assert report["parity"]["max_abs_difference"] <= report["parity"]["bound"]
    session = onnxruntime.InferenceSession(tmp_path / "m" / "model.onnx")
    for shape in ((1, 3), (3, 17)):
        ids = token_ids(*shape)
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            expected = model(ids).logits
        assert (torch.from_numpy(found) - expected).abs().max() <= report["parity"]["bound"]


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
