"""Stage 6, export: DeciLM (nemotron-nas), which vLLM, SGLang and TensorRT-LLM have natively.

block_configs give each layer its key/value heads (n_heads_in_group query heads share one) and, by
ffn_mult, its MLP width, a multiple of 256. Query heads are equally many in every layer; there are
no biases. Field names: vLLM, model_executor/models/nemotron_nas.py.
"""

import shutil
from pathlib import Path

import torch

from gatepack.checkpoint import MODELING_KEYS, write_manifest
from gatepack.exporters.parity import check_reloaded
from gatepack.exporters.source import Source, edited_config, older_rope

WIDTH_MULTIPLE = 256
_FILES = ("configuration_decilm.py", "modeling_decilm.py")


def refuse(source: Source) -> None:
    """ValueError for a model that the format cannot hold."""
    config = source.config
    problem = None
    if config.model_type not in ("llama", "mistral"):
        problem = f"model_type {config.model_type!r}: expected llama or mistral"
    elif not type(source.model).__name__.endswith("ForCausalLM"):
        problem = f"{type(source.model).__name__}: expected a ...ForCausalLM"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        problem = "biases: expected attention_bias and mlp_bias False"
    elif getattr(config, "sliding_window", None) is not None:
        problem = f"sliding_window {config.sliding_window}: expected None"
    if problem:
        raise ValueError(f"format 'decilm' cannot hold {problem}")
    source.same(lambda sizes: sizes.queries, "query heads", "decilm")
    for index, sizes in enumerate(source.sizes):
        if sizes.width % WIDTH_MULTIPLE:
            raise ValueError(
                f"format 'decilm' needs MLP widths that are multiples of {WIDTH_MULTIPLE}, got "
                f"{sizes.width} in layer {index}: attach with "
                f"GateConfig(width_multiple={WIDTH_MULTIPLE})"
            )


def write(source: Source, folder: Path) -> list[str]:
    """Writes the checkpoint with its two files of code; returns what it does not carry."""
    source.model.save_pretrained(folder)
    queries, hidden = source.sizes[0].queries, source.config.hidden_size
    with edited_config(folder) as config:
        for key in ("gatepack", *MODELING_KEYS):
            config.pop(key, None)
        config |= older_rope(source.config)
        config |= {
            "model_type": "nemotron-nas",
            "architectures": ["DeciLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_decilm.DeciLMConfig",
                "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
            },
            "num_attention_heads": queries,
            "num_key_value_heads": max(sizes.kv_heads for sizes in source.sizes),
            "head_dim": source.head_dim,
            "intermediate_size": max(sizes.width for sizes in source.sizes),
            "block_configs": [_block(sizes, hidden) for sizes in source.sizes],
        }
    for name in _FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    write_manifest(folder)
    notes = ["which units of the dense model these are (gatepack.save_pretrained does)"]
    if queries * source.head_dim != hidden:
        notes.append(
            f"head_dim to engines that take hidden_size / heads for it: {queries} heads of "
            f"{source.head_dim} are not {hidden} wide, so mlx-lm and llama.cpp's converter refuse "
            "it; llama.cpp takes format='gguf'"
        )
    return notes


def check(source: Source, folder: Path, windows: torch.Tensor) -> dict:
    return check_reloaded(source, folder, windows, trust_remote_code=True)


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier from which every engine computes width, far from where it would round."""
    return 3 * (width - WIDTH_MULTIPLE / 2) / (2 * hidden_size)


def _block(sizes, hidden_size: int) -> dict:
    return {
        "attention": {
            "no_op": False,
            "replace_with_linear": False,
            "n_heads_in_group": sizes.queries // sizes.kv_heads,
        },
        "ffn": {
            "no_op": False,
            "replace_with_linear": False,
            "ffn_mult": ffn_mult(sizes.width, hidden_size),
        },
    }
