"""Stage 6, export: one GGUF file for llama.cpp, with sizes of each layer and the tokenizer.

Architecture "llama" where all layers have the same sizes, else "deci", whose head_count,
head_count_kv and feed_forward_length are arrays. Both rotate neighbouring lanes, so rows of q and k
are permuted from halves to pairs, as llama.cpp's own converter does. Qwen3, which normalises q and
k, has an architecture of its own, which rotates halves and has one size for all layers.
"""

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch

from gatepack.exporters.gguf_check import compare_llama_cpp, read_back
from gatepack.exporters.gguf_tokenizer import add_tokenizer
from gatepack.exporters.source import UNEVEN_IN_GGUF, Source
from gatepack.optional import require
from gatepack.progress import Tell
from gatepack.quality import perplexity, vocabulary_size

FILE = "model.gguf"
_MODEL_TYPES = (*UNEVEN_IN_GGUF, "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def write(source: Source, folder: Path, dtype: str, progress: Tell) -> list[str]:
    """Writes model.gguf; returns what it does not carry. progress: called with (done, total)."""
    import gguf

    kind = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[str(source.model.dtype).removeprefix("torch.") if dtype == "auto" else dtype]
    uniform = len(set(source.sizes)) == 1
    writer = gguf.GGUFWriter(folder / FILE, _architecture(source, uniform))
    try:
        _add_sizes(writer, source, uniform)
        writer.add_file_type(_file_type(gguf, kind))
        if kind == gguf.GGMLQuantizationType.Q8_0:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = add_tokenizer(writer, source.tokenizer, vocabulary_size(source.model))
        tensors = _tensors(source)
        kinds = {name: _kind_of(gguf, tensor, kind) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            data = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kinds[name])
            size = int(np.prod(data, dtype=np.int64))
            writer.add_tensor_info(name, list(tensor.shape), np.dtype("f4"), size, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, tensor) in enumerate(tensors.items(), 1):
            values = tensor.detach().float().cpu().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
            progress(done, len(tensors))
    finally:
        writer.close()
    odd = [name for name, tensor in tensors.items() if tensor.dim() > 1 and kinds[name] != kind]
    if odd:
        notes.append(
            f"q8_0 for {len(odd)} of {len(tensors)} tensors, whose rows are no multiple of 32 "
            f"long: they are float16 (the first is {odd[0]})"
        )
    return notes


def check(source: Source, folder: Path, windows: torch.Tensor) -> dict:
    """Figures of llama.cpp on windows; ParityError as read_back and compare_llama_cpp raise it."""
    path = folder / FILE
    stored, kinds = read_back(source, path, _places(source))
    if importlib.util.find_spec("llama_cpp") is None:
        return {
            "skipped": "it needs llama-cpp-python: pip install llama-cpp-python",
            "perplexity": {
                "model": perplexity(source.model, windows[:4]),
                "stored": perplexity(stored, windows[:4]),
            },
        }
    return compare_llama_cpp(source, stored, kinds, path, windows)


def refuse(source: Source) -> None:
    """ValueError for a model that the format cannot hold; ImportError where gguf is missing."""
    require("format 'gguf'", "gguf")
    config = source.config
    problem = None
    if config.model_type not in _MODEL_TYPES:
        problem = f"model_type {config.model_type!r}: expected one of {', '.join(_MODEL_TYPES)}"
    elif not type(source.model).__name__.endswith("ForCausalLM"):
        problem = f"{type(source.model).__name__}: expected a ...ForCausalLM"
    elif config.hidden_act != "silu":
        problem = f"hidden_act {config.hidden_act!r}: expected 'silu'"
    elif config.rope_parameters["rope_type"] not in _ROPE_TYPES:
        problem = (
            f"rope_type {config.rope_parameters['rope_type']!r}: expected one of "
            f"{', '.join(_ROPE_TYPES)}"
        )
    elif getattr(config, "sliding_window", None) is not None:
        problem = (
            f"sliding_window {config.sliding_window}, for which these architectures have no key: "
            "set model.config.sliding_window = None if the texts are shorter"
        )
    elif source.tokenizer is None:
        problem = "a model without its tokenizer, which is part of the file: pass tokenizer="
    if problem:
        raise ValueError(f"format 'gguf' cannot hold {problem}")
    if config.model_type == "qwen3":
        source.same(lambda sizes: sizes.queries, "query heads", "gguf")
        source.same(lambda sizes: sizes.kv_heads, "key/value heads", "gguf")
        source.same(lambda sizes: sizes.width, "MLP channels", "gguf")


def _architecture(source: Source, uniform: bool) -> str:
    if source.config.model_type == "qwen3":
        return "qwen3"
    return "llama" if uniform else "deci"


def _add_sizes(writer, source: Source, uniform: bool) -> None:
    config, sizes = source.config, source.sizes
    arrays = (
        (writer.add_head_count, [each.queries for each in sizes]),
        (writer.add_head_count_kv, [each.kv_heads for each in sizes]),
        (writer.add_feed_forward_length, [each.width for each in sizes]),
    )
    for add, values in arrays:
        add(values[0] if uniform else values)
    writer.add_name(f"{type(source.model).__name__}, packed")
    writer.add_block_count(len(sizes))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(vocabulary_size(source.model))
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    writer.add_rope_dimension_count(source.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(source: Source) -> dict[str, torch.Tensor]:
    """GGUF name -> tensor; nothing is copied but the rows of q and k."""
    found = {}
    if source.config.rope_parameters["rope_type"] != "default":
        found["rope_freqs.weight"] = _rope_factors(source)
    weights = source.model.state_dict()
    for name, (place, order) in _places(source).items():
        found[name] = weights[place] if order is None else weights[place][order]
    return found


def _places(source: Source) -> dict[str, tuple[str, torch.Tensor | None]]:
    """GGUF name -> (name in the state dict, order of its rows, or None for as they are)."""
    found = {}
    tied = source.config.tie_word_embeddings
    for name in source.model.state_dict():
        match = _LAYER.fullmatch(name)
        if match is None:
            module, _, what = name.rpartition(".")
            if not (tied and module == "lm_head"):
                found[f"{_GLOBAL[module]}.{what}"] = name, None
            continue
        index, path, what = match.groups()
        sizes = source.sizes[int(index)]
        heads = {"self_attn.q_proj": sizes.queries, "self_attn.k_proj": sizes.kv_heads}.get(path)
        order = None
        if heads is not None and source.config.model_type != "qwen3":
            order = _halves_to_pairs(heads, source.head_dim)
        found[f"blk.{index}.{_NAMES[path]}.{what}"] = name, order
    return found


def _halves_to_pairs(heads: int, head_dim: int) -> torch.Tensor:
    """The order of rows in which lane i of each head stands beside lane i + D / 2, [heads * D]."""
    lanes = torch.arange(heads * head_dim).reshape(heads, 2, -1)
    return lanes.transpose(1, 2).reshape(-1)


def _rope_factors(source: Source) -> torch.Tensor:
    """What llama.cpp divides the plain frequencies by: plain / scaled, [D / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = source.config.rope_parameters
    scaled, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](source.config, torch.device("cpu"))
    dim = source.head_dim
    plain = parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return plain / scaled


def _kind_of(gguf, tensor: torch.Tensor, kind):
    """Vectors stay float32; rows that 8-bit blocks do not fit, float16."""
    if tensor.dim() == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _file_type(gguf, kind) -> int:
    names = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
    return gguf.LlamaFileType[names[kind.name]]
