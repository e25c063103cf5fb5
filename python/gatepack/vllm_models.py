"""Stage 6, export: vLLM's Llama with the sizes of each layer, query heads included.

vLLM builds every layer from one config; here each gets a config of its own. Written against
vllm/model_executor/models/llama.py, whose LlamaForCausalLM takes layer_type and whose
LlamaDecoderLayer takes config. Tensor parallelism needs head counts and widths that its size
divides, in every layer.
"""

import copy

from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index


def layer_config(config, index: int):
    """A copy of config with what per_layer_config says of layer `index`."""
    per_layer = config.per_layer_config
    if not isinstance(per_layer, dict):
        return copy.copy(per_layer[index])
    own = {int(key): values for key, values in per_layer.items()}.get(index, {})
    found = copy.copy(config)
    for name, value in own.items():
        setattr(found, name, value)
    return found


class PackedDecoderLayer(LlamaDecoderLayer):
    """LlamaDecoderLayer in the sizes of its own layer."""

    def __init__(self, vllm_config, prefix: str = "", config=None, **kwargs):
        config = layer_config(
            config or vllm_config.model_config.hf_config, extract_layer_index(prefix)
        )
        if config.model_type == "qwen2":
            config.qkv_bias = True
        super().__init__(vllm_config, prefix=prefix, config=config, **kwargs)


class PackedLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM of packed layers."""

    def __init__(self, *, vllm_config, prefix: str = "", layer_type=PackedDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


class PackedMistralForCausalLM(PackedLlamaForCausalLM):
    """Mistral computes what Llama does."""


class PackedQwen2ForCausalLM(PackedLlamaForCausalLM):
    """Qwen2 is Llama with biases on q, k and v."""
