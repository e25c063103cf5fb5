"""Tiny random models of every known family, and the masked computation they must equal."""

import torch
import transformers

from gatepack.hf import layers_of
from gatepack.modules import base_linear

VOCAB = 97


def tiny_model(model_type: str, dtype=torch.float64, seed: int = 0, **overrides):
    """2 layers, 6 query heads of 8 lanes (2 key/value heads where the family can), 40 channels."""
    shape = {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "vocab_size": VOCAB,
    }
    classes = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
        "mistral": (
            "MistralConfig",
            "MistralForCausalLM",
            {"num_key_value_heads": 2, "head_dim": 8},
        ),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
        "bert": ("BertConfig", "BertForSequenceClassification", {}),
        "roberta": (
            "RobertaConfig",
            "RobertaForSequenceClassification",
            {"max_position_embeddings": 64},
        ),
        "gpt2": (
            "GPT2Config",
            "GPT2LMHeadModel",
            {"n_inner": 40, "bos_token_id": 1, "eos_token_id": 2},
        ),
        "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 40, "word_embed_proj_dim": 48}),
    }
    config_name, model_name, extra = classes[model_type]
    if model_type == "opt":
        del shape["intermediate_size"]
    if model_type == "gpt2":
        shape = {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": VOCAB}
    config = getattr(transformers, config_name)(**{**shape, **extra, **overrides})
    for name in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
    ):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if model_type == "opt":
        config.dropout = 0.0
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


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
