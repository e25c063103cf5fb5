"""Loads a DeciLM (nemotron-nas) checkpoint that gatepack wrote into transformers.

A copy of this file lies beside the weights. DeciLM is Llama with a number of key/value heads and an
MLP width for each layer; Mistral computes the same.
"""

from torch import nn
from transformers import MistralForCausalLM

from .configuration_decilm import DeciLMConfig


def intermediate_size(ffn_mult: float, hidden_size: int) -> int:
    """The MLP width that ffn_mult stands for: 2/3 of hidden_size * ffn_mult, in whole 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256


class DeciLMForCausalLM(MistralForCausalLM):
    """MistralForCausalLM with the sizes of config.block_configs; every block has both parts."""

    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        hidden = config.hidden_size
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            group = block.attention.n_heads_in_group
            lanes = config.num_attention_heads // group * config.head_dim
            layer.self_attn.num_key_value_groups = group
            for name in ("k_proj", "v_proj"):
                setattr(layer.self_attn, name, nn.Linear(hidden, lanes, bias=False))
            width = intermediate_size(block.ffn.ffn_mult, hidden)
            layer.mlp.gate_proj = nn.Linear(hidden, width, bias=False)
            layer.mlp.up_proj = nn.Linear(hidden, width, bias=False)
            layer.mlp.down_proj = nn.Linear(width, hidden, bias=False)
