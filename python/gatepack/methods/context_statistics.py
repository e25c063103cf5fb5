"""Stage 4, methods: what contextual pruning measures on a text, and what its thresholds find."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gatepack.gates import Gate, GateSet
from gatepack.importance import gated_inputs
from gatepack.layers import Layer, layers_of
from gatepack.methods.statistics import Batch, run_batches, watching
from gatepack.modules import base_linear


@dataclass(frozen=True)
class ContextStatistics:
    """Means over the tokens of the calibration text, fp64, on the model's device.

    inputs: linear name -> mean |x| [K]. outputs, centred: linear name -> mean |y| and mean |y - b|
    [N], the same tensor where there is no bias. branch: gate name -> mean |act(a)| [units] of gated
    MLPs. readers: gate name -> the out or down linear that its units feed. means: gate name -> mean
    x [K] of that linear.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    centred: dict[str, torch.Tensor]
    branch: dict[str, torch.Tensor]
    means: dict[str, torch.Tensor]
    readers: dict[str, str]


@dataclass(frozen=True)
class Quiet:
    """What the published thresholds would zero.

    open: gate name -> bool [units], False for units that go. rows, columns: how many rows and
    columns of linears fall below tau_linear; beyond_units: those of them that no closed unit takes
    along (single lanes of heads, the residual width), which stay.
    """

    open: dict[str, torch.Tensor]
    rows: int
    columns: int
    beyond_units: int


def context_statistics(gates: GateSet, batches: Iterable[Batch]) -> ContextStatistics:
    """One pass of a gated model, all open, over batches of token ids; padding does not count.

    Inputs that several linears read (q, k, v; gate, up) are counted once. Nothing in it waits for
    the device.
    """
    root = gates.attachment.root
    readers = {gate.name: module for gate, module in gated_inputs(gates)}
    names = {}
    branch_of = {}
    with watching() as watch:

        def watch_linear(name: str, module: nn.Module, act: nn.Module | None, sees_input: bool):
            def hook(x, y):
                if sees_input:
                    watch.add(("input", name), x)
                bias = base_linear(module).bias
                watch.add(("output", name), y)
                if bias is not None:
                    watch.add(("centred", name), y, bias.detach())
                if act is not None:
                    watch.add(("branch", name), act(y))

            watch.on_forward(module, hook)

        same_input = {}
        for layer in layers_of(root):
            gated = layer.family.mlp and len(layer.family.up) > 1
            for path in layer.family.linears:
                name, module = f"{layer.name}.{path}", layer.module.get_submodule(path)
                names[module] = name
                first = _first_reader(layer, path)
                same_input[name] = f"{layer.name}.{first}"
                act = None
                if gated and path == layer.family.up[0]:
                    act = layer.module.get_submodule(layer.family.mlp).act_fn
                    branch_of[f"{layer.channels_name}:channels"] = name
                watch_linear(name, module, act, first == path)
        run_batches(root, batches, watch, "calibrating")
        sums = watch.sums
    outputs = {name: sums["output", name].mean_abs for name in names.values()}
    return ContextStatistics(
        inputs={name: sums["input", same_input[name]].mean_abs for name in names.values()},
        outputs=outputs,
        centred={
            name: sums["centred", name].mean_abs if ("centred", name) in sums else outputs[name]
            for name in names.values()
        },
        branch={
            gate: sums["branch", name].mean_abs
            for gate, name in branch_of.items()
            if gate in gates.gates
        },
        means={gate: sums["input", names[module]].mean for gate, module in readers.items()},
        readers={gate: names[module] for gate, module in readers.items()},
    )


def _first_reader(layer: Layer, path: str) -> str:
    """The first linear of the layer that reads the same input: q for k and v, gate for up."""
    family = layer.family
    if path in (family.q, *family.kv):
        return family.q
    return family.up[0] if path in family.up else path


def quiet_units(
    gates: GateSet, statistics: ContextStatistics, tau_linear: float, tau_activation: float
) -> Quiet:
    """The units that the thresholds of ContextPruning close, and what else they would zero."""
    open_masks, covered = {}, 0
    for layer in layers_of(gates.attachment.root):
        heads = gates.gates.get(f"{layer.heads_name}:heads")
        if heads is not None:
            lanes = _quiet_head_lanes(layer, heads, statistics, tau_linear)
            closed = lanes.reshape(heads.size, heads.lanes).all(1)
            open_masks[heads.name] = ~closed.cpu()
            covered += _covered(layer, heads, closed, statistics, tau_linear)
        channels = gates.gates.get(f"{layer.channels_name}:channels")
        if channels is not None:
            closed = _quiet_channels(layer, channels, statistics, tau_linear, tau_activation)
            open_masks[channels.name] = ~closed.cpu()
            covered += _covered(layer, channels, closed, statistics, tau_linear)
    rows = sum(int(_quiet_rows(statistics, name, tau_linear).sum()) for name in statistics.outputs)
    columns = sum(int((x <= tau_linear).sum()) for x in statistics.inputs.values())
    return Quiet(open_masks, rows, columns, rows + columns - covered)


def _quiet_rows(statistics: ContextStatistics, name: str, tau: float) -> torch.Tensor:
    return torch.minimum(statistics.outputs[name], statistics.centred[name]) <= tau


def _quiet_head_lanes(
    layer: Layer, gate: Gate, statistics: ContextStatistics, tau: float
) -> torch.Tensor:
    """Lanes of o_proj's input, bool [H * D], that are quiet or whose v is.

    Attention averages v, so a constant v gives a constant lane.
    """
    family = layer.family
    value = _quiet_rows(statistics, f"{layer.name}.{family.qkv or family.kv[1]}", tau)
    if family.qkv:
        value = value[layer.fused_rows[2]]
    value = value.reshape(-1, gate.lanes)
    value = value.repeat_interleave(gate.size // len(value), 0).reshape(-1)
    return value | (statistics.inputs[statistics.readers[gate.name]] <= tau)


def _quiet_channels(
    layer: Layer, gate: Gate, statistics: ContextStatistics, tau: float, tau_activation: float
) -> torch.Tensor:
    read = statistics.inputs[statistics.readers[gate.name]]
    closed = read <= max(tau, tau_activation)
    single = layer.family.branches == 1
    for path in layer.family.up:
        name = f"{layer.name}.{path}"
        quiet = _quiet_rows(statistics, name, tau) if single else statistics.outputs[name] <= tau
        closed = closed | quiet.reshape(-1, gate.size).any(0)
    return closed


def _covered(
    layer: Layer, gate: Gate, closed: torch.Tensor, statistics: ContextStatistics, tau: float
) -> int:
    """Quiet rows and columns of linears that go with the closed units of a gate."""
    family = layer.family
    lanes = closed.repeat_interleave(gate.lanes)
    count = int((lanes & (statistics.inputs[statistics.readers[gate.name]] <= tau)).sum())
    rows = {}
    if gate.kind == "channels":
        branches = lanes.repeat(len(family.branch_offsets(gate.size)))
        rows = {path: branches for path in family.up}
    else:
        blocks = closed.reshape(-1, gate.spec.shared_size).all(1).repeat_interleave(gate.lanes)
        rows = {family.q: lanes, **{path: blocks for path in family.kv}}
        if family.qkv:
            rows = {family.qkv: layer.fused(lanes, blocks, blocks)}
    for path, gone in rows.items():
        count += int((gone & _quiet_rows(statistics, f"{layer.name}.{path}", tau)).sum())
    return count
