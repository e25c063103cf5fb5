"""Stage 5, pack: removes closed units while training goes on, from weights and moments alike."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from gatepack.distillation import Distilling
from gatepack.hf import gates_of
from gatepack.hooks import at_work
from gatepack.layers import Layer, hf_model, layers_of
from gatepack.masks import encode_mask, physical_mask
from gatepack.packing import (
    Cut,
    PackReport,
    apply_masks,
    kept_record,
    refuse_opaque,
    report_of,
    sizes_of,
)
from gatepack.sharding import has_ranks

if TYPE_CHECKING:
    from gatepack.gate_training import GateTraining
    from gatepack.methods.close_and_repair import Closing


@torch.no_grad()
def remove_closed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    training: "GateTraining | Closing | None" = None,
) -> PackReport:
    """Removes for good the units that are closed by hand or by rounding, and trains on without.

    Weights, LoRA factors, gradients, the optimizers' moments and the gates themselves lose them, so
    that memory and time shrink; the rest goes on as if they were only closed: the same losses to
    rounding, the same budget, of the dense model, and the same noise (drawn anew by kernels). What
    closes by its logit alone may reopen, so it stays: see GateSet.close. optimizer: of the weights,
    one or several. training: what steps the gates, a GateTraining or what CloseAndRepair started.
    Call it between steps. A saved model (save_pretrained) comes back with the units that are left.
    With equal_layers, layers that were alike end alike: the widths of the narrowest are what the
    others can have. Raises ValueError, before anything has changed, for gates on rows and columns,
    adapters that cannot be sliced, moments of which the part that stays is not known, several
    ranks, another kind of training, a distillation from the model's own dense weights, or if
    training could not round what is left to the target.
    """
    root = hf_model(model)
    gates = gates_of(root)
    layers = layers_of(root)
    if gates.config.of_linears:
        raise ValueError("model: expected gates on heads and channels to remove units of")
    if training is not None and not hasattr(training, "check_left"):
        raise ValueError(
            "training: expected a GateTraining, what CloseAndRepair started, or None, got a "
            f"{type(training).__name__}, which cannot go on with fewer units"
        )
    if any(one.method.teacher is None for one in at_work(root._forward_hooks, Distilling)):
        raise ValueError(
            "model: its own dense weights teach it, which needs all units: stop() the distillation "
            "first, or start it with Distillation(teacher=...)"
        )
    if has_ranks() and dist.get_world_size() > 1:
        raise ValueError(
            "model: expected one rank, because DistributedDataParallel and FSDP hold on to the "
            "weights as they were; save the model, remove and start anew"
        )
    refuse_opaque(layers)
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    _check_state(layers, optimizers)
    stays = gates.split(~gates.closed.cpu())
    masks = {
        name: physical_mask(gate.kind, gate.spec.shared_size, stays[name])
        for name, gate in gates.items()
    }
    if training is not None:
        try:
            training.check_left(masks)
        except ValueError as error:
            raise ValueError(
                f"model: without the units that are closed, {error}; or reopen some of them with "
                "GateSet.reopen"
            ) from error
    rows = [(n, gate.kind, gate.size, int(masks[n].sum())) for n, gate in gates.items()]
    padded = sum(int((masks[name] & ~stays[name]).sum()) for name in masks)
    before, total = sizes_of(root, layers, gates), gates.costs.total
    gates.attachment.release()
    specs = {name: gate.spec for name, gate in gates.items()}
    apply_masks(layers, specs, masks, None, lambda cut, new: _follow(cut, new, optimizers))
    kept = gates.forget(masks)
    root.config.gatepack = {
        **root.config.gatepack,
        **kept_record(root.config, masks),
        "total": total,
        "attached": {
            name: {**encode_mask(mask), "shared_size": shared}
            for name, (mask, shared) in gates.attached().items()
        },
    }
    gates.attachment.renew(layers)
    if hasattr(training, "follow"):  # of moments; CloseAndRepair has none
        training.follow(kept)
    return report_of(rows, before, sizes_of(root, layers, gates), padded)


def _check_state(layers: list[Layer], optimizers: list[torch.optim.Optimizer]) -> None:
    """ValueError where an optimizer keeps of a linear what cannot be cut."""
    linears = (layer.module.get_submodule(p) for layer in layers for p in layer.family.linears)
    for parameter in (parameter for linear in linears for parameter in linear.parameters()):
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and _dimensions(key, value, parameter) is None:
                    raise ValueError(
                        f"optimizer: {type(optimizer).__name__} keeps {key!r} {list(value.shape)} "
                        f"of a weight {list(parameter.shape)}, and which part of that is of the "
                        "units that stay is not known: leave it out, and start a new one after "
                        "this"
                    )


def _follow(cut: Cut, new: nn.Parameter, optimizers: list[torch.optim.Optimizer]) -> None:
    """Puts a new parameter, with its part of gradient and moments, in the place of the old."""
    old = cut.parameter
    if old.grad is not None:
        new.grad = cut.of(old.grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = {
                key: _part(cut, key, value) if isinstance(value, torch.Tensor) else value
                for key, value in optimizer.state.pop(old).items()
            }


def _part(cut: Cut, key: str, value: torch.Tensor) -> torch.Tensor:
    dimensions = _dimensions(key, value, cut.parameter)
    kept = tuple(None if d is None else cut.kept[d] for d in dimensions)
    return replace(cut, kept=kept).of(value)


def _dimensions(key: str, value: torch.Tensor, of: nn.Parameter) -> list[int | None] | None:
    """Which dimension of a parameter each one of an optimizer's tensor is, None: of no one, as all
    of a scalar; None if that cannot be told.

    Adafactor keeps means over rows and columns: torch's with a dimension of 1 in their place,
    transformers' without one.
    """
    axes = list(range(of.dim()))
    if value.numel() == 1:
        return [None] * value.dim()
    fits = (n in (1, m) for n, m in zip(value.shape, of.shape, strict=False))
    if value.dim() == of.dim() and all(fits):
        return [axis if n > 1 else None for axis, n in zip(axes, value.shape, strict=True)]
    for name, rest in (("row", axes[:-1]), ("col", axes[:-2] + axes[-1:])):
        if key.endswith(name) and list(value.shape) == [of.shape[axis] for axis in rest]:
            return rest
    return None
