"""The model card of every format: what was removed, from what, on which data, parity and speed."""

import importlib.util

import pytest
from bpe import byte_tokenizer
from packed import modules_cache, packed_model  # noqa: F401

import gatepack as gp

SIZES = {"closed": ([1, 4], [0, 5]), "widths": (256, 256), "intermediate_size": 512}
CONSUMERS = {
    "uniform": "transformers",
    "hf": "transformers",
    "decilm": "transformers",
    "gguf": "llama.cpp",
    "onnx": "onnxruntime",
}
NEEDS = {"gguf": "gguf", "onnx": "onnxscript"}


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("form", CONSUMERS)
def test_says_what_was_removed_and_what_was_measured(tmp_path, form):
    if form in NEEDS:
        pytest.importorskip(NEEDS[form])
    model = packed_model(**SIZES, vocab_size=300)
    speed = gp.measure(model, prompt_tokens=4, new_tokens=2, repeats=1)
    facts = {"base": "owner/model", "data": "letters, 18 documents", "speed": speed}
    report = gp.export(model, tmp_path / "m", form, tokenizer=byte_tokenizer(), **facts)
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    for line in (
        "- from: owner/model",
        "- pruned or trained on: letters, 18 documents",
        "of the weights of the blocks' linears",
        "| 0 | 4 of 6 | 2 of 2 | 256 of 512 |",
        "| prefill, tokens/s |",
        speed.conditions(),
        *report["notes"],
    ):
        assert line in card
    parity = report["parity"]
    if form == "gguf" and importlib.util.find_spec("llama_cpp") is None:
        assert "Not run: it needs llama-cpp-python" in card
        assert f"weights as stored, in torch {parity['perplexity']['stored']:.4f}" in card
    else:
        assert f"Loaded and run by {CONSUMERS[form]}" in card
        assert f"- logits differ by at most {parity['max_abs_difference']:.3g}" in card
        assert f"- perplexity {parity['perplexity']['export']:.4f}" in card
