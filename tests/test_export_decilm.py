"""export(format="decilm"): a loader written from the format's description alone, in plain torch,
gives the packed model's logits; widths survive every engine's rounding."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packed import modules_cache, packed_model  # noqa: F401
from safetensors.torch import load_file
from tiny import token_ids

import gatepack as gp
from gatepack.exporters.decilm import ffn_mult

pytestmark = pytest.mark.usefixtures("modules_cache")
SIZES = {"closed": ([1, 4], [0, 3]), "widths": (512, 256), "intermediate_size": 768}
ATTENTION = {"no_op", "replace_with_linear", "n_heads_in_group"}
FFN = {"no_op", "replace_with_linear", "ffn_mult"}


def decilm_model(**overrides):
    return packed_model(**{**SIZES, **overrides})


def decilm_logits(folder, ids):
    """Logits of a DeciLM folder: Llama with block_configs, as engines read it."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    heads, dim, hidden = (config[k] for k in ("num_attention_heads", "head_dim", "hidden_size"))

    def norm(x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    def rotate(x):
        base = config["rope_parameters"]["rope_theta"]
        frequencies = base ** -(torch.arange(0, dim, 2) / dim)
        angles = torch.outer(torch.arange(x.shape[-2]), frequencies).repeat(1, 2)
        low, high = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()

    x = weights["model.embed_tokens.weight"][ids]
    for i, block in enumerate(config["block_configs"]):
        assert set(block["attention"]) == ATTENTION and set(block["ffn"]) == FFN
        name = f"model.layers.{i}"
        kv_heads = heads // block["attention"]["n_heads_in_group"]
        y = norm(x, f"{name}.input_layernorm")
        q, k, v = (
            F.linear(y, weights[f"{name}.self_attn.{part}_proj.weight"])
            .unflatten(-1, (count, dim))
            .transpose(1, 2)
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)
        x = x + F.linear(y, weights[f"{name}.self_attn.o_proj.weight"])
        y = norm(x, f"{name}.post_attention_layernorm")
        gate, up, down = (weights[f"{name}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        width = math.ceil(int(2 * block["ffn"]["ffn_mult"] * hidden / 3) / 256) * 256
        assert gate.shape == up.shape == (width, hidden) == down.t().shape
        x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return F.linear(norm(x, "model.norm"), weights[f"{head}.weight"])


# Of 3 groups of 2 query heads, layer 0 keeps one head of two, layer 1 both heads of one.
GROUPS = {"num_key_value_heads": 3, "closed": ([1, 3, 4, 5], [2, 3, 4, 5])}


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, GROUPS])
def test_a_loader_of_the_format_computes_the_same(tmp_path, overrides):
    model = decilm_model(**overrides)
    gp.export(model, tmp_path / "m", "decilm")
    with torch.no_grad():
        expected = model(token_ids()).logits
    torch.testing.assert_close(decilm_logits(tmp_path / "m", token_ids()), expected)


def test_key_value_heads_of_each_layer(tmp_path):
    report = gp.export(decilm_model(**GROUPS), tmp_path / "m", "decilm")
    blocks = json.loads((tmp_path / "m" / "config.json").read_text())["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [1, 2]
    assert any("2 heads of 8 are not 48 wide" in note for note in report["notes"])


def test_transformers_loads_it_with_its_own_code(tmp_path):
    model = decilm_model()
    report = gp.export(model, tmp_path / "m", "decilm")
    assert report["parity"]["max_abs_difference"] == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", trust_remote_code=True
    )
    block = loaded.config.block_configs[1]
    assert block.attention.no_op is False and not hasattr(block.ffn, "intermediate_size")
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 9)}
    assert torch.equal(
        loaded.generate(token_ids(), **arguments), model.generate(token_ids(), **arguments)
    )
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"] == [dict(each) for each in loaded.config.block_configs]


@pytest.mark.parametrize("factor", [None, 4.0])
def test_rope_has_the_names_of_transformers_4_too(tmp_path, factor):
    scaling = None if factor is None else {"rope_type": "linear", "factor": factor}
    rope = {"rope_theta": 3000.0, **(scaling or {"rope_type": "default"})}
    model = decilm_model(rope_parameters=dict(rope))
    assert gp.export(model, tmp_path / "m", "decilm")["parity"]["max_abs_difference"] == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rope_theta"] == 3000.0 and config["rope_scaling"] == scaling
    assert config["rope_parameters"] == rope


@given(st.integers(1, 128), st.integers(1, 512))
def test_widths_survive_rounding(hidden, width):
    hidden, width = hidden * 64, width * 256
    exact = ffn_mult(width, hidden)
    for multiplier in (exact, round(exact, 6)):
        size = int(2 * multiplier * hidden / 3)
        assert size + (-size) % 256 == width


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"widths": (512, 300)}, "multiples of 256, got 300 in layer 1.*width_multiple=256"),
        ({"closed": ([], [0, 3])}, "query heads in every layer of a llama, got 4 .layer 1. and 6"),
        ({"attention_bias": True}, "biases: expected attention_bias and mlp_bias False"),
        ({"model_type": "qwen2"}, "model_type 'qwen2': expected llama or mistral"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window 8: expected None"),
    ],
)
def test_refusals(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        gp.export(decilm_model(**overrides), tmp_path / "m", "decilm")
