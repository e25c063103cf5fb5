"""export(format="gguf"): what the file says, checked with the gguf package, and what llama.cpp
makes of it where llama-cpp-python is installed."""

import pytest
import torch
from bpe import byte_tokenizer, pieces_tokenizer
from packed import EVEN, UNEVEN, packed_model, spoil
from tokenizers import models, normalizers, pre_tokenizers

import gatepack as gp
from gatepack.exporters import gguf as gguf_exporter
from gatepack.exporters import parity
from gatepack.exporters.gguf_check import read_back
from gatepack.exporters.source import read_model
from gatepack.quality import ParityError
from gatepack.rounding import LEEWAY

gguf = pytest.importorskip("gguf")
VOCABULARY = 300
PROSE = ("the gate is open", "a word 42 and more", "héllo\n  wörld")


MERGES = (("t", "h"), ("th", "e"), ("Ġ", "o"), ("o", "r"), ("4", "2"))


def exported(folder, model_type="llama", sizes=UNEVEN, dtype="auto", **overrides):
    model = packed_model(model_type, **sizes, vocab_size=VOCABULARY, **overrides)
    tokenizer = byte_tokenizer(*MERGES)
    report = gp.export(model, folder, "gguf", tokenizer=tokenizer, dtype=dtype)
    return model, tokenizer, report


def read(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def test_arrays_of_uneven_layers(tmp_path):
    model, _, _ = exported(tmp_path / "m")
    values, tensors = read(tmp_path / "m")
    assert values["general.architecture"] == "deci"
    assert values["deci.attention.head_count"] == [6, 3]
    assert values["deci.attention.head_count_kv"] == [2, 1]
    assert values["deci.feed_forward_length"] == [16, 24]
    assert values["deci.attention.key_length"] == values["deci.rope.dimension_count"] == 8
    layer = model.model.layers[1]
    pairs = layer.self_attn.q_proj.weight.detach().reshape(3, 2, 4, 48).transpose(1, 2)
    found = torch.from_numpy(tensors["blk.1.attn_q.weight"].data.copy())
    assert torch.equal(found, pairs.reshape(24, 48))
    found = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy())
    assert torch.equal(found, layer.mlp.down_proj.weight.detach())
    assert len(tensors) == len(model.state_dict())


def test_even_layers_are_a_plain_llama(tmp_path):
    exported(tmp_path / "m", sizes=EVEN, tie_word_embeddings=True)
    values, tensors = read(tmp_path / "m")
    assert values["general.architecture"] == "llama"
    assert values["llama.attention.head_count"] == 4
    assert values["llama.feed_forward_length"] == 24
    assert "output.weight" not in tensors


def test_tokenizer(tmp_path):
    _, tokenizer, _ = exported(tmp_path / "m")
    values, _ = read(tmp_path / "m")
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCABULARY
    assert {token: tokens.index(token) for token in tokenizer.get_vocab()} == tokenizer.get_vocab()
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.eos_token_id"] == 0
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds[0] == gguf.TokenType.CONTROL and kinds[1] == gguf.TokenType.NORMAL
    assert kinds[-1] == gguf.TokenType.UNUSED


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_tensors_are_read_back_and_a_changed_one_is_named(tmp_path, dtype):
    sizes = {"closed": ([1, 4], [1, 4]), "widths": (32, 32)}
    model, tokenizer, report = exported(
        tmp_path / "m", sizes=sizes, dtype=dtype, hidden_size=64, num_attention_heads=8
    )
    found = report["parity"]["perplexity"]
    assert found["stored"] == pytest.approx(found["model"], rel=parity.PERPLEXITY_BOUND - 1)
    source = read_model(model, tokenizer, None)
    places = gguf_exporter._places(source)
    stored, kinds = read_back(source, tmp_path / "m" / "model.gguf", places)
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    assert kinds["model.layers.0.mlp.up_proj"] == names[dtype]
    if dtype == "float32":
        for name, weight in stored.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name])
    spoil(source.model, 0.05)
    with pytest.raises(ParityError, match="model.gguf: blk.0.ffn_down.weight is not model.layers"):
        read_back(source, tmp_path / "m" / "model.gguf", places)


@pytest.mark.parametrize(
    "dtype, kind", [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32"), ("q8_0", "Q8_0")]
)
def test_dtypes(tmp_path, dtype, kind):
    sizes = {"closed": ([1, 4], [1, 4]), "widths": (32, 32)}
    _, _, report = exported(
        tmp_path / "m", sizes=sizes, dtype=dtype, hidden_size=64, num_attention_heads=8
    )
    values, tensors = read(tmp_path / "m")
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind
    assert tensors["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    odd = [name for name, each in tensors.items() if each.tensor_type.name not in (kind, "F32")]
    assert odd == ([f"blk.{i}.attn_output.weight" for i in (0, 1)] if dtype == "q8_0" else [])
    assert bool(report["notes"]) == bool(odd)
    version = gguf.GGML_QUANT_VERSION if dtype == "q8_0" else None
    assert values.get("general.quantization_version") == version


@pytest.mark.parametrize(
    "model_type, overrides, message",
    [
        (
            "qwen3",
            {},
            "query heads in every layer of a qwen3, got 3 .* or export with format='hf',",
        ),
        ("gpt2", {}, "model_type 'gpt2': expected one of llama, mistral, qwen2, qwen3"),
        ("mistral", {"sliding_window": 16}, "sliding_window 16"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu': expected 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_refusals(tmp_path, model_type, overrides, message):
    with pytest.raises(ValueError, match=message):
        exported(tmp_path / "m", model_type, **{"sliding_window": None, **overrides})
    assert not (tmp_path / "m").exists()


def test_tokenizers_that_are_refused(tmp_path):
    model = packed_model(**UNEVEN, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="pass tokenizer="):
        gp.export(model, tmp_path / "m", "gguf")
    odd = byte_tokenizer(split=pre_tokenizers.Punctuation())
    with pytest.raises(ValueError, match="has no name for a tokenizer that splits text"):
        gp.export(model, tmp_path / "m", "gguf", tokenizer=odd)
    small = packed_model(**UNEVEN, vocab_size=100)
    with pytest.raises(ValueError, match="the model's embedding has 100 rows"):
        gp.export(small, tmp_path / "m", "gguf", tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    "normalizer, prefix, message",
    [
        (None, False, None),
        (normalizers.NFC(), False, None),
        (normalizers.Lowercase(), False, "prepares text by .*Lowercase.*expected no normalizer"),
        (normalizers.Sequence([normalizers.NFC()]), False, None),
        (normalizers.Sequence([normalizers.Strip()]), False, "expected no normalizer, or NFC"),
        (None, True, "puts a space before a text: expected add_prefix_space=False"),
    ],
)
def test_what_byte_level_tokenizers_do_to_a_text_first(tmp_path, normalizer, prefix, message):
    model, tokenizer = packed_model(**UNEVEN, vocab_size=VOCABULARY), byte_tokenizer(*MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if message is None:
        notes = gp.export(model, tmp_path / "m", "gguf", tokenizer=tokenizer)["notes"]
        assert any("NFC" in note for note in notes) == (normalizer is not None)
        return
    with pytest.raises(ValueError, match=message):
        gp.export(model, tmp_path / "m", "gguf", tokenizer=tokenizer)
    assert not (tmp_path / "m").exists()


WORDS = ("the", "gate", "is", "open", "gates", "and", "word", "wörld")


def test_pieces_have_scores_and_bytes(tmp_path):
    model = packed_model(**UNEVEN, vocab_size=400)
    tokenizer = pieces_tokenizer(*WORDS)
    gp.export(model, tmp_path / "m", "gguf", tokenizer=tokenizer)
    values, _ = read(tmp_path / "m")
    assert values["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in values
    assert values["tokenizer.ggml.add_space_prefix"] and values["tokenizer.ggml.add_bos_token"]
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    ranked = [scores[tokens.index(piece)] for piece in ("\u2581t", "\u2581th", "\u2581the")]
    assert ranked == sorted(ranked, reverse=True) and ranked[0] > scores[tokens.index("t")]
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[-1] == gguf.TokenType.UNUSED  # unk, bos, eos, byte


def test_pieces_that_are_refused(tmp_path):
    model = packed_model(**UNEVEN, vocab_size=400)

    def refuse(message, tokenizer):
        with pytest.raises(ValueError, match=message):
            gp.export(model, tmp_path / "m", "gguf", tokenizer=tokenizer)

    lower = pieces_tokenizer(*WORDS)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    refuse("has no name for a tokenizer that prepares text by", lower)
    fewer = pieces_tokenizer("ab", "b")
    ids = {token: i for token, i in fewer.get_vocab().items()} | {"ab": 399}
    fewer.backend_tokenizer.model = models.BPE(
        ids, [("\u2581", "ab")], unk_token="<unk>", byte_fallback=True
    )
    refuse("would merge .*, which the tokenizer does not", fewer)
    unigram = pieces_tokenizer(*WORDS)
    unigram.backend_tokenizer.model = models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, True)
    refuse("got Unigram", unigram)


class TestLlamaCpp:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which builds from source")

    @pytest.mark.parametrize(
        "model_type, sizes, overrides",
        [
            ("llama", UNEVEN, {}),
            ("llama", EVEN, {"tie_word_embeddings": True}),
            ("llama", UNEVEN, {"attention_bias": True, "mlp_bias": True}),
            (
                "llama",
                UNEVEN,
                {
                    "rope_parameters": {
                        "rope_type": "llama3",
                        "rope_theta": 1e4,
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 16,
                    }
                },
            ),
            ("mistral", UNEVEN, {"sliding_window": None}),
            ("qwen2", UNEVEN, {}),
            ("qwen2", EVEN, {}),
            ("qwen3", EVEN, {}),
        ],
    )
    def test_computes_the_same(self, tmp_path, model_type, sizes, overrides):
        _, _, report = exported(tmp_path / "m", model_type, sizes, **overrides)
        found = report["parity"]
        assert found["consumer"].startswith("llama.cpp")
        assert found["max_abs_difference"] < 1e-4
        assert found["greedy"].items() >= {"same": 5, "same_stored": 5, "prompts": 5}.items()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
    def test_other_dtypes_are_within_one_per_cent(self, tmp_path, dtype):
        sizes = {"closed": ([1, 4], [1, 4]), "widths": (32, 32)}
        _, _, report = exported(
            tmp_path / "m", sizes=sizes, dtype=dtype, hidden_size=64, num_attention_heads=8
        )
        found, figures = report["parity"], report["parity"]["perplexity"]
        assert figures["export"] == pytest.approx(figures["model"], rel=parity.PERPLEXITY_BOUND - 1)
        assert figures["stored"] == pytest.approx(figures["model"], rel=parity.PERPLEXITY_BOUND - 1)
        assert found["greedy"]["same_stored"] + found["greedy"]["ties"] == 5
        measured = found["rounding"]
        for level, alone in zip(measured["found"], measured["rounding"], strict=True):
            assert alone / LEEWAY < level < LEEWAY * alone

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_a_model_that_multiplies_rounding_is_taken_and_a_wrong_file_is_not(
        self, tmp_path, dtype, monkeypatch
    ):
        model, tokenizer = packed_model(**UNEVEN, vocab_size=VOCABULARY), byte_tokenizer(*MERGES)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(20)
                layer.self_attn.k_proj.weight.mul_(20)
        options = {"tokenizer": tokenizer, "dtype": dtype}
        found = gp.export(model, tmp_path / "m", "gguf", **options)["parity"]
        assert found["max_abs_difference"] > found["bound"]
        # The weights are all there, but for halves where llama.cpp wants pairs.
        monkeypatch.setattr(
            gguf_exporter, "_halves_to_pairs", lambda heads, dim: torch.arange(heads * dim)
        )
        with pytest.raises(ParityError, match="llama.cpp .* gives logits that differ"):
            gp.export(model, tmp_path / "n", "gguf", **options)
        assert not (tmp_path / "n").exists()

    @pytest.mark.parametrize("split", [None, pre_tokenizers.Digits(individual_digits=True)])
    def test_tokenizes_the_same(self, tmp_path, split):
        import llama_cpp

        model = packed_model(**UNEVEN, vocab_size=VOCABULARY)
        tokenizer = byte_tokenizer(*MERGES, split=split)
        gp.export(model, tmp_path / "m", "gguf", tokenizer=tokenizer)
        runner = llama_cpp.Llama(str(tmp_path / "m/model.gguf"), vocab_only=True, verbose=False)
        for text in PROSE:
            assert runner.tokenize(text.encode(), add_bos=True) == tokenizer(text).input_ids
            assert runner.detokenize(tokenizer(text).input_ids).decode() == text

    @pytest.mark.parametrize("legacy", [True, False])
    @pytest.mark.parametrize("prefix", [True, False])
    def test_tokenizes_pieces_the_same(self, tmp_path, legacy, prefix):
        import llama_cpp

        model = packed_model(**UNEVEN, vocab_size=400)
        tokenizer = pieces_tokenizer(*WORDS, legacy=legacy, prefix=prefix)
        report = gp.export(model, tmp_path / "m", "gguf", tokenizer=tokenizer)
        assert report["parity"]["greedy"]["same"] == 5
        assert bool(report["notes"]) == (prefix and not legacy)  # a space in front is not added
        runner = llama_cpp.Llama(str(tmp_path / "m/model.gguf"), vocab_only=True, verbose=False)
        spaced = ("  two  spaces",) if not report["notes"] else ("two  spaces",)
        for text in (*PROSE, *spaced, "\u65e5\u672c and open", "the"):
            ids = tokenizer(text).input_ids
            assert runner.tokenize(text.encode(), add_bos=True) == ids
            assert runner.detokenize(ids[1:], prev_tokens=ids[:1]).decode().strip() == text.strip()
