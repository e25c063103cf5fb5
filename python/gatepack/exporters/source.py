"""Stage 6, export: what every format reads of the model that it writes."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from gatepack.checkpoint import refuse_adapters
from gatepack.layers import GATES_NAME, Layer, hf_model, layers_of
from gatepack.masks import record_of
from gatepack.modules import linear_shape

# Families whose layers may differ in a GGUF file.
UNEVEN_IN_GGUF = ("llama", "mistral", "qwen2")
_WIDTH_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
# What transformers 4 calls the base and the share of rotary lanes, where it has other names.
_ROPE_KEYS = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "modernbert": ("global_rope_theta", "partial_rotary_factor"),
}
# Of families that rotate by layer type: what it calls the base of sliding layers.
_LOCAL_ROPE = {
    "gemma3_text": "rope_local_base_freq",
    "modernbert": "local_rope_theta",
    "olmo3": "rope_theta",
}


@dataclass(frozen=True)
class LayerSizes:
    """Units that one layer has in memory."""

    queries: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class Source:
    """A packed (or dense) transformers model without adapters, and the sizes of its layers."""

    model: nn.Module
    tokenizer: object
    layers: tuple[Layer, ...]
    sizes: tuple[LayerSizes, ...]

    @property
    def config(self):
        return self.model.config

    @property
    def head_dim(self) -> int:
        return self.layers[0].head_dim

    @property
    def width_key(self) -> str:
        """What the model's config calls the width of its MLPs."""
        return next((key for key in _WIDTH_KEYS if hasattr(self.config, key)), _WIDTH_KEYS[0])

    def config_sizes(self, sizes: LayerSizes) -> dict[str, int]:
        """sizes under the names that the model's config has for them."""
        found = {"num_attention_heads": sizes.queries, self.width_key: sizes.width}
        if hasattr(self.config, "num_key_value_heads"):
            found["num_key_value_heads"] = sizes.kv_heads
        return found

    def stock_class(self, name: str | None = None):
        """The class of transformers with that name, by default the model's own; or ValueError."""
        name = name or type(self.model).__name__.removeprefix("Packed")
        found = getattr(transformers, name, None)
        if not hasattr(found, "from_pretrained"):
            raise ValueError(f"{name} is not a class of transformers, which this format needs")
        return found

    def same(self, what: Callable[[LayerSizes], int], name: str, form: str) -> int:
        """what(sizes), which must be equal in every layer; else ValueError that says where."""
        values = [what(sizes) for sizes in self.sizes]
        if len(set(values)) > 1:
            uneven = self.config.model_type in UNEVEN_IN_GGUF and form != "gguf"
            others = "'hf' or 'gguf'" if uneven else "'hf'"
            raise ValueError(
                f"format {form!r} needs equally many {name} in every layer of a "
                f"{self.config.model_type}, got {_spread(values)}. Attach with "
                "GateConfig(equal_layers=True) (gatepack train --equal-layers), or export with "
                f"format={others}, which takes different sizes"
            )
        return values[0]

    def require_free_head_dim(self, queries: int, form: str) -> None:
        """ValueError if heads were removed from a family whose config derives their width, as all
        do that have as many key/value heads as query heads."""
        derived = not hasattr(self.config, "num_key_value_heads")
        if derived and queries * self.head_dim != self.config.hidden_size:
            raise ValueError(
                f"format {form!r} cannot say that {queries} heads of {self.head_dim} are left of "
                f"hidden_size {self.config.hidden_size}: model_type {self.config.model_type!r} has "
                "no head_dim in its config. Gate its channels only, or export with format='hf'"
            )


@contextmanager
def edited_config(folder: Path) -> Iterator[dict]:
    """What is in a folder's config.json, written back as it is at the end."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    yield config
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def older_rope(config) -> dict:
    """config.rope_parameters under the names that programs on transformers 4 read.

    transformers 5 takes both. Nothing for a model without, or where 4 has no names for it.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    whole = parameters.get("full_attention", parameters)
    if "rope_theta" not in whole:
        return {}
    kind = config.model_type
    base, share = _ROPE_KEYS.get(kind, ("rope_theta", "partial_rotary_factor"))
    found = {base: whole["rope_theta"]}
    if whole is not parameters:
        local = _LOCAL_ROPE.get(kind)
        sliding = parameters.get("sliding_attention", whole)["rope_theta"]
        if local is None or found.get(local, sliding) != sliding:
            return {}
        found[local] = sliding
    if kind != "modernbert":  # which 4 does not scale
        default = whole["rope_type"] == "default"
        rest = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
        found["rope_scaling"] = None if default else rest
    if "partial_rotary_factor" in whole:
        found[share] = whole["partial_rotary_factor"]
    return found


def read_model(model: nn.Module, tokenizer, dtype: torch.dtype | None) -> Source:
    """The Source of a model, in dtype if that is not its own.

    Raises ValueError for a model with gates or adapters, or packed by rows and columns.
    """
    root = hf_model(model)
    if hasattr(root, GATES_NAME):
        raise ValueError("model has gates: pack it first (gatepack.pack(model))")
    refuse_adapters(root)
    if "linears" in record_of(root.config):
        raise ValueError(
            "model is packed by rows and columns of single linears, which no format but gatepack's "
            "own carries: save it with gatepack.save_pretrained"
        )
    layers = tuple(layers_of(root))
    if dtype is not None and root.dtype != dtype:
        root = cast_copy(root, dtype)
        layers = tuple(layers_of(root))
    sizes = tuple(
        LayerSizes(layer.queries, layer.kv_heads, linear_shape(layer.linear(layer.family.down))[1])
        for layer in layers
    )
    return Source(root, tokenizer, layers, sizes)


def cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model with weights of another dtype, as a checkpoint of it would load.

    Buffers, such as rotary frequencies, keep theirs.
    """
    found = copy.deepcopy(model)
    for parameter in found.parameters():
        parameter.data = parameter.data.to(dtype)
    return found


def _spread(values: list[int]) -> str:
    """[4, 4, 6] -> "4 (layers 0, 1) and 6 (layer 2)", the rarest last; long lists are cut."""
    parts = []
    for value in sorted(set(values), key=lambda value: -values.count(value)):
        layers = [i for i, other in enumerate(values) if other == value]
        shown = ", ".join(map(str, layers[:6])) + (", ..." if len(layers) > 6 else "")
        parts.append(f"{value} (layer{'s' if len(layers) > 1 else ''} {shown})")
    if len(parts) > 4:
        parts = [*parts[:3], f"{len(parts) - 3} other sizes"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
