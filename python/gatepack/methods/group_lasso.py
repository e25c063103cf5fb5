"""Stage 4, methods: pushes LoRA's rows and columns of pruned units to zero: lasso and proximal."""

from collections.abc import Iterator

import torch
from torch import nn

from gatepack.methods.masked_lora import Decisions
from gatepack.modules import adapters_of
from gatepack.sharding import replicated, whole

EPSILON = 1e-8


def _groups(root: nn.Module, decisions: Decisions) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(index into the decisions, factor [groups, r]): rows of B, or columns of A, of each LoRA."""
    for place in decisions.layout.places:
        for adapter in adapters_of(root.get_submodule(place.name)):
            factor = adapter.a.t() if place.rows is None else adapter.b
            yield decisions.index[place.name], factor


def _squares(factor: torch.Tensor) -> torch.Tensor:
    """|w_j|^2 of each group of a factor, sharded over ranks or not: whole on each, in its dtype."""
    return whole(factor.square().sum(1))


def lasso(root: nn.Module, decisions: Decisions) -> torch.Tensor:
    """sum over rows and columns j of sqrt(|(1 - m_j) w_j|^2 + 1e-8) / (3 layers), a scalar.

    Every row of B (q, k, v, gate, up) and column of A (out, down) is a group of its own. The
    constant 1e-4 that each group adds is taken off, so that 0 means that all pruned groups are 0.
    Source: ATP, arXiv 2412.14426, first version of its code.
    """
    total = None
    for index, factor in _groups(root, decisions):
        pruned = (~decisions.hard)[index].to(factor.dtype)
        square = pruned * _squares(factor)
        norms = ((square + EPSILON).sqrt() - torch.full_like(square, EPSILON).sqrt()).sum()
        total = norms if total is None else total + norms
    return total / (3 * decisions.layout.layers)


@torch.no_grad()
def proximal(root: nn.Module, decisions: Decisions, strength: float) -> None:
    """w_j <- w_j / n_j * max(0, n_j - strength * pruned of its vector / pruned in all), in place.

    For pruned units j; n_j is the joint norm of all rows and columns of a unit. What is kept is
    not touched. Source: ATP, second version of its code.
    """
    hard, layout = decisions.hard, decisions.layout
    squares = torch.zeros(len(hard), dtype=torch.float32, device=hard.device)
    groups = list(_groups(root, decisions))
    for index, factor in groups:
        squares = squares.index_put((index,), _squares(factor.float()), accumulate=True)
    pruned = (~hard).reshape(layout.layers, -1).float()
    shares = [part.sum(1, keepdim=True).expand_as(part) for part in pruned.split(layout.lengths, 1)]
    share = torch.cat(shares, 1).reshape(-1) / pruned.sum().clamp(min=1)
    norms = squares.sqrt()
    shrunk = (norms - strength * share).clamp(min=0) / norms.clamp(min=1e-30)
    scale = torch.where(hard, 1.0, shrunk)
    for index, factor in groups:
        factor *= replicated(scale[index][:, None].to(factor.dtype), factor)
