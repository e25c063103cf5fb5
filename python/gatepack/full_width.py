"""Stage 3, modules: which linears stay whole on a CPU, because packing them would cost more.

A linear [N, K] is packed to its open rows and columns for each product, or stays whole between two
multiplications by its gates, closed ones 0. Both give the same values and gradients; what is
cheaper goes by counted work, so that the same shapes always take the same way.
"""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gatepack.modules import Site
    from gatepack.samples import Open

# What packing an element of W twice (for forward and backward), moving a lane of a token in one and
# back in the other, and multiplying it by its gate in both take on a CPU, in multiply-adds of the
# matmul (fp32, one thread and two, linears of 384 to 3,072: benchmarks/levels/finegates_step.py).
PACK, MOVE, MULTIPLY = 30, 7, 5


def tokens_at_full_width(shape: tuple[int, int], kept: tuple[int, int]) -> float:
    """Up to how many tokens a linear [N, K] is cheaper whole than packed to kept (|R|, |C|), or,
    where that is all of it, than with its gates folded into the weight.

    For forward and backward without a weight gradient; inf where packing never pays.
    """
    (n, k), (r, c) = shape, kept
    if (r, c) == (n, k):
        return PACK * n * k / (MULTIPLY * max(n + k, 1))
    moved = (k if c < k else 0) + (n if r < n else 0)
    saved = 2 * (n * k - r * c) - MOVE * moved
    return PACK * r * c / saved if saved > 0 else math.inf


def full_width_limit(
    site: "Site", shape: tuple[int, int], open_in: int | None, open_out: int | None
) -> float:
    """tokens_at_full_width of a linear at a site with so many open units (None: no gate).

    0 for heads and channels, whose rows other linears leave out. Between the linears of an MLP,
    which must agree, the side that differs among them says nothing.
    """
    gates = [gate for gate in (site.in_gate, site.out_gate) if gate is not None]
    if site.rows_gate is not None or any(g.kind not in ("rows", "columns") for g in gates):
        return 0
    n, k = shape
    rows = n if open_out is None or site.compact_in else open_out
    columns = k if open_in is None or site.compact_out else open_in
    return tokens_at_full_width(shape, (rows, columns))


def stays_whole(
    site: "Site",
    shape: tuple[int, int],
    x: torch.Tensor,
    in_open: "Open | None",
    out_open: "Open | None",
) -> bool:
    """Whether closed units of a linear's own gates stay in its product with x [*, K]."""
    if x.device.type != "cpu" or x.shape[-1] != shape[1]:
        return False
    counts = (None if side is None else side.count for side in (in_open, out_open))
    return math.prod(x.shape[:-1]) <= full_width_limit(site, shape, *counts)
