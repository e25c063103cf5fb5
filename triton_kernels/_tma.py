"""Stage 2, kernels: persistent programs, and operands fetched by the copy engine (TMA).

From sm_90 on, a tile whose rows are contiguous in memory can be fetched by one instruction from a
descriptor of the whole matrix, made on the host. It keeps no addresses in registers, masks nothing
and reads 0 outside of the matrix. Everything else is loaded through pointers: gathered lanes, other
strides and fp32, whose products are not made by the asynchronous matrix units unless TF32 is on.
"""

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import arch_of
from .open_sets import Axis


def describable(x: torch.Tensor) -> bool:
    """Whether a descriptor can describe x: the rule of the copy engine, for 16-bit matrices.

    Two dimensions, neither of size 0; the base and the stride of the first dimension multiples of
    16 bytes, the stride not 0; the last stride 1.
    """
    return (
        x.dim() == 2
        and x.dtype.itemsize == 2
        and x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) > 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def consecutive(axis: Axis, width: int, in_buffer: bool = False) -> bool:
    """Whether the lanes of every tile of an axis lie side by side: dense axes, and units of lanes
    that tiles fill exactly. in_buffer: in the activation, where those of a compact axis do too."""
    if axis.gathered:
        return in_buffer and axis.compact
    return axis.open_set is None or axis.group % width == 0


def has_tensor_memory(device: torch.device) -> bool:
    """sm_100 and sm_103: sums and gated operands live in 512 columns of tensor memory, and the copy
    engine gathers single rows."""
    return arch_of(device).startswith("sm_10")


def descriptor(x: torch.Tensor, *tile: int) -> TensorDescriptor | None:
    """A descriptor of x [rows, columns] for tiles of this shape, or None if x allows none."""
    return TensorDescriptor.from_tensor(x, list(tile)) if describable(x) else None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def program_count(tiles: int, persistent: int, device: torch.device) -> int:
    """Programs to launch for `tiles` tiles: one each, or `persistent` per multiprocessor, looping.

    Triton's interpreter counts as one multiprocessor.
    """
    if not persistent:
        return tiles
    return min(tiles, persistent * _multiprocessors(device))
