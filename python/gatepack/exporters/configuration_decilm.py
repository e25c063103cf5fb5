"""Reads config.json of a DeciLM (nemotron-nas) checkpoint that gatepack wrote.

A copy of this file lies beside the weights. Engines read the fields of block_configs as attributes,
transformers as JSON: a Block is both.
"""

from transformers import MistralConfig


class Block(dict):
    """A dict whose keys are also attributes, at every level."""

    def __init__(self, values):
        super().__init__({k: Block(v) if isinstance(v, dict) else v for k, v in values.items()})

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __deepcopy__(self, memo):
        return Block(self)


class DeciLMConfig(MistralConfig):
    """MistralConfig, which takes any head count, and block_configs, one for each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        kwargs.setdefault("sliding_window", None)
        super().__init__(**kwargs)
        self.block_configs = [Block(each) for each in block_configs]
