"""Forward-mode derivatives: right, or refused; a custom op would drop them without a word."""

import pytest
import torch
import torch.nn.functional as F

from gatepack import functional, in_place
from gatepack._ext import fold_pack, fold_pack_adjoint
from gatepack.modules import GatedLinear, PackedLinear


def leaves(*shapes):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random) for shape in shapes]


def assert_same_tangent(ours, theirs, x, tangent):
    """Of functions of one tensor, by both ways that torch has."""
    _, expected = torch.func.jvp(theirs, (x,), (tangent,))
    _, got = torch.func.jvp(ours, (x,), (tangent,))
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected)
    with torch.autograd.forward_ad.dual_level():
        y = ours(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected)


@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("kind", ["packed", "gated"])
def test_linear(kind, tokens):
    theirs = torch.nn.Linear(8, 6).requires_grad_(False)
    if kind == "packed":
        ours = PackedLinear.from_linear(torch.nn.Linear(8, 6), theirs.weight, theirs.bias)
    else:
        ours = GatedLinear(8, 6)
        ours.load_state_dict(theirs.state_dict())
    assert_same_tangent(ours.requires_grad_(False), theirs, *leaves((tokens, 8), (tokens, 8)))


def test_functions():
    a, u, tangent = leaves((3, 8), (3, 8), (3, 8))
    assert_same_tangent(lambda x: functional.swiglu(x, u), lambda x: F.silu(x) * u, a, tangent)
    assert_same_tangent(lambda x: functional.column_dot(x, u), lambda x: (x * u).sum(0), a, tangent)
    weights = leaves((16, 8), (16, 8), (8, 16))
    assert in_place.open_mlp(a, weights, [None] * 3, None, None) is not None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, tangent)
        assert in_place.open_mlp(dual, weights, [None] * 3, None, None) is None


@pytest.mark.parametrize("cols", [None, torch.tensor([1, 3])])
def test_fold_pack_refuses_tangents(cols):
    w, tangent = leaves((4, 5), (4, 5))
    rows = torch.tensor([0, 2])
    z = torch.ones(2)

    def adjoint(g):
        return fold_pack_adjoint(g, None, None, None, None, 4, 5)

    for fn, x, t in (
        (lambda w: fold_pack(w, rows, cols), w, tangent),
        (lambda z: fold_pack(w, rows, cols, z_out=z), z, z),
        (adjoint, w, tangent),
    ):
        with pytest.raises(ValueError, match=r"fold_pack(_adjoint)?: \w+ must not have a tangent"):
            torch.func.jvp(fn, (x,), (t,))
    with torch.autograd.forward_ad.dual_level():  # of another tensor: nothing is lost
        assert torch.equal(fold_pack(w, rows), w[rows])
