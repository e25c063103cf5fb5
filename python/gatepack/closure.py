"""Stage 5, pack: removes closed units while training goes on, from weights and moments alike."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from gatepack.distillation import Distilling
from gatepack.hf import gates_of
from gatepack.hooks import at_work
from gatepack.layers import hf_model, layers_of
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
    adapters that cannot be sliced, several ranks, another kind of training, a distillation from the
    model's own dense weights, or if training could not round what is left to the target.
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
                key: cut.of(value) if _is_like(value, old) else value
                for key, value in optimizer.state.pop(old).items()
            }


def _is_like(value, parameter: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape
