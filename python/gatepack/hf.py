"""Stage 3, modules: attach gates to a Hugging Face model by swapping children, and detach."""

import fnmatch
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

import gatepack.attention  # noqa: F401  registers attn_implementation="gatepack"
from gatepack.attachment import Attachment
from gatepack.budget import Costs, gate_cost
from gatepack.config import GateConfig
from gatepack.gates import GateSet, GateSpec
from gatepack.latency import LatencyCosts, LatencyTable
from gatepack.layers import GATES_NAME, Layer, has_path, hf_model, layers_of
from gatepack.masks import decode_mask, record_of
from gatepack.modules import linear_shape
from gatepack.sharding import refuse_sharded


def refuse_clipping(root: nn.Module) -> None:
    """ValueError for a model that clips what its linears give in place."""
    if getattr(root.config, "clip_qkv", None) is not None:
        raise ValueError(
            f"clip_qkv={root.config.clip_qkv}: expected None, because it overwrites what gated "
            "linears give, which their gradients need"
        )


def attach(model: nn.Module, config: GateConfig | None = None) -> GateSet:
    """Gates a transformers model (or a PEFT model around one) in place and returns its GateSet.

    Units "rows" and "columns" give a gatepack.row_column.RowColumnGateSet. Swaps child modules by
    name; the GateSet becomes the submodule `gatepack_gates`, so optimizers, checkpoints and .to()
    see it. Works before or after get_peft_model; after it, call gates.unfreeze() before building
    the optimizer. Gradient checkpointing must be non-reentrant (use_reentrant=False): all layers
    share one sample. Raises ValueError for a model of no known family, gates attached twice, or a
    target at or below what no gate can remove; whether shapes meet the target is checked where a
    training begins (GateTraining), or by gates.plan.
    """
    config = GateConfig() if config is None else config
    if not isinstance(config, GateConfig):
        raise ValueError(f"config must be a GateConfig or None, got {config!r}")
    root = hf_model(model)
    refuse_sharded(root, "its linears cannot be replaced", "attach before fully_shard")
    if hasattr(root, GATES_NAME):
        raise ValueError("model already has gates; take them off with gatepack.detach(model) first")
    if "linears" in record_of(root.config):
        raise ValueError(
            "model is packed by rows and columns; put it back with gatepack.unpack(model) first"
        )
    refuse_clipping(root)
    if config.of_linears:
        from gatepack.row_column import attach_rows_columns

        return attach_rows_columns(root, config)
    layers = layers_of(root)
    specs: dict[str, GateSpec] = {}
    for layer in layers:
        specs.update(_specs(layer, config))
    check_targets(config, [name for layer in layers for name in _gated_names(layer, config)])
    gates = GateSet(config, specs)
    gates.costs = _costs(root, layers, specs, config)
    record = record_of(root.config)
    if "total" in record:
        # Units were removed while these gates trained: budget and noise are those of before.
        gates.costs.total = record["total"]
        attached = {n: record["attached"][n] for n in specs}
        gates.recall({n: (decode_mask(r), int(r["shared_size"])) for n, r in attached.items()})
    fixed = gates.costs.fixed / gates.costs.total
    if config.target <= fixed:
        raise ValueError(
            f"target={config.target} cannot be reached: the gated units hold {1 - fixed:.1%} of "
            f"the blocks' {config.target_of}; gate more units or raise the target"
        )
    gates.width = linear_shape(layers[0].linear(layers[0].family.out))[0]
    gates.to(next(root.parameters()).device).train(root.training)
    Attachment(root, gates).renew(layers)
    return gates


def gates_of(model: nn.Module) -> GateSet:
    """The GateSet that attach put on a model; ValueError if there is none."""
    gates = getattr(hf_model(model), GATES_NAME, None)
    if gates is None:
        raise ValueError(
            "model has no gates; add them with gatepack.attach(model, gatepack.GateConfig(...))"
        )
    return gates


def detach(model: nn.Module) -> None:
    """Takes the gates off a model and leaves its weights as they are: the inverse of attach."""
    root = hf_model(model)
    gates_of(root).attachment.release()
    delattr(root, GATES_NAME)
    record = dict(root.config.gatepack)
    del record["gates"]
    for removed in ("frozen", "total", "attached"):
        record.pop(removed, None)
    if record:
        root.config.gatepack = record
    else:
        del root.config.gatepack


def matches(name: str, config: GateConfig) -> bool:
    """Whether config.targets is None or has a pattern for the name of a module."""
    return config.targets is None or any(
        fnmatch.fnmatchcase(name, pattern) for pattern in config.targets
    )


def check_targets(config: GateConfig, names: list[str]) -> None:
    """ValueError for a pattern of config.targets that is for none of the names."""
    for pattern in config.targets or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"targets={config.targets}: {pattern!r} matches nothing that can be gated; the "
                f"first is {names[0]!r}"
            )


def _gated_names(layer: Layer, config: GateConfig) -> list[str]:
    places = {"heads": layer.heads_name, "channels": layer.channels_name}
    return [places[unit] for unit in config.units]


def _specs(layer: Layer, config: GateConfig) -> Iterator[tuple[str, GateSpec]]:
    family, dim = layer.family, layer.head_dim
    if "heads" in config.units and matches(layer.heads_name, config):
        _refuse_mixed_heads(layer)
        hidden_out = linear_shape(layer.linear(family.out))[0]
        hidden_in = linear_shape(layer.linear(family.qkv or family.q))[1]
        ratio = layer.queries // layer.kv_heads
        shared = 2 * dim * hidden_in
        unit = dim * (hidden_in + hidden_out)
        if ratio == 1:
            unit, shared = unit + shared, 0
        yield (
            f"{layer.heads_name}:heads",
            GateSpec("heads", layer.queries, dim, unit, ratio, shared),
        )
    if "channels" in config.units and matches(layer.channels_name, config):
        out, width = linear_shape(layer.linear(family.down))
        unit = out + family.branches * linear_shape(layer.linear(family.up[0]))[1]
        yield f"{layer.channels_name}:channels", GateSpec("channels", width, 1, unit)


def _refuse_mixed_heads(layer: Layer) -> None:
    """ValueError for a layer whose heads do not stand for themselves."""
    for path in layer.family.across_heads:
        if has_path(layer.module, path):
            raise ValueError(
                f"units: the heads of {layer.heads_name} cannot be gated, because {path} has "
                "weights or means over several of them; gate channels only, with "
                'GateConfig(units=("channels",)), or single rows and columns, with '
                'GateConfig(units=("rows", "columns"))'
            )


def _costs(
    root: nn.Module, layers: list[Layer], specs: dict[str, GateSpec], config: GateConfig
) -> Costs:
    """What config.target_of counts, over all blocks."""
    if config.target_of == "latency":
        table = LatencyTable.from_dict(config.latency_table)
        removed = "total" in record_of(root.config)
        return LatencyCosts(table, config.latency_phase, specs, len(layers), removed)
    total = sum(
        layer.linear(path).weight.numel() for layer in layers for path in layer.family.linears
    )
    fixed = total - sum(gate_cost(spec) for spec in specs.values())
    if config.target_of == "params":
        return Costs(specs, fixed)
    # Multiplications and additions per token; a head also meets the keys and values it attends to.
    meets = {layer.heads_name: head_flops(root, layer, config) for layer in layers}
    counted = {}
    for name, spec in specs.items():
        own = meets[name.rpartition(":")[0]] if spec.kind == "heads" else 0
        counted[name] = replace(
            spec, unit_cost=2 * spec.unit_cost + own, shared_cost=2 * spec.shared_cost
        )
    gated = {name.rpartition(":")[0] for name in specs}
    rest = sum(
        layer.queries * meets[layer.heads_name] for layer in layers if layer.heads_name not in gated
    )
    return Costs(counted, 2 * fixed + rest)


def head_flops(root: nn.Module, layer: Layer, config: GateConfig) -> int:
    """What a query head multiplies and adds per token to meet the keys and values that it sees."""
    attention = layer.module.get_submodule(layer.family.attention)
    seen = 0.5 if getattr(attention, "is_causal", root.can_generate()) else 1.0
    return round(seen * 4 * layer.head_dim * config.sequence_length)
