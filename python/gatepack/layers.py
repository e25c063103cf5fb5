"""Stage 3, modules: the transformers model, its layers, and their sizes."""

from dataclasses import dataclass

from torch import nn

from gatepack.families import Family, family_of
from gatepack.modules import base_linear, linear_shape

GATES_NAME = "gatepack_gates"


@dataclass(frozen=True)
class Layer:
    """One decoder or encoder layer: its name in the model, the module, and its sizes."""

    name: str
    module: nn.Module
    family: Family
    head_dim: int

    def linear(self, path: str) -> nn.Module:
        return base_linear(self.module.get_submodule(path))

    @property
    def queries(self) -> int:
        return linear_shape(self.linear(self.family.out))[1] // self.head_dim

    @property
    def kv_heads(self) -> int:
        if self.family.qkv:
            return self.queries
        return linear_shape(self.linear(self.family.kv[0]))[0] // self.head_dim

    @property
    def heads_name(self) -> str:
        return f"{self.name}.{self.family.attention}"

    @property
    def channels_name(self) -> str:
        return f"{self.name}.{self.family.mlp}" if self.family.mlp else self.name


def hf_model(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT wrappers, or the model itself; else ValueError."""
    inner = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(getattr(inner, "config", None), "model_type"):
        raise ValueError(
            "model must be a transformers model or a PEFT model around one, got "
            f"{type(model).__name__}"
        )
    return inner


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a transformers model that have every linear of its family."""
    family = family_of(model.config)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = [
        Layer(name, module, family, head_dim)
        for name, module in model.named_modules()
        if name and all(_has_path(module, path) for path in (family.attention, *family.linears))
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with the linears of family {family}")
    return layers


def _has_path(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None:
            return False
    return True
