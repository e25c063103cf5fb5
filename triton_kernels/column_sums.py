"""Stage 2, kernels: the column sums that bias and gate gradients need, in one pass over dy."""

import torch
import triton
import triton.language as tl

from .open_sets import Axis, axis_tile, tile_unit

ROWS = 512  # rows that one program adds up


@triton.jit
def _column_sums_kernel(
    dy_ptr,  # [T, N]
    h_ptr,  # [T, N], dense, or None
    z_ptr,
    open_ptr,
    sum_ptr,  # fp32 [splits, N]: sum_t dy over the ROWS rows of each split
    dot_ptr,  # fp32 [splits, N] or None: sum_t dy * h
    T,
    N,
    stride_dym,
    stride_dyn,
    tiles_n,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid = tl.program_id(0)
    split = (pid // tiles_n).to(tl.int64)
    tile = pid % tiles_n
    unit = tile_unit(tile, open_ptr, N, GROUP, BLOCK_N)
    n, in_n, n_open, _ = axis_tile(tile, unit, open_ptr, z_ptr, N, GROUP, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    product = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tl.minimum(ROWS, T - split * ROWS), BLOCK_T):
        t = split * ROWS + start + tl.arange(0, BLOCK_T)
        mask = (t < T)[:, None] & n_open[None, :]
        dy_ptrs = dy_ptr + t[:, None] * stride_dym + n[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(dy, axis=0)
        if h_ptr is not None:
            h = tl.load(h_ptr + t[:, None] * N + n[None, :], mask=mask, other=0.0)
            product += tl.sum(dy * h.to(tl.float32), axis=0)
    tl.store(sum_ptr + split * N + n, total, mask=in_n)
    if h_ptr is not None:
        tl.store(dot_ptr + split * N + n, product, mask=in_n)


def column_sums(dy: torch.Tensor, h: torch.Tensor | None, axis: Axis):
    """(colsum(dy), colsum(dy * h) or None): fp32 [N], 0 on closed lanes; dy, h [T, N].

    dy takes any strides, h is dense or None, `axis` describes N and its gate. Partial sums of ROWS
    rows each are added in a fixed order.
    """
    t, n = dy.shape
    splits, width = triton.cdiv(t, ROWS), axis.width(128)
    total = dy.new_empty(splits, n, dtype=torch.float32)
    product = None if h is None else torch.empty_like(total)
    tiles_n = axis.tiles(width)
    if splits * tiles_n:
        _column_sums_kernel[(splits * tiles_n,)](
            dy, h, axis.z, axis.open_set, total, product, t, n, *dy.stride(), tiles_n,
            GROUP=axis.group, BLOCK_N=width, BLOCK_T=32, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return total.sum(0), None if product is None else product.sum(0)
