"""Stage 2, kernels: open sets, and how a kernel walks the open part of an axis.

An axis of `size` lanes is gated in units of GROUP lanes: 1 for channel gates, head_dim for head
gates. Its open set is one int32 tensor of G + 1 entries, G = size / GROUP:

    [ open units, ascending | closed units, ascending | number of open units ]
      0 .. count-1            count .. G-1              G

The count stays on the device: grids are sized for the worst case (all open), and a program reads
the count to learn whether its tile holds work. Since the closed units follow the open ones, the
programs past the count are the ones that write the zeros of the closed lanes.

The axis is cut into tiles of BLOCK lanes in one of three ways, all known at compile time:

    no open set          tile i is lanes i*BLOCK ..: the plain dense axis
    GROUP <  GATHER_MAX  tile i is BLOCK slots of the list of open lanes: a gather
    GROUP >= GATHER_MAX  tile i lies inside one unit, so that its loads stay contiguous

The activation beside a gated axis is `size` columns wide, one for each lane, or compact: a
[T, capacity] buffer whose column i belongs to lane i of the list of open lanes (unit by unit, in
the order of the open set). Weights and gates are indexed by lane either way. Tiles of a compact
axis run along the list, so that the loads and stores of the activation are contiguous whatever is
closed. A kernel that reads such a buffer loads the last tile whole: from the open count to the next
multiple of 256 the columns hold 0 (a kernel that writes a buffer stores them); beyond, nothing is
read. The capacity is a host number that fixes shapes and grids; if more lanes are open than it
holds, every output that depends on the buffer is NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import check_device

GATHER_MAX = tl.constexpr(16)


def open_set_ref(z: torch.Tensor) -> torch.Tensor:
    """[units with z != 0, units with z == 0, count of z != 0]; z [G] -> int32 [G + 1]."""
    closed = z == 0
    order = torch.argsort(closed, stable=True)
    return torch.cat([order, (~closed).sum().view(1)]).to(torch.int32)


@triton.jit
def _open_set_fwd_kernel(z_ptr, open_ptr, G, stride_z, BLOCK: tl.constexpr):
    n_open = 0
    for start in range(0, G, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + unit.to(tl.int64) * stride_z, mask=unit < G, other=0.0)
        n_open += tl.sum((z != 0).to(tl.int32), axis=0)
    tl.store(open_ptr + G, n_open)
    open_before = 0
    for start in range(0, G, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + unit.to(tl.int64) * stride_z, mask=unit < G, other=0.0)
        is_open = (z != 0).to(tl.int32)
        open_until = open_before + tl.cumsum(is_open, axis=0)
        slot = tl.where(is_open > 0, open_until - 1, n_open + unit - open_until)
        tl.store(open_ptr + slot, unit, mask=unit < G)
        open_before += tl.sum(is_open, axis=0)


def open_set(z: torch.Tensor) -> torch.Tensor:
    """Launch the kernel: z [G] on a GPU -> int32 [G + 1]."""
    out = torch.empty(z.numel() + 1, dtype=torch.int32, device=z.device)
    block = min(4096, max(128, triton.next_power_of_2(z.numel())))
    with torch.cuda.device_of(z):
        _open_set_fwd_kernel[(1,)](z, out, z.numel(), z.stride(0), BLOCK=block, num_warps=8)
    return out


@torch.library.custom_op("gatepack::open_set", mutates_args=(), schema="(Tensor z) -> Tensor")
def _open_set(z):
    if z.dim() != 1:
        raise ValueError(f"z: expected one dimension, got shape {tuple(z.shape)}")
    check_device("open_set", z)
    return open_set(z)


@_open_set.register_fake
def _(z):
    return z.new_empty(z.shape[0] + 1, dtype=torch.int32)


def open_set_fn(z: torch.Tensor) -> torch.Tensor:
    """[units with z != 0, units with z == 0, count of z != 0], without a host sync.

    z fp32 [G] (any stride) -> int32 [G + 1]. One launch of one program; no gradient. NaN counts as
    open, so that it reaches the output of the op that uses the gate.
    Refuses: z that is not one-dimensional; tensors that are not on a GPU.
    """
    return torch.ops.gatepack.open_set(z)


class Axis(NamedTuple):
    """One side of a matmul: its lanes and, if they are gated, the gate and its open set.

    z None beside an open set: the lanes are skipped, but the gate is applied elsewhere.
    compact: the activation holds open lanes only, `capacity` columns (None: size), a multiple of
    the group.
    """

    size: int
    z: torch.Tensor | None = None
    open_set: torch.Tensor | None = None
    group: int = 1
    compact: bool = False
    capacity: int | None = None

    @property
    def columns(self) -> int:
        """Columns of the activation beside this axis."""
        return self.size if self.capacity is None else self.capacity

    @property
    def gathered(self) -> bool:
        """Whether a tile is made of lanes from all over the axis."""
        return self.open_set is not None and self.group < GATHER_MAX.value

    def width(self, block: int) -> int:
        """Lanes per tile: `block`, or less so that tiles fill units of a head gate.

        A tile of a head gate must not cross its unit. Takes the widest power of two <= block that
        pads a unit by at most a quarter: 64 for group 64, 32 for 80 or 96, 128 for 128. A gathered
        tile is at most 64 wide: at 128, the addresses of x beside dx spill on sm_80 and sm_90.
        Those of a compact activation are one row of addresses.
        """
        if self.open_set is None:
            return block
        if self.gathered:
            return min(block, 128 if self.compact else 64)
        while block > 16 and 4 * triton.cdiv(self.group, block) * block > 5 * self.group:
            block //= 2
        return block

    def tiles(self, width: int, lanes: int | None = None) -> int:
        """Tiles in the worst case, all units open; lanes: of the first ones (None: all)."""
        lanes = self.size if lanes is None else lanes
        if self.open_set is None or self.gathered:
            return triton.cdiv(lanes, width)
        return lanes // self.group * triton.cdiv(self.group, width)


@triton.jit
def open_tiles(open_ptr, size, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of an axis that hold at least one open lane: a device scalar."""
    if open_ptr is None:
        tiles = tl.cdiv(size, BLOCK)
    else:
        count = tl.load(open_ptr + size // GROUP)
        if GROUP < GATHER_MAX:
            tiles = tl.cdiv(count * GROUP, BLOCK)
        else:
            tiles = count * tl.cdiv(GROUP, BLOCK)
    return tiles


@triton.jit
def tile_unit(tile, open_ptr, size, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Units that tile number `tile` is made of: [BLOCK] if gathered, one if inside it, else unused.

    A loop over tiles loads them one step ahead and carries them along: the loads of a step then
    depend on no load of the same step, which is what lets Triton keep all its pipeline stages. One
    step past the end is still inside the open set's tensor.
    """
    unit = tile * 0
    if open_ptr is not None:
        if GROUP < GATHER_MAX:
            slot = tile * BLOCK + tl.arange(0, BLOCK)
            unit = tl.load(open_ptr + slot // GROUP, mask=slot < size, other=0)
        else:
            unit = tl.load(open_ptr + tile // ((GROUP + BLOCK - 1) // BLOCK))
    return unit


@triton.jit
def axis_tile(tile, unit, open_ptr, z_ptr, size, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Tile number `tile` of an axis: lanes int64, in range, open (bool), gate fp32; all [BLOCK].

    `unit` is tile_unit of the same tile.
    """
    i = tl.arange(0, BLOCK)
    z = tl.full([BLOCK], 1.0, tl.float32)
    if open_ptr is None:
        lane = tile * BLOCK + i
        valid = lane < size
        is_open = valid
    else:
        if GROUP < GATHER_MAX:
            slot = tile * BLOCK + i
            valid = slot < size
            is_open = slot < tl.load(open_ptr + size // GROUP) * GROUP
            lane = unit * GROUP + slot % GROUP
        else:
            tiles_per_unit: tl.constexpr = (GROUP + BLOCK - 1) // BLOCK
            within = (tile % tiles_per_unit) * BLOCK + i
            valid = within < GROUP
            is_open = valid & (tile < tl.load(open_ptr + size // GROUP) * tiles_per_unit)
            lane = unit * GROUP + within
        if z_ptr is not None:
            z *= tl.load(z_ptr + unit)
    return lane.to(tl.int64), valid, is_open, z


@triton.jit
def tile_start(
    tile, unit, open_ptr, GROUP: tl.constexpr, BLOCK: tl.constexpr, COMPACT: tl.constexpr
):
    """The first lane of a tile whose lanes are consecutive; COMPACT: its first column instead."""
    start = tile * BLOCK
    if open_ptr is not None:
        if GROUP >= GATHER_MAX:
            tiles_per_unit: tl.constexpr = (GROUP + BLOCK - 1) // BLOCK
            if COMPACT:
                unit = tile // tiles_per_unit
            start = unit * GROUP + tile % tiles_per_unit * BLOCK
    return start


@triton.jit
def tile_columns(
    tile, unit, lane, valid, is_open, open_ptr, columns, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    COMPACT: tl.constexpr
):  # fmt: skip
    """Columns of the activation beside a tile of lanes: int64, in range, to be read; all [BLOCK].

    `lane`, `valid` and `is_open` are axis_tile's. For a compact axis the columns are consecutive,
    and those to be read do not depend on the open count, so that loads of them are wide.
    """
    column = lane
    if COMPACT:
        start = tile_start(tile, unit, open_ptr, GROUP, BLOCK, COMPACT)
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        valid = valid & (column < columns)
        is_open = valid
    return column, valid, is_open


@triton.jit
def open_first(tile, tiles_m, open_n, GROUP_M: tl.constexpr):
    """(row, column) of output tile number `tile`: those of the first open_n columns come first.

    Tiles without work then come last, and programs that loop over tiles share the work evenly.
    """
    if tile < tiles_m * open_n:
        m, n = tl.swizzle2d(tile // open_n, tile % open_n, tiles_m, open_n, GROUP_M)
    else:
        rest = tile - tiles_m * open_n
        m, n = rest % tiles_m, open_n + rest // tiles_m
    return m, n


@triton.jit
def overflows(open_ptr, size, columns, GROUP: tl.constexpr):
    """Whether more lanes are open than a compact activation has columns."""
    return tl.load(open_ptr + size // GROUP) * GROUP > columns
