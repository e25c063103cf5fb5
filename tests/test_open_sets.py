import pytest
import torch

from gatepack.kernels import open_set_fn, open_set_ref
from gatepack.kernels.open_sets import Axis
from gatepack.testing import poisoned_empty


@pytest.mark.parametrize("size", [0, 1, 7, 128, 5000])
@pytest.mark.parametrize("closed", [0.0, 0.4, 1.0])
def test_equals_the_reference(size, closed, device):
    z = torch.rand(size, device=device) + 0.01
    z *= torch.rand(size, device=device) >= closed
    with poisoned_empty():
        got = open_set_fn(z)
    torch.testing.assert_close(got, open_set_ref(z), rtol=0, atol=0)


def test_strided_and_nan(device):
    z = torch.tensor([0.0, 9.0, 0.5, 9.0, float("nan"), 9.0, 0.0, 9.0], device=device)[::2]
    assert open_set_fn(z).tolist() == [1, 2, 0, 3, 2]


def test_opcheck(device):
    torch.library.opcheck(torch.ops.gatepack.open_set, (torch.rand(9, device=device),))


def test_refuses_two_dimensions(device):
    with pytest.raises(ValueError, match="z: expected one dimension, got shape"):
        open_set_fn(torch.rand(2, 3, device=device))


@pytest.mark.parametrize(
    ("group", "width"), [(1, 64), (15, 64), (16, 16), (64, 64), (80, 32), (96, 32), (128, 128)]
)
def test_tiles_fill_their_units(group, width):
    z = torch.ones(4)
    axis = Axis(4 * group, z, torch.tensor([0, 1, 2, 3, 4]), group)
    assert axis.width(128) == width
    assert axis.tiles(width) * width >= 4 * group


def test_an_axis_without_a_gate_keeps_its_tile():
    assert Axis(100).width(128) == 128
    assert Axis(100).tiles(128) == 1
