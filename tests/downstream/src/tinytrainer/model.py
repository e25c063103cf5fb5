"""Pebble: a causal language model whose layers are named unlike any in transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class PebbleConfig(PretrainedConfig):
    """2 layers of 4 query heads and 2 key/value heads of 8 lanes, 64 channels."""

    model_type = "pebble"

    def __init__(self, vocab_size: int = 64, hidden_size: int = 32, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size, self.head_dim = vocab_size, hidden_size, 8
        self.num_attention_heads, self.groups, self.channels, self.layers = 4, 2, 64, 2
        super().__init__(**kwargs)


class Mixer(nn.Module):
    """Causal attention; heads are counted from the widths of its linears."""

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__()
        heads, width, self.dim = config.num_attention_heads, config.hidden_size, config.head_dim
        self.ask = nn.Linear(width, heads * self.dim, bias=False)
        self.key = nn.Linear(width, heads // config.groups * self.dim, bias=False)
        self.val = nn.Linear(width, heads // config.groups * self.dim, bias=False)
        self.mix = nn.Linear(heads * self.dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for part in (self.ask, self.key, self.val)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.mix(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a product of two projections."""

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__()
        width, channels = config.hidden_size, config.channels
        self.mixer = Mixer(config)
        self.left = nn.Linear(width, channels, bias=False)
        self.right = nn.Linear(width, channels, bias=False)
        self.back = nn.Linear(channels, width, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        y = self.norms[1](x)
        return x + self.back(F.gelu(self.left(y)) * self.right(y))


class Trunk(nn.Module):
    """Embeddings and blocks."""

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class PebbleForCausalLM(PreTrainedModel):
    """Trunk and an output layer; the loss is of the next token."""

    config_class = PebbleConfig

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        logits = self.head(self.trunk(input_ids))
        loss: torch.Tensor | None = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("pebble", PebbleConfig)
AutoModelForCausalLM.register(PebbleConfig, PebbleForCausalLM)
