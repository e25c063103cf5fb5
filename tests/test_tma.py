import pytest
import torch

from gatepack.kernels._tma import consecutive, describable, descriptor, program_count
from gatepack.kernels.open_sets import Axis

X = torch.zeros(64, 64, dtype=torch.bfloat16)

MATRICES = [
    ("dense", X, True),
    ("rows apart", X[::2], True),
    ("columns of a wider matrix, 16 bytes in", X[:, 8:40], True),
    ("columns of a wider matrix, 2 bytes in", X[:, 1:33], False),
    ("a row stride that is no multiple of 16 bytes", X.flatten()[: 63 * 64].view(64, 63), False),
    ("transposed", X.t(), False),
    ("every second column", X[:, ::2], False),
    ("one row repeated", X[:1].expand(64, 64), False),
    ("empty", X[:0], False),
    ("a vector", X[0], False),
    ("fp16", X.half(), True),
    ("fp32", X.float(), False),
]


@pytest.mark.parametrize(("x", "allowed"), [m[1:] for m in MATRICES], ids=[m[0] for m in MATRICES])
def test_what_a_descriptor_can_describe(x, allowed):
    assert describable(x) == allowed
    assert (descriptor(x, 16, 32) is not None) == allowed


def test_which_tiles_are_consecutive():
    z, units = torch.ones(4), torch.tensor([0, 1, 2, 3, 4])
    assert consecutive(Axis(100), 64)
    for group, width, expected in ((1, 64, False), (64, 32, True), (64, 64, True), (80, 32, False)):
        axis = Axis(4 * group, z, units, group)
        assert consecutive(axis, width) == expected
        assert consecutive(axis, width, in_buffer=True) == expected
        compact = axis._replace(compact=True)
        assert consecutive(compact, width) == expected
        assert consecutive(compact, width, in_buffer=True) == (expected or group == 1)


def test_programs():
    cpu = torch.device("cpu")
    assert program_count(10, 0, cpu) == 10
    assert program_count(10, 3, cpu) == 3
    assert program_count(2, 3, cpu) == 2
