"""export(format="uniform"): stock checkpoints that plain transformers loads, and refusals."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from letters import letter_tokenizer
from packed import CHANNELS, EVEN, UNEVEN, packed_model, spoil
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.exporters import uniform
from gatepack.families import FAMILIES
from gatepack.quality import ParityError

FIVE_HEADS = {"num_key_value_heads": 6, "closed": ([1], [4]), "widths": (24, 24)}

# Their output projections are as wide as the model, whatever heads there are.
WHOLE_WIDTH = ("helium", "stablelm")


@torch.no_grad()
def outputs_of(model):
    return model.eval()(token_ids())[0]


def load(folder, auto="AutoModelForCausalLM", **options):
    return getattr(transformers, auto).from_pretrained(folder, **options)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_plain_transformers_loads_it(tmp_path, model_type):
    grouped = hasattr(tiny_model(model_type).config, "num_key_value_heads")
    sizes = EVEN if grouped and model_type not in WHOLE_WIDTH else CHANNELS
    model = packed_model(model_type, **sizes)
    report = gp.export(model, tmp_path / "m")
    auto = "AutoModelForCausalLM" if model.can_generate() else "AutoModelForSequenceClassification"
    loaded = load(tmp_path / "m", auto)
    assert type(loaded) is type(model)
    assert loaded.config.model_type == model_type
    assert not hasattr(loaded.config, "gatepack")
    assert loaded.num_parameters() == model.num_parameters()
    assert torch.equal(outputs_of(loaded), outputs_of(model))
    assert report["parity"]["max_abs_difference"] == 0
    assert not list((tmp_path / "m").glob("*.py"))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 3000.0}


def by_layer_type(full, sliding=PLAIN):
    return {"full_attention": full, "sliding_attention": sliding}


@pytest.mark.parametrize(
    "model_type, rope, expected",
    [
        ("llama", PLAIN, {"rope_theta": 3000.0, "rope_scaling": None}),
        (
            "llama",
            {**LLAMA3, "rope_theta": 7000.0},
            {"rope_theta": 7000.0, "rope_scaling": LLAMA3},
        ),
        (
            "phi",
            {**PLAIN, "partial_rotary_factor": 0.75},
            {"rope_theta": 3000.0, "rope_scaling": None, "partial_rotary_factor": 0.75},
        ),
        (
            "gpt_neox",
            {**PLAIN, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 3000.0, "rope_scaling": None, "rotary_pct": 0.5},
        ),
        (
            "gemma3_text",
            by_layer_type({**LLAMA3, "rope_theta": 7000.0}),
            {"rope_theta": 7000.0, "rope_scaling": LLAMA3, "rope_local_base_freq": 3000.0},
        ),
        (
            "modernbert",
            by_layer_type({"rope_type": "default", "rope_theta": 7000.0}),
            {"global_rope_theta": 7000.0, "local_rope_theta": 3000.0},
        ),
        (
            "olmo3",
            by_layer_type({**LLAMA3, "rope_theta": 3000.0}),
            {"rope_theta": 3000.0, "rope_scaling": LLAMA3},
        ),
        ("olmo3", by_layer_type({**LLAMA3, "rope_theta": 7000.0}), {}),
        ("gpt2", None, {}),
    ],
)
def test_rope_has_the_names_of_transformers_4_too(tmp_path, model_type, rope, expected):
    overrides = {} if rope is None else {"rope_parameters": copy.deepcopy(rope)}
    model = packed_model(model_type, **CHANNELS, **overrides)
    gp.export(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    names = ("rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rope_scaling")
    found = {key: config[key] for key in config if key.endswith("_theta") or key in names}
    found |= {key: config[key] for key in config if key == "rope_local_base_freq"}
    assert found == expected and config.get("rope_parameters") == rope
    auto = "AutoModelForCausalLM" if model.can_generate() else "AutoModelForSequenceClassification"
    loaded = load(tmp_path / "m", auto)
    assert torch.equal(outputs_of(loaded), outputs_of(model))
    assert getattr(loaded.config, "rope_parameters", None) == rope


class TestLlamaAsMistral:
    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "default", "rope_theta": 5000.0},
            {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ],
    )
    def test_heads_that_do_not_divide_the_width(self, tmp_path, rope):
        model = packed_model(**FIVE_HEADS, rope_parameters=rope)
        report = gp.export(model, tmp_path / "m")
        loaded = load(tmp_path / "m")
        assert type(loaded) is transformers.MistralForCausalLM
        assert loaded.config.num_attention_heads == 5 and loaded.config.head_dim == 8
        assert loaded.config.sliding_window is None
        assert torch.equal(outputs_of(loaded), outputs_of(model))
        assert any("Mistral" in note for note in report["notes"])

    def test_biases_have_no_place_there(self, tmp_path):
        model = packed_model(**FIVE_HEADS, attention_bias=True)
        with pytest.raises(ValueError, match="attention_bias is set: export with format='hf'"):
            gp.export(model, tmp_path / "m")

    def test_biases_of_a_llama_that_stays_one(self, tmp_path):
        model = packed_model(**EVEN, attention_bias=True, mlp_bias=True)
        gp.export(model, tmp_path / "m")
        assert torch.equal(outputs_of(load(tmp_path / "m")), outputs_of(model))


def test_dense_model(tmp_path):
    model = tiny_model("llama", torch.float32)
    gp.export(model, tmp_path / "m")
    assert torch.equal(outputs_of(load(tmp_path / "m")), outputs_of(model))


def test_tied_embeddings_are_written_once(tmp_path):
    model = packed_model(**EVEN, tie_word_embeddings=True)
    gp.export(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(outputs_of(loaded), outputs_of(model))


def test_dtype(tmp_path):
    model = packed_model(**EVEN)
    gp.export(model, tmp_path / "m", dtype="bfloat16")
    loaded = load(tmp_path / "m", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and model.dtype == torch.float32
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name


def test_model_card_and_tokenizer(tmp_path):
    model = packed_model(**EVEN)
    speed = gp.measure(model, prompt_tokens=4, new_tokens=2, repeats=1)
    report = gp.export(
        model,
        tmp_path / "m",
        tokenizer=letter_tokenizer(),
        base="owner/model",
        data="letters, 18 documents",
        speed=speed,
    )
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'base_model: "owner/model"' in card
    assert "- pruned or trained on: letters, 18 documents" in card
    assert "| 0 | 4 of 6 | 2 of 2 | 24 of 40 |" in card
    assert "logits differ by at most 0 " in card
    assert speed.conditions() in card
    assert set(report["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert report["files"]["model.safetensors"] == (tmp_path / "m/model.safetensors").stat().st_size
    assert json.loads(json.dumps(report)) == report


class TestRefusals:
    @pytest.mark.parametrize("model_type", WHOLE_WIDTH)
    def test_heads_that_the_class_derives_from_the_width(self, tmp_path, model_type):
        words = (
            rf"cannot write a {model_type} of 4 heads of 8 in 48: .*\.weight would be \[48, 48\]"
        )
        with pytest.raises(ValueError, match=words):
            gp.export(packed_model(model_type, **EVEN), tmp_path / "m")
        assert not (tmp_path / "m").exists()

    def test_heads_that_the_config_refuses(self, tmp_path):
        factors = [1.0] * 4
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": 64,
        }
        model = packed_model("phi3", **EVEN, rope_parameters=rope)
        with pytest.raises(ValueError, match="cannot write a phi3 of 4 heads .*short_factor"):
            gp.export(model, tmp_path / "m")
        gp.export(model, tmp_path / "m", "hf")

    def test_uneven_layers_are_named(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"query heads in every layer of a llama, got 3 \(layer 1\) and 6"
        ):
            gp.export(packed_model(**UNEVEN), tmp_path / "m")
        uneven = packed_model(closed=([], []), widths=(40, 16))
        with pytest.raises(ValueError, match=r"MLP channels.*16 \(layer 1\).*equal_layers=True"):
            gp.export(uneven, tmp_path / "m")
        assert not (tmp_path / "m").exists()

    @pytest.mark.parametrize(
        "model_type, others",
        [("llama", "'hf' or 'gguf'"), ("qwen3", "'hf'"), ("gpt2", "'hf'"), ("bert", "'hf'")],
    )
    def test_uneven_layers_are_sent_where_they_may_go(self, tmp_path, model_type, others):
        uneven = packed_model(model_type, closed=([], []), widths=(40, 16))
        with pytest.raises(
            ValueError, match=rf"\(gatepack train --equal-layers\), or .*format={others}, which"
        ):
            gp.export(uneven, tmp_path / "m")

    @pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
    def test_heads_that_do_not_divide_a_gemma(self, tmp_path, model_type):
        model = packed_model(
            model_type, closed=([0, 4],) * 2, hidden_size=64, num_attention_heads=8
        )
        with pytest.raises(ValueError, match=f"a {model_type} of 6 heads: its .* hidden_size 64"):
            gp.export(model, tmp_path / "m")

    @pytest.mark.parametrize("model_type", ["gpt2", "bert", "opt", "distilbert"])
    def test_heads_of_families_without_head_dim(self, tmp_path, model_type):
        model = packed_model(model_type, closed=([0], [2]), widths=(40, 40))
        with pytest.raises(
            ValueError, match="5 heads of 8 are left of hidden_size 48.*no head_dim"
        ):
            gp.export(model, tmp_path / "m")

    def test_gated(self, tmp_path):
        model = tiny_model("llama", torch.float32)
        gp.attach(model, gp.GateConfig(target=0.5))
        with pytest.raises(ValueError, match="pack it first"):
            gp.export(model, tmp_path / "m")

    def test_rows_and_columns(self, tmp_path):
        model = tiny_model("llama", torch.float32)
        gp.attach(model, gp.GateConfig(units=("rows", "columns"), target=0.5))
        gp.pack(model)
        with pytest.raises(ValueError, match="save it with gatepack.save_pretrained"):
            gp.export(model, tmp_path / "m")

    def test_adapters(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            packed_model(**EVEN), peft.LoraConfig(target_modules=["q_proj"], r=2)
        )
        with pytest.raises(ValueError, match="self_attn.q_proj carries a PEFT adapter"):
            gp.export(model, tmp_path / "m")
        gp.export(model.merge_and_unload(), tmp_path / "m")

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"format": "zip"}, "format must be one of uniform, hf, .* got 'zip'"),
            ({"dtype": "q8_0"}, "dtype must be one of .* for format 'uniform', got 'q8_0'"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            gp.export(packed_model(**EVEN), tmp_path / "m", **options)


def test_a_difference_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model = packed_model(**EVEN)
    gp.export(model, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    write = uniform.write

    def wrong(source, folder):
        return write(replace(source, model=spoil(copy.deepcopy(source.model), 1.0)), folder)

    monkeypatch.setattr(uniform, "write", wrong)
    with pytest.raises(ParityError, match="logits that differ from the model's by"):
        gp.export(model, tmp_path / "m", dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
