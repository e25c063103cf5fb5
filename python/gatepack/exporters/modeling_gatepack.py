"""Loads a model that gatepack packed: transformers' own classes, in the sizes that config.json
gives each layer.

A copy of this file lies beside the weights; it needs torch and transformers. PackedX is X of
transformers for every X: PackedLlamaForCausalLM is LlamaForCausalLM. config.json has
per_layer_config (head counts and MLP widths that differ from the global ones) and gatepack_layout
(where the linears of a layer are).
"""

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging


class Packed:
    """Mixed into a class of transformers: gives its layers their sizes before weights load."""

    def __init__(self, config, *args, **kwargs):
        verbosity = logging.get_verbosity()
        # transformers warns of the global sizes, which are meant here and replaced below.
        logging.set_verbosity_error()
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
        for index, (_, layer) in enumerate(_layers(self)):
            _resize_layer(layer, config, index)
        # save_pretrained copies this file only for a class that is registered.
        for auto, reference in (getattr(config, "auto_map", None) or {}).items():
            if reference.endswith(f".{type(self).__name__}"):
                self.register_for_auto_class(auto)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As transformers' own; ValueError, with the tensor's name, for weights that do not fit."""
        resizes = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        wrong = [] if resizes else [(key[0], "has another size") for key in info["mismatched_keys"]]
        prefixes = tuple(f"{name}." for name, _ in _layers(model))
        wrong += [(k, "is missing") for k in info["missing_keys"] if k.startswith(prefixes)]
        if wrong:
            name, what = min(wrong)
            raise ValueError(f"the weights do not fit config.json: {name} {what}")
        return (model, info) if output_loading_info else model


def __getattr__(name):
    stock = getattr(transformers, name.removeprefix("Packed"), None)
    if not name.startswith("Packed") or not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    packed = type(name, (Packed, stock), {"__module__": __name__})
    _convert_as(stock, name)
    globals()[name] = packed
    return packed


def _convert_as(stock, name):
    """Has transformers rename and stack a checkpoint's tensors for a class as for the stock one."""
    from transformers import conversion_mapping as conversions

    known = conversions.get_checkpoint_conversion_mapping
    config_class = getattr(stock, "config_class", None)
    found = known(stock.__name__) or known(getattr(config_class, "model_type", None))
    if found:
        conversions.register_checkpoint_conversion_mapping(name, found, overwrite=True)


def _layers(model):
    layout = model.config.gatepack_layout
    paths = [layout["attention"], *_linears(layout)]
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and all(_has(module, path) for path in paths)
    ]


def _linears(layout):
    heads = [layout["qkv"]] if layout["qkv"] else [layout["q"], *layout["kv"]]
    return [*heads, layout["out"], *layout["up"], layout["down"]]


def _has(module, path):
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None:
            return False
    return True


def _layer_config(config, index):
    """name -> value of what differs in a layer, whatever transformers makes of the key."""
    per_layer = config.to_dict().get("per_layer_config") or {}
    return {int(key): value for key, value in per_layer.items()}.get(index, {})


def _resize_layer(layer, config, index):
    layout, own = config.gatepack_layout, _layer_config(config, index)
    queries = own.get("num_attention_heads", config.num_attention_heads)
    kv_heads = own.get("num_key_value_heads", getattr(config, "num_key_value_heads", queries))
    if not hasattr(config, "num_key_value_heads"):
        kv_heads = queries
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lanes = queries * head_dim
    if layout["qkv"]:
        _resize(layer, layout["qkv"], rows=lanes + 2 * kv_heads * head_dim)
    else:
        _resize(layer, layout["q"], rows=lanes)
        for path in layout["kv"]:
            _resize(layer, path, rows=kv_heads * head_dim)
    _resize(layer, layout["out"], columns=lanes)
    width = own.get(layout["width_key"])
    if width is not None:
        for path in layout["up"]:
            _resize(layer, path, rows=width * (1 + layout["fused_up"]))
        _resize(layer, layout["down"], columns=width)
    counts = {
        "queries": queries,
        "kv_heads": kv_heads,
        "groups": queries // kv_heads,
        "width": lanes,
    }
    attention = layer.get_submodule(layout["attention"])
    for attribute, what in layout["head_attributes"]:
        if attribute.startswith("config."):
            name = attribute.removeprefix("config.")
            attention.config = _LayerConfig(attention.config, {name: counts[what]})
        else:
            setattr(attention, attribute, counts[what])


class _LayerConfig:
    """A config that all layers share, with values of its own for one of them."""

    def __init__(self, shared, own):
        self.__dict__.update(own, _shared=shared)

    def __getattr__(self, name):
        # Not there yet while it is unpickled or copied, which asks for methods of their own.
        if name == "_shared" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._shared, name)


def _resize(layer, path, rows=None, columns=None):
    parent, _, name = path.rpartition(".")
    linear = layer.get_submodule(path)
    transposed = isinstance(linear, Conv1D)
    shape = tuple(linear.weight.shape)[:: -1 if transposed else 1]
    new = (rows or shape[0], columns or shape[1])
    if new == shape:
        return
    with torch.device(linear.weight.device):
        if transposed:
            resized = Conv1D(*new)
        else:
            resized = nn.Linear(new[1], new[0], bias=linear.bias is not None)
    setattr(layer.get_submodule(parent), name, resized.to(linear.weight.dtype))
