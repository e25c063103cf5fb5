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
    """One side of a matmul: its lanes and, if they are gated, the gate and its open set."""

    size: int
    z: torch.Tensor | None = None
    open_set: torch.Tensor | None = None
    group: int = 1

    def width(self, block: int) -> int:
        """Lanes per tile: `block`, or less so that tiles fill units of a head gate.

        A tile of a head gate must not cross its unit. Takes the widest power of two <= block that
        pads a unit by at most a quarter: 64 for group 64, 32 for 80 or 96, 128 for 128. A gathered
        tile is at most 64 wide: at 128, the addresses of x beside dx spill on sm_80 and sm_90.
        """
        if self.z is None:
            return block
        if self.group < GATHER_MAX.value:
            return min(block, 64)
        while block > 16 and 4 * triton.cdiv(self.group, block) * block > 5 * self.group:
            block //= 2
        return block

    def tiles(self, width: int) -> int:
        """Tiles in the worst case, all units open."""
        if self.z is None or self.group < GATHER_MAX.value:
            return triton.cdiv(self.size, width)
        return self.size // self.group * triton.cdiv(self.group, width)


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
def tile_unit(tile, open_ptr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The unit that tile number `tile` lies in, where tiles lie inside units; else an unused 0.

    A loop over tiles loads it one step ahead and carries it along: the loads of a step then depend
    on no load of the same step, which is what lets Triton keep all its pipeline stages. One step
    past the end is still inside the open set's tensor.
    """
    unit = tile * 0
    if open_ptr is not None:
        if GROUP >= GATHER_MAX:
            unit = tl.load(open_ptr + tile // ((GROUP + BLOCK - 1) // BLOCK))
    return unit


@triton.jit
def axis_tile(tile, unit, open_ptr, z_ptr, size, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Tile number `tile` of an axis: lanes int64, in range, open (bool), gate fp32; all [BLOCK].

    `unit` is tile_unit of the same tile.
    """
    i = tl.arange(0, BLOCK)
    if open_ptr is None:
        lane = tile * BLOCK + i
        valid = lane < size
        is_open = valid
        z = tl.full([BLOCK], 1.0, tl.float32)
    elif GROUP < GATHER_MAX:
        slot = tile * BLOCK + i
        valid = slot < size
        is_open = slot < tl.load(open_ptr + size // GROUP) * GROUP
        units = tl.load(open_ptr + slot // GROUP, mask=valid, other=0)
        lane = units * GROUP + slot % GROUP
        z = tl.load(z_ptr + units, mask=valid, other=0.0)
    else:
        tiles_per_unit: tl.constexpr = (GROUP + BLOCK - 1) // BLOCK
        within = (tile % tiles_per_unit) * BLOCK + i
        valid = within < GROUP
        is_open = valid & (tile < tl.load(open_ptr + size // GROUP) * tiles_per_unit)
        lane = unit * GROUP + within
        z = tl.zeros([BLOCK], tl.float32) + tl.load(z_ptr + unit)
    return lane.to(tl.int64), valid, is_open, z
