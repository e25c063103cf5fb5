"""torch.library.opcheck of every op of csrc: schema, registrations, fake tensors, tracing."""

import pytest
import torch
from matrices import gate, matrix

from gatepack import _ext
from gatepack._reference import E4M3

DTYPES = (torch.float32, torch.bfloat16)
ROWS, COLS = torch.tensor([0, 3, 4]), torch.arange(1, 40, 2)
PART = (ROWS, COLS, gate(3, 1), gate(20, 2))


def op(name):
    _ext.backend()
    return getattr(torch.ops.gatepack, name).default


def fold_pack():
    for column_major in (False, True):
        w = matrix(6, 40, torch.float32, column_major).requires_grad_()
        for dtype in (None, torch.bfloat16):
            yield w, *PART, dtype
            yield w, None, None, None, None, dtype
    yield w, *PART, None, True


def fold_pack_adjoint():
    for column_major in (False, True):
        g = matrix(3, 20, torch.float32, column_major).requires_grad_()
        for dtype in (None, torch.bfloat16):
            yield g, *PART, 6, 40, dtype


def pack_tensors(dtypes=(None, torch.bfloat16, E4M3)):
    w = [matrix(6, 40, torch.float32), matrix(5, 3, torch.float32, True)]
    rows, cols = [torch.tensor([0, 3]), None], [None, torch.tensor([1])]
    lora = [matrix(2, 40, torch.float32), None], [matrix(6, 2, torch.float32), None]
    none = [None, None]
    for dtype in dtypes:
        yield w, rows, cols, none, none, *lora, [0.5, 1.0], [4, 1], [1, 8], [2, 1], dtype


def pack_tensors_out():
    # opcheck compares written arguments by an allclose that e4m3 lacks.
    for arguments in pack_tensors((None, torch.bfloat16)):
        yield *arguments, *op("pack_tensors")(*arguments)


def unpack_tensors():
    g = [matrix(2, 40, torch.float32), matrix(5, 1, torch.float32, True)]
    rows, cols, none = [torch.tensor([0, 3]), None], [None, torch.tensor([1])], [None, None]
    yield g, rows, cols, none, none, [6, 5], [40, 3], torch.bfloat16


def unpack_tensors_out():
    for arguments in unpack_tensors():
        yield *arguments, op("unpack_tensors")(*arguments)


def linears():
    """x, dy, w, bias and the open part with its gates, on either side, both and neither."""
    for rows, z_out in ((None, None), (ROWS, PART[2])):
        for cols, z_in in ((None, None), (COLS, PART[3])):
            w, bias = matrix(6, 40, torch.float32), gate(6, 3)
            n, k = 6 if rows is None else 3, 40 if cols is None else 20
            x, dy = matrix(2, k, torch.float32), matrix(2, n, torch.float32, seed=1)
            yield x, dy, w, bias, (rows, cols, z_out, z_in, 1, 1)


def open_linear():
    for x, _, w, bias, part in linears():
        yield x, w, bias, *part
        yield x, w, None, *part


def open_linear_backward():
    for x, dy, w, _, part in linears():
        _, _, z_out, z_in, *_ = part
        yield dy, None if z_in is None else x, None if z_out is None else dy, w, *part


def activations(count, dtypes=DTYPES):
    for dtype in dtypes:
        yield [matrix(3, 12, dtype, seed=seed) for seed in range(count)]


def swiglu():
    for a, u in activations(2, DTYPES[:1]):
        yield a, u
        yield a, u, gate(12, 0)


def swiglu_backward():
    for dh, a, u in activations(3, DTYPES[:1]):
        yield dh, a, u
        yield dh, a, u, gate(12, 0)


CASES = {
    "fold_pack": fold_pack,
    "pack_rows": lambda: [(matrix(6, 40, torch.float32), ROWS)],
    "fold_pack_adjoint": fold_pack_adjoint,
    "pack_tensors": pack_tensors,
    "pack_tensors_out": pack_tensors_out,
    "unpack_tensors": unpack_tensors,
    "unpack_tensors_out": unpack_tensors_out,
    "open_sets": lambda: [([torch.tensor([True, False, True]), torch.zeros(5).bool()],)],
    "remap_ids": lambda: [(torch.tensor([[0, 2], [1, 1]]), torch.tensor([2, 0, 1]).int())],
    "open_linear": open_linear,
    "open_linear_backward": open_linear_backward,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "gate_lanes": lambda: ((x, gate(4, 0), 3) for (x,) in activations(1)),
    "gate_lanes_backward": lambda: ((dy, x, gate(4, 0), 3) for dy, x in activations(2)),
    "column_products": lambda: activations(2),
}


@pytest.mark.parametrize("name", _ext.OPS)
def test_opcheck(name):
    for arguments in CASES[name]():
        torch.library.opcheck(op(name), tuple(arguments))
