"""Models with random weights in the shapes of MODEL_SHAPES, gated, masked, packed or adapted.

Contenders of a case share the parameters of one frozen base model, so that a large one fits on a
device together with what it is compared with.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from _suite import Case, ModelShape
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import gatepack as gp
from gatepack.functional import lane_values
from gatepack.gates import GateSet
from gatepack.layers import hf_model, layers_of

# Layers and vocabulary of a model; a shape that is not here is a Llama of 2 layers and 1,024 ids.
DEPTH = {
    "smollm2-135m": (30, 49152),
    "roberta-base": (12, 50265),
    "llama-2-7b": (32, 32000),
    "llama-3-8b": (32, 128256),
}
TIED = ("smollm2-135m",)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def build(
    case: Case, *, layers: int | None = None, vocabulary: int | None = None, family: str = ""
) -> nn.Module:
    """The frozen dense model of a case, with LoRA of rank case.lora on every linear of its blocks.

    family: "llama" makes a Llama of any shape.
    """
    shape = case.shape
    own_layers, own_vocabulary = DEPTH.get(case.model, (2, 1024))
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": layers or case.layers or own_layers,
        "vocab_size": vocabulary or own_vocabulary,
        "max_position_embeddings": 16384,
    }
    if case.model == "roberta-base" and family != "llama":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config, cls = RobertaConfig(**sizes, **dropout), RobertaForSequenceClassification
    else:
        tied = case.model in TIED
        config = LlamaConfig(
            **sizes, num_key_value_heads=shape.kv_heads, tie_word_embeddings=tied,
            head_dim=shape.head_dim,
        )  # fmt: skip
        cls = LlamaForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(case.device):
            torch.manual_seed(0)
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model = model.requires_grad_(False).train()
    return with_lora(model, case.lora) if case.lora else model


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """PEFT's LoRA on the linears of the blocks, B at random so that it counts."""
    from peft import LoraConfig, get_peft_model

    names = {path.rpartition(".")[2] for path in layers_of(model)[0].family.linears}
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=sorted(names)))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return adapted


def adapters_of(model: nn.Module, linears: set[str] | None = None) -> list[nn.Parameter]:
    """The factors of LoRA on the linears of these names, or on all."""
    return [
        p
        for name, p in model.named_parameters()
        if "lora_" in name and (linears is None or linears & set(name.split(".")))
    ]


def kept_groups(shape: ModelShape, kept: float) -> int:
    """Key/value heads that stay, with all their query heads: equal groups pack without loss."""
    return max(1, round(kept * shape.kv_heads))


def kept_channels(shape: ModelShape, kept: float, units: tuple[str, ...]) -> int:
    """Channels that leave `kept` of the gated weights beside kept_groups, in whole vectors: 16
    channels, 64 in wide models; at least one of them. Without heads: round(kept * channels)."""
    if "heads" not in units:
        return round(kept * shape.mlp)
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    mlp = 3 * shape.hidden * shape.mlp
    removed = attention * (1 - kept_groups(shape, kept) / shape.kv_heads)
    wanted = (1 - ((1 - kept) * (attention + mlp) - removed) / mlp) * shape.mlp
    step = 64 if shape.mlp >= 4096 else 16
    return min(shape.mlp, max(step, int(wanted + 1e-6) // step * step))


def gate(model: nn.Module, case: Case, units: tuple[str, ...], noise: float = 0.0) -> GateSet:
    """Attaches gates to a model and closes units at random, the same for every call of a case.

    Open gates are fractional, in [0.8, 1]: a multiplication cannot be left out.
    """
    gates = gp.attach(model, gp.GateConfig(units=units, noise=noise, target=0.999))
    gates.unfreeze()
    generator = torch.Generator().manual_seed(1)
    values = 0.8 + 0.2 * torch.rand(gates.logits.shape, generator=generator)
    with torch.no_grad():
        gates.logits.copy_(gates.estimator.logits_of(values))
    shape = case.shape
    ratio = shape.heads // shape.kv_heads
    for name, one in gates.items():
        if one.kind == "heads":
            order = torch.randperm(shape.kv_heads, generator=generator)
            groups = order[kept_groups(shape, case.kept) :, None]
            closed = (groups * ratio + torch.arange(ratio)).flatten()
        else:
            order = torch.randperm(one.size, generator=generator)
            closed = order[kept_channels(shape, case.kept, units) :]
        gates.close(name, closed)
    return gates


class Masked(nn.Module):
    """The eager mask: linear(x * z), z [K] put there before each forward."""

    def __init__(self, linear: nn.Module, lanes: int):
        super().__init__()
        self.linear, self.lanes, self.z = linear, lanes, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.z if self.lanes == 1 else self.z.repeat_interleave(self.lanes)
        return self.linear(x * z.to(x.dtype))


@dataclasses.dataclass
class MaskedModel:
    """A dense model whose o_proj and down_proj are Masked; logits [N] as in the GateSet."""

    model: nn.Module
    gates: GateSet
    masks: list[Masked]
    logits: nn.Parameter

    @classmethod
    def of(cls, model: nn.Module, gates: GateSet) -> "MaskedModel":
        masks = []
        for layer in layers_of(hf_model(model)):
            for name, path in (
                (f"{layer.heads_name}:heads", layer.family.out),
                (f"{layer.channels_name}:channels", layer.family.down),
            ):
                if name in gates.gates:
                    parent_path, _, child = path.rpartition(".")
                    parent = layer.module.get_submodule(parent_path)
                    masks.append(Masked(getattr(parent, child), gates[name].lanes))
                    setattr(parent, child, masks[-1])
        return cls(model, gates, masks, nn.Parameter(gates.logits.detach().clone()))

    def put(self, logits: torch.Tensor) -> None:
        """Gate values of these logits into every mask."""
        values = self.gates.estimator.values(logits).masked_fill(self.gates.closed, 0.0)
        parts = torch.split(values, [one.size for _, one in self.gates.items()])
        for mask, z in zip(self.masks, parts, strict=True):
            mask.z = z

    def double(self) -> "MaskedModel":
        """The same in fp64."""
        twin = copy.deepcopy(self.model).double()
        masks = [m for m in twin.modules() if isinstance(m, Masked)]
        logits = nn.Parameter(self.logits.detach().clone())
        return MaskedModel(twin, self.gates, masks, logits)


def mask_rows_columns(model: nn.Module, gates: GateSet) -> tuple[Callable, nn.Parameter]:
    """(f -> f(model) with gates on rows and columns multiplied in around each linear, its logits).

    model: without gates of its own. While the gates draw noise, so does each call.
    """
    logits = nn.Parameter(gates.logits.detach().clone(), gates.logits.requires_grad)
    values: dict[str, torch.Tensor] = {}
    root = hf_model(model)
    for name, one in gates.items():
        linear, side = name.rsplit(":", 1)
        multiply = _multiply(values, name, one.lanes)
        module = root.get_submodule(linear)
        if side == "columns":
            module.register_forward_pre_hook(lambda _, args, f=multiply: (f(args[0]), *args[1:]))
        else:
            module.register_forward_hook(lambda _, args, y, f=multiply: f(y))

    def run(f):
        noise = gates.estimator.noise_like(logits, None) if gates.noisy else None
        flat = gates.estimator.values(logits, noise).masked_fill(gates.closed, 0.0)
        values.update(gates.split(flat))
        return f(model)

    return run, logits


def _multiply(values, name, lanes):
    return lambda x: x * lane_values(values[name], lanes).to(x.dtype)


def packed_copy(model: nn.Module) -> nn.Module:
    """A gated model packed, the original left as it is."""
    packed = copy.deepcopy(model)
    gp.pack(packed)
    return packed


def plain(model: nn.Module) -> nn.Module:
    """Every PackedLinear of a packed model as an nn.Linear: the physically small model in torch."""
    for module in model.modules():
        if type(module) is gp.PackedLinear:
            module.__class__ = nn.Linear
    return model


def widths(case: Case, units: tuple[str, ...]) -> dict[str, int]:
    shape = case.shape
    return {
        "heads": kept_groups(shape, case.kept) * (shape.heads // shape.kv_heads),
        "channels": kept_channels(shape, case.kept, units),
    }


def optimizer_step(leaves) -> Callable | None:
    """f(gradients), which gives those of the parameters among the leaves to an AdamW of learning
    rate 0; None without parameters."""
    trained = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
    if not trained:
        return None
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)

    def after(gradients):
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return after
