"""Stage 6, export: one GGUF file for llama.cpp, with sizes of each layer and the tokenizer.

Architecture "llama" where all layers have the same sizes, else "deci", whose head_count,
head_count_kv and feed_forward_length are arrays. Both rotate neighbouring lanes, so rows of q and k
are permuted from halves to pairs, as llama.cpp's own converter does. Qwen3, which normalises q and
k, has an architecture of its own, which rotates halves and has one size for all layers.
"""

import re
from pathlib import Path

import numpy as np
import torch

from gatepack.exporters.gguf_tokenizer import add_tokenizer
from gatepack.exporters.parity import greedy_tokens, refuse_perplexity
from gatepack.exporters.source import Source
from gatepack.optional import require
from gatepack.progress import Tell
from gatepack.quality import perplexity, token_logits, vocabulary_size

FILE = "model.gguf"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 5, 8, 16
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
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
    """Figures of llama.cpp on windows; ParityError if perplexity differs by more than 1 %."""
    try:
        import llama_cpp
    except ImportError:
        return {"skipped": "it needs llama-cpp-python: pip install llama-cpp-python"}
    sample = windows[:4].cpu()
    runner = llama_cpp.Llama(
        str(folder / FILE),
        n_ctx=max(sample.shape[1], PROMPT_TOKENS + NEW_TOKENS),
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def logits_of(ids: list[int]) -> torch.Tensor:
        done = runner.n_tokens
        if ids[:done] != runner.input_ids[:done].tolist() or done >= len(ids):
            runner.reset()
        runner.eval(ids[runner.n_tokens :])
        return torch.from_numpy(runner.scores[: len(ids)].copy())

    what = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    try:
        tokenized = sum(_same_tokens(runner, source.tokenizer, row) for row in sample)
        theirs = [logits_of(row.tolist()) for row in sample]
        same = 0
        for prompt in _prompts(windows):
            ours = greedy_tokens(lambda ids: _torch_logits(source.model, ids), prompt, NEW_TOKENS)
            same += ours == greedy_tokens(logits_of, prompt, NEW_TOKENS)
    finally:
        runner.close()
    difference = max(
        (_torch_logits(source.model, row.tolist()) - logits).abs().max().item()
        for row, logits in zip(sample, theirs, strict=True)
    )
    nats = [
        torch.nn.functional.cross_entropy(logits[:-1], row[1:].long(), reduction="none")
        for row, logits in zip(sample, theirs, strict=True)
    ]
    figures = {
        "model": perplexity(source.model, sample),
        "export": torch.cat(nats).double().mean().exp().item(),
    }
    refuse_perplexity(figures["model"], figures["export"], what)
    return {
        "consumer": what,
        "max_abs_difference": difference,
        "perplexity": figures,
        "greedy": {"same": same, "prompts": PROMPTS, "tokens": NEW_TOKENS},
        "tokenized": {"same": tokenized, "texts": len(sample)},
    }


def _same_tokens(runner, tokenizer, ids: torch.Tensor) -> bool:
    text = tokenizer.decode(ids)
    return runner.tokenize(text.encode(), special=True) == tokenizer(text).input_ids


def _torch_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return token_logits(model, torch.tensor([ids]))[0].float().cpu()


def _prompts(windows: torch.Tensor) -> list[list[int]]:
    """Five pieces of the windows, spread over all of them."""
    flat = windows.reshape(-1)
    starts = torch.linspace(0, max(len(flat) - PROMPT_TOKENS, 0), PROMPTS).long().tolist()
    return [flat[start : start + PROMPT_TOKENS].tolist() for start in starts]


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
    tied = source.config.tie_word_embeddings
    for name, tensor in source.model.state_dict().items():
        match = _LAYER.fullmatch(name)
        if match is None:
            module, _, what = name.rpartition(".")
            if not (tied and module == "lm_head"):
                found[f"{_GLOBAL[module]}.{what}"] = tensor
            continue
        index, path, what = match.groups()
        sizes = source.sizes[int(index)]
        heads = {"self_attn.q_proj": sizes.queries, "self_attn.k_proj": sizes.kv_heads}.get(path)
        if heads is not None and source.config.model_type != "qwen3":
            tensor = _halves_to_pairs(tensor, heads)
        found[f"blk.{index}.{_NAMES[path]}.{what}"] = tensor
    return found


def _halves_to_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads, 2, D / 2] -> [heads, D / 2, 2]: lane i beside lane i + D / 2 of each head."""
    split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


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
