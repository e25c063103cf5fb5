"""Stage 2, kernels: what the kernels of a gated MLP share.

The F channels of the MLP are walked as slots: slot i is the i-th open channel, and a compact tensor
[T, C] holds the first C = capacity slots. Weights are read where they lie, row by row of the open
set; without an open set slot i is channel i and every tile is dense. From the open count to the
next multiple of SLACK compact tensors hold zeros, and nothing reads them beyond.
"""

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import dot, offsets
from ._configs import WIDEST
from ._tma import descriptor
from .gated_matmul import gated_matmul, gated_outer
from .open_sets import Axis

SLACK = tl.constexpr(WIDEST)  # no tile of slots is wider


class Branch(NamedTuple):
    """One linear of the MLP: w x + scale B (A x) + bias."""

    w: torch.Tensor | None
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]


class Slots(NamedTuple):
    """The channels of the MLP: F of them, C slots, and what the gate says (open_sets)."""

    channels: int
    capacity: int
    z: torch.Tensor | None = None
    open_set: torch.Tensor | None = None

    @property
    def axis(self) -> Axis:
        """For gated_matmul and gated_outer; the gate is already in what they read."""
        return Axis(self.channels, None, self.open_set, compact=True, capacity=self.capacity)


@triton.jit
def slot_tile(tile, open_ptr, F, C, BLOCK: tl.constexpr):
    """Tile number `tile` of the slots: slot, lane, open (bool); all [BLOCK]."""
    slot = tile * BLOCK + tl.arange(0, BLOCK)
    if open_ptr is None:
        lane = slot
        is_open = slot < F
    else:
        is_open = slot < tl.minimum(tl.load(open_ptr + F), C)
        lane = tl.load(open_ptr + slot, mask=is_open, other=0)
    return slot, lane, is_open


@triton.jit
def slot_gate(z_ptr, open_ptr, lane, is_open, F, C):
    """Gate of each slot, fp32 [BLOCK]; NaN if more than C channels are open: y must show it."""
    z = tl.full(lane.shape, 1.0, tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + lane, mask=is_open, other=0.0)
    if open_ptr is not None:
        z = tl.where(tl.load(open_ptr + F) > C, float("nan"), z)
    return z


@triton.jit
def open_slots(open_ptr, F, C):
    """Slots in use: a device scalar."""
    if open_ptr is None:
        n = C
    else:
        n = tl.minimum(tl.load(open_ptr + F), C)
    return n


@triton.jit
def slack_tiles(n_open, C, BLOCK: tl.constexpr):
    """Tiles of slots up to the multiple of SLACK that follows the open count."""
    return tl.cdiv(tl.minimum(tl.cdiv(n_open, SLACK) * SLACK, C), BLOCK)


@triton.jit
def slot_place(tile, tiles_m, open_n, GROUP_M: tl.constexpr):
    """(tile of rows, tile of slots, whether slots are open there) of one [rows, slots] tile.

    Tiles without an open slot come last, so that persistent programs share the work evenly.
    """
    is_work = tile < tiles_m * open_n
    size_n = tl.maximum(open_n, 1)
    first = tl.where(is_work, tile, 0)
    m, n = tl.swizzle2d(first // size_n, first % size_n, tiles_m, size_n, GROUP_M)
    return tl.where(is_work, m, tile % tiles_m), tl.where(is_work, n, tile // tiles_m), is_work


@triton.jit
def load_tile(
    ptr, row_start, row, in_rows, col_start, col, in_cols, stride_row, stride_col, TMA: tl.constexpr
):
    """[rows, cols] of a matrix: through its descriptor, or through pointers."""
    if TMA:
        tile = ptr.load([row_start, col_start])
    else:
        ptrs = ptr + offsets(row, stride_row, col, stride_col)
        tile = tl.load(ptrs, mask=in_rows[:, None] & in_cols[None, :], other=0.0)
    return tile


@triton.jit
def add_low_rank(
    acc,  # [rows, cols]
    p_ptr,  # [T, WIDTH], dense: RANK columns from FIRST on
    q_ptr,  # [cols, RANK]
    row,
    in_rows,
    col,
    in_cols,
    stride_qn,
    stride_qr,
    FIRST: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """acc + p q^T."""
    BLOCK: tl.constexpr = 16 if RANK <= 16 else 32
    for start in tl.range(0, RANK, BLOCK, num_stages=1):
        r = start + tl.arange(0, BLOCK)
        in_rank = r < RANK
        p_mask = in_rows[:, None] & in_rank[None, :]
        p = tl.load(p_ptr + FIRST + offsets(row, WIDTH, r, 1), mask=p_mask, other=0.0)
        q_mask = in_rank[:, None] & in_cols[None, :]
        q = tl.load(q_ptr + offsets(r, stride_qr, col, stride_qn), mask=q_mask, other=0.0)
        acc = dot(p, q, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit
def activation(a, ACT: tl.constexpr):
    """act(a) and its derivative, fp32."""
    if ACT == "silu":
        s = tl.sigmoid(a)
        value = a * s
        slope = s + value * (1.0 - s)
    elif ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        value = a * cdf
        slope = cdf + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        value = a * s
        slope = s + value * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * a * a))
    else:
        tl.static_assert(ACT == "relu")
        value = tl.where(a < 0, 0.0, a)
        slope = tl.where(a > 0, 1.0, 0.0)
    return value, slope


@triton.jit
def column_part(x, INDEX: tl.constexpr, LEVELS: tl.constexpr):
    """Part number INDEX of the columns of x [rows, cols], cut into 2^LEVELS parts."""
    for level in tl.static_range(LEVELS):
        pair = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(pair)
        if (INDEX >> (LEVELS - 1 - level)) & 1:
            x = right
        else:
            x = left
    return x


def by_descriptor(tensors, tile, rows, columns):
    """(tensors or their descriptors for tiles [rows, columns], whether they are descriptors)."""
    if tile.persistent:
        described = [x if x is None else descriptor(x, rows, columns) for x in tensors]
        if not any(d is None and x is not None for d, x in zip(described, tensors, strict=True)):
            return described, True
    return tensors, False


def strides_of(*tensors):
    """Strides of matrices, one after the other; zeros for None."""
    return [s for x in tensors for s in ((0, 0) if x is None else x.stride())]


def project(x, branches):
    """scale * x A^T of the branches with LoRA, side by side: [T, sum of ranks], or None.

    One product where the scales agree, so that x is read once.
    """
    used = [branch for branch in branches if branch.rank]
    if not used:
        return None
    if len({branch.scale for branch in used}) == 1:
        return scaled_mm(x, joined([b.lora_a for b in used]).t(), used[0].scale)
    return joined([scaled_mm(x, b.lora_a.t(), b.scale) for b in used], dim=1)


def joined(parts, dim=0):
    """torch.cat of matrices, or None. Autocast refuses one of 16-bit parts in another dtype than
    its own, and leaves one into a given tensor alone."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat(parts, dim, out=parts[0].new_empty(0))


def scaled_mm(left, right, scale):
    """scale * left right, scaled before the rounding; autocast leaves it alone, as product."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scale)


def slots_times(d, w, slots, tile, alpha=1.0):
    """alpha * d w^T over the open slots: [T, r]; d [T, C], w [r, F] low-rank."""
    if slots.open_set is None:
        return scaled_mm(d, w.t(), alpha)
    rank = w.shape[0]
    return gated_matmul(d, w, slots.axis, Axis(rank), _as_wide(tile, rank), alpha=alpha)[0]


def slots_outer(d, x, slots, tile, like):
    """d^T x laid out as `like` [F, N], closed rows 0; d [T, C], x [T, N]."""
    if slots.open_set is None:
        return torch.mm(d.t(), x, out=torch.empty_like(like))
    n = x.shape[1]
    return gated_outer(d, x, slots.axis, Axis(n), _as_wide(tile, n), like)


def _as_wide(tile, columns):
    """The tile, narrowed to a matrix of few columns."""
    width = min(tile.block_n, max(16, triton.next_power_of_2(columns)))
    return dataclasses.replace(tile, block_n=width)
