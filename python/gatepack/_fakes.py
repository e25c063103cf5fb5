"""Stage 5, pack: what each op of torch.ops.gatepack returns, in shape, dtype and order alone."""

import torch
from torch import Tensor

from gatepack._reference import E4M3, empty_like_order, rounded_up


def _kept(index: Tensor | None, size: int) -> int:
    return size if index is None else index.shape[0]


def fold_pack_fake(w, rows, cols=None, z_out=None, z_in=None, dtype=None, stream=False):
    return empty_like_order(w, _kept(rows, w.shape[0]), _kept(cols, w.shape[1]), dtype or w.dtype)


def fold_pack_adjoint_fake(g, rows, cols, z_out, z_in, O, I, dtype):
    return empty_like_order(g, O, I, dtype or g.dtype)


def pack_tensors_fake(
    w, rows, cols, z_out, z_in, a, b, s, row_multiple, col_multiple, order, dtype
):
    packed, scales = [], []
    for full, r, c, rm, cm, o in zip(w, rows, cols, row_multiple, col_multiple, order, strict=True):
        m = rounded_up(_kept(r, full.shape[0]), rm)
        n = rounded_up(_kept(c, full.shape[1]), cm)
        packed.append(empty_like_order(full, m, n, dtype or full.dtype, o))
        if dtype == E4M3:
            scales.append(full.new_empty(m, dtype=torch.float32))
    return packed, scales


def unpack_tensors_fake(g, rows, cols, z_out, z_in, O, I, dtype):
    return [
        empty_like_order(compact, m, n, dtype or compact.dtype)
        for compact, m, n in zip(g, O, I, strict=True)
    ]


def out_fake(*arguments):
    return None


def open_sets_fake(masks):
    return [mask.new_empty(mask.shape[0] + 1, dtype=torch.int32) for mask in masks]


def remap_ids_fake(ids, table):
    return torch.empty_like(ids)


def open_linear_fake(x, w, bias, rows, cols, z_out, z_in, out_lanes, in_lanes):
    return x.new_empty(x.shape[0], _kept(rows, w.shape[0]))


def open_linear_backward_fake(dy, x, y, w, rows, cols, z_out, z_in, out_lanes, in_lanes):
    dz_out = dy.new_empty(0 if y is None else z_out.shape[0], dtype=torch.float32)
    dz_in = dy.new_empty(0 if x is None else z_in.shape[0], dtype=torch.float32)
    return dy.new_empty(dy.shape[0], _kept(cols, w.shape[1])), dz_out, dz_in


def swiglu_fake(a, u, z=None):
    return torch.empty_like(a)


def swiglu_backward_fake(dh, a, u, z=None):
    return torch.empty_like(a), torch.empty_like(u), a.new_empty(0 if z is None else z.shape[0])


def gate_lanes_fake(x, z, lanes):
    return torch.empty_like(x)


def gate_lanes_backward_fake(dy, x, z, lanes):
    return torch.empty_like(x), torch.empty_like(z)


def column_products_fake(a, b):
    return a.new_empty(a.shape[1], dtype=torch.float32)
