"""Stage 6, export: a stock checkpoint, which every engine loads without custom code.

Keys: num_attention_heads, num_key_value_heads, head_dim and intermediate_size, each one number for
all layers. Some configs refuse head counts that do not divide hidden_size; such a Llama is written
as Mistral, whose forward is the same without biases.
"""

from pathlib import Path

import torch
import transformers

from gatepack.checkpoint import MODELING_KEYS
from gatepack.exporters.parity import check_reloaded
from gatepack.exporters.source import Source, edited_config, older_rope

_DIVIDING = ("llama", "gemma2", "gemma3_text")  # heads must divide hidden_size
_LLAMA_ONLY = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp")


def refuse(source: Source) -> None:
    """ValueError for a model whose layers differ, or whose config cannot say its sizes."""
    _stock_model(source)


def write(source: Source, folder: Path) -> list[str]:
    """Writes the checkpoint; returns what it does not carry."""
    stock, notes = _stock_model(source)
    stock.load_state_dict(source.model.state_dict(), assign=True)
    stock.tie_weights()
    if source.model.can_generate():
        stock.generation_config = source.model.generation_config
    stock.save_pretrained(folder)
    with edited_config(folder) as config:
        config |= older_rope(stock.config)
    return [*notes, "which units of the dense model these are (gatepack.save_pretrained does)"]


def check(source: Source, folder: Path, windows: torch.Tensor) -> dict:
    return check_reloaded(source, folder, windows)


def _stock_model(source: Source):
    """(model on meta, notes) of the stock architecture; ValueError where its sizes are others."""
    config_class, values, name, notes = _stock_config(source)
    sizes, problem = source.sizes[0], ""
    try:
        config = config_class.from_dict(values)
        with torch.device("meta"):
            stock = source.stock_class(name)(config)
    except Exception as error:
        problem = " ".join(str(error).split())
    else:
        own = source.model.state_dict()
        for key, tensor in stock.state_dict().items():
            if own[key].shape != tensor.shape:
                problem = f"{key} would be {list(tensor.shape)}, and is {list(own[key].shape)}"
                break
    if problem:
        raise ValueError(
            f"format 'uniform' cannot write a {source.config.model_type} of {sizes.queries} heads "
            f"of {source.head_dim} in {source.config.hidden_size}: {problem}. Gate its channels "
            "only, or export with format='hf'"
        )
    return stock, notes


def _stock_config(source: Source):
    """(config class, its values, class name, notes) of the stock architecture."""
    queries = source.same(lambda sizes: sizes.queries, "query heads", "uniform")
    kv_heads = source.same(lambda sizes: sizes.kv_heads, "key/value heads", "uniform")
    width = source.same(lambda sizes: sizes.width, "MLP channels", "uniform")
    source.require_free_head_dim(queries, "uniform")
    values = source.config.to_dict()
    for key in ("gatepack", *MODELING_KEYS):
        values.pop(key, None)
    values[source.width_key] = width
    name = source.stock_class().__name__
    if hasattr(source.config, "num_key_value_heads"):
        sizes = {"num_key_value_heads": kv_heads, "head_dim": source.head_dim}
        values |= {"num_attention_heads": queries, **sizes}
    model_type, hidden = source.config.model_type, source.config.hidden_size
    if model_type not in _DIVIDING or hidden % queries == 0:
        return type(source.config), values, name, []
    if model_type != "llama":
        raise ValueError(
            f"format 'uniform' cannot write a {model_type} of {queries} heads: its config wants a "
            f"number that divides hidden_size {hidden}; export with format='hf'"
        )
    biased = [key for key in ("attention_bias", "mlp_bias") if values.get(key)]
    if biased:
        raise ValueError(
            f"format 'uniform' writes a Llama whose {queries} heads do not divide hidden_size "
            f"{hidden} as Mistral, which has no biases, but {biased[0]} is set: "
            "export with format='hf' or 'gguf'"
        )
    for key in _LLAMA_ONLY:
        values.pop(key, None)
    note = (
        f"the name Llama: {queries} heads do not divide hidden_size, so it is written as Mistral, "
        "which computes the same"
    )
    values["sliding_window"] = None
    return transformers.MistralConfig, values, name.replace("Llama", "Mistral"), [note]
