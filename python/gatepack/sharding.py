"""Stage 1, gates: what several ranks share, and which tensors FSDP2 has sharded over them."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def has_ranks() -> bool:
    """Whether torch.distributed runs, be it with one rank."""
    return dist.is_available() and dist.is_initialized()


def over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks; the tensor itself without torch.distributed."""
    if not has_ranks():
        return tensor
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def from_first_rank(tensors: Iterable[torch.Tensor]) -> None:
    """Writes what the first rank has over the tensors of all; nothing without torch.distributed."""
    if has_ranks():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a rank holds only its part of a tensor (torch.distributed.fsdp.fully_shard)."""
    if not has_ranks():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; every rank must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def replicated(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that is the same on every rank, as an operand beside one that may be sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def sharding_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that fully_shard has changed, also while they hold whole parameters."""
    if not has_ranks():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Gives back the whole parameters that a forward without a backward has left.

    What is written to those is lost, and they do not say that a model is sharded.
    """
    for module in sharding_modules(model):
        module.reshard()


def refuse_sharded(model: nn.Module, what: str, remedy: str) -> None:
    """ValueError for a model with a sharded parameter: what cannot be done, and what to do."""
    name = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if name is not None:
        raise ValueError(f"model: {name} is sharded over ranks, so {what}; {remedy}")
