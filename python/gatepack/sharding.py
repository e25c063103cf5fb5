"""Stage 1, gates: what several ranks share, and which tensors FSDP2 has sharded over them."""

import torch
import torch.distributed as dist
from torch import nn


def over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks; the tensor itself without torch.distributed."""
    if not dist.is_available() or not dist.is_initialized():
        return tensor
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a rank holds only its part of a tensor (torch.distributed.fsdp.fully_shard)."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; every rank must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def refuse_sharded(model: nn.Module, what: str, remedy: str) -> None:
    """ValueError for a model with a sharded parameter: what cannot be done, and what to do."""
    name = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if name is not None:
        raise ValueError(f"model: {name} is sharded over ranks, so {what}; {remedy}")
