"""Tiny random models of every known family, and the masked computation they must equal."""

import dataclasses

import torch
import torch.nn.functional as F
import transformers

import gatepack as gp
from gatepack.gates import GateSet, GateSpec
from gatepack.layers import layers_of
from gatepack.modules import base_linear

VOCAB = 97


_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_POSITIONS = {"max_position_embeddings": 64}
_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GROUPED),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {"num_key_value_heads": 2, "residual_multiplier": 0.22, "logits_scaling": 2.0},
    ),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0},
    ),
    "glm": (
        "GlmConfig",
        "GlmForCausalLM",
        {**_GROUPED, "attention_bias": True, "pad_token_id": 0},
    ),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"num_key_value_heads": 2}),
    "phi": (
        "PhiConfig",
        "PhiForCausalLM",
        {"num_key_value_heads": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"num_key_value_heads": 2}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 4}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"num_key_value_heads": 2}),
    "cohere2": (
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "stablelm": (
        "StableLmConfig",
        "StableLmForCausalLM",
        {"num_key_value_heads": 2, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    ),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", _GROUPED),
    "arcee": ("ArceeConfig", "ArceeForCausalLM", _GROUPED),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", {"num_key_value_heads": 2}),
    "seed_oss": (
        "SeedOssConfig",
        "SeedOssForCausalLM",
        {**_GROUPED, "residual_dropout": 0.0, "attention_bias": True},
    ),
    "ministral": (
        "MinistralConfig",
        "MinistralForCausalLM",
        {**_GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral3": ("Ministral3Config", "Ministral3ForCausalLM", _GROUPED),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", _GROUPED),
    "exaone4": (
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {
            "num_key_value_heads": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", _GROUPED),
    "helium": ("HeliumConfig", "HeliumForCausalLM", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "bert": ("BertConfig", "BertForSequenceClassification", {}),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _POSITIONS),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", _POSITIONS),
    "camembert": ("CamembertConfig", "CamembertForSequenceClassification", _POSITIONS),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", {"embedding_size": 24}),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", {}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        {"pad_token_id": 0, "local_attention": 8, "reference_compile": False},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"word_embed_proj_dim": 48}),
}
# Families whose q_norm takes the mean over all heads.
CHANNELS_ONLY = ("olmo2", "olmo3")
_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": VOCAB,
}
# What a family calls the sizes.
_NAMES = {
    "distilbert": {
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
    "opt": {"intermediate_size": "ffn_dim"},
}


def tiny_model(model_type: str, dtype=torch.float64, seed: int = 0, **overrides):
    """2 layers, 6 query heads of 8 lanes (2 key/value heads where the family can), 40 channels,
    without dropout unless overrides ask for it."""
    names = _NAMES.get(model_type, {})
    shape = {names.get(name, name): size for name, size in _SHAPE.items()}
    config_name, model_name, extra = _CLASSES[model_type]
    config = getattr(transformers, config_name)(**{**shape, **extra, **overrides})
    for name in (
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "dropout",
        "embd_pdrop",
        "hidden_dropout_prob",
        "resid_pdrop",
        "seq_classif_dropout",
    ):
        if hasattr(config, name) and name not in overrides:
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model


def for_family(model_type: str, config: gp.GateConfig) -> gp.GateConfig:
    """config for a family, on channels only where its heads cannot be gated."""
    if model_type not in CHANNELS_ONLY or "heads" not in config.units:
        return config
    return dataclasses.replace(config, units=("channels",), target=max(config.target, 0.6))


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def padded(ids: torch.Tensor, count: int, side: str) -> dict[str, torch.Tensor]:
    """ids and their attention_mask, with so many tokens of padding on the left or right side."""
    width = (count, 0) if side == "left" else (0, count)
    mask = F.pad(torch.ones_like(ids), width)
    return {"input_ids": F.pad(ids, width, value=5), "attention_mask": mask}


def fused_row(layer, block: int, head: int, lane: int) -> int:
    """Row of a fused linear for a lane of a query head (block 0), its key (1) or value (2)."""
    if layer.family.by_head:
        return (3 * head + block) * layer.head_dim + lane
    if block:
        ratio = layer.queries // layer.kv_heads
        head = layer.queries + (block - 1) * layer.kv_heads + head // ratio
    return head * layer.head_dim + lane


def mask_dense(model, values: dict[str, torch.Tensor]):
    """Multiplies gate values (name -> [size]) into the inputs of out and down linears, by hooks."""

    def multiply(z):
        return lambda module, args: (args[0] * z.to(args[0].dtype), *args[1:])

    for layer in layers_of(model):
        for path, name, lanes in (
            (layer.family.out, f"{layer.heads_name}:heads", layer.head_dim),
            (layer.family.down, f"{layer.channels_name}:channels", 1),
        ):
            if name in values:
                z = values[name].repeat_interleave(lanes)
                layer.module.get_submodule(path).register_forward_pre_hook(multiply(z))
    return model


def dense_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, those of the base linears without PEFT's infixes."""
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "gatepack_gates" not in name
    }


def base_weight(model, path: str) -> torch.Tensor:
    return base_linear(model.get_submodule(path)).weight


def make_gates(fixed_cost=500, **config):
    """Gates of a head and a channel group without a model."""
    config = {"noise": 0.2, "target": 0.5, "width_multiple": 1, **config}
    specs = {
        "a:heads": GateSpec("heads", 6, lanes=4, unit_cost=100, shared_size=3, shared_cost=70),
        "b:channels": GateSpec("channels", 16, unit_cost=11),
    }
    return GateSet(gp.GateConfig(**config), specs, fixed_cost)


def set_gates(gates, pattern: str, seed: int = 0) -> None:
    """Writes logits: "open", "closed", "single", "mixed" (with fractional) or "ragged" heads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate, where in gates.slices():
            logits = torch.full((gate.size,), {"open": 2.0}.get(pattern, -2.0))
            if pattern == "single":
                logits[gate.size // 2] = 0.2
            elif pattern == "mixed":
                logits = torch.randn(gate.size, generator=generator) * 0.8 - 0.2
            elif pattern == "ragged":
                logits = torch.where(torch.arange(gate.size) % 4 == 3, -2.0, 0.1)
            gates.logits[where] = logits
