"""Stage 3, modules: the transformers model, its layers, and their sizes."""

from dataclasses import dataclass

import torch
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
            lanes = linear_shape(self.linear(self.family.qkv))[0]
            return (lanes // self.head_dim - self.queries) // 2
        return linear_shape(self.linear(self.family.kv[0]))[0] // self.head_dim

    @property
    def fused_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the fused linear `qkv` that make q, k and v, int64 on the CPU."""
        lanes, shared = self.queries * self.head_dim, self.kv_heads * self.head_dim
        rows = torch.arange(lanes + 2 * shared, device="cpu")  # also where models are built on meta
        if not self.family.by_head:
            return rows.split([lanes, shared, shared])
        return rows.reshape(-1, 3, self.head_dim).transpose(0, 1).flatten(1).unbind()

    def fused(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What belongs to the rows of q, k and v in the order of the fused linear's rows."""
        rows = torch.cat(self.fused_rows).to(q.device)
        return torch.cat([q, k, v])[rows.argsort()]

    @property
    def heads_name(self) -> str:
        return f"{self.name}.{self.family.attention}"

    @property
    def channels_name(self) -> str:
        return f"{self.name}.{self.family.mlp}" if self.family.mlp else self.name


def hf_model(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile's and PEFT's wrappers, or the model itself; else
    ValueError."""
    inner = model
    while True:
        if "_orig_mod" in getattr(inner, "_modules", ()):  # of torch.compile(model)
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            break
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
        if name and all(has_path(module, path) for path in (family.attention, *family.linears))
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with the linears of family {family}")
    return layers


def has_path(module: nn.Module, path: str) -> bool:
    """Whether a module has another at a path."""
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None:
            return False
    return True
