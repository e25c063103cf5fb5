"""gated_swiglu and gated_mlp as operators: opcheck, one graph, no second derivative."""

from dataclasses import dataclass

import pytest
import torch
from glu import SMALL_TILES, F, K, T, make_inputs, with_pairs
from ops import run, to

from gatepack import kernels

slow = pytest.mark.slow


@dataclass(frozen=True)
class Op:
    """Its linears, lanes of its result, and the operator's arguments after those of tensors."""

    name: str
    branches: str
    n: int
    tensors: tuple[str, ...]
    settings: tuple

    def __str__(self):
        return self.name

    @property
    def fn(self):
        return getattr(kernels, f"{self.name}_fn")

    def operator(self, suffix=""):
        return getattr(torch.ops.gatepack, self.name + suffix).default

    def inputs(self, device, branches=None):
        return to(make_inputs(torch.float32, branches=branches or self.branches), device)


MLP = Op(
    "gated_mlp",
    "aud",
    K,
    (
        "x", "w_a", "w_u", "w_d", "z", "bias_a", "bias_u", "bias_d", "a_of_a", "b_of_a", "a_of_u",
        "b_of_u", "a_of_d", "b_of_d",
    ),
    (0.5, 0.5, 0.5, "silu", F, []),
)  # fmt: skip
SWIGLU = Op(
    "gated_swiglu",
    "au",
    F,
    ("x", "w_a", "w_u", "z", "bias_a", "bias_u", "a_of_a", "b_of_a", "a_of_u", "b_of_u"),
    (0.5, 0.5, "silu", F, []),
)
each_op = pytest.mark.parametrize("op", [MLP, SWIGLU], ids=str)


@pytest.mark.parametrize(
    ("op", "branches"),
    [(MLP, "aud"), pytest.param(MLP, "ud", marks=slow), (SWIGLU, "au"), (SWIGLU, "u")],
    ids=str,
)
def test_opcheck_forward(op, branches, device):
    inputs = op.inputs(device, branches)
    arguments = [inputs[n].requires_grad_() if n in inputs else None for n in op.tensors]
    torch.library.opcheck(op.operator(), (*arguments, True, True, *op.settings))


@each_op
def test_opcheck_backward(op, device):
    inputs = op.inputs(device)
    arguments = [inputs[name] for name in op.tensors]
    y, *kept = op.operator()(*arguments, True, True, *op.settings)
    needed = [True] * len(arguments)
    torch.library.opcheck(
        op.operator("_backward"), (torch.randn_like(y), *arguments, *kept, needed, *op.settings)
    )


@pytest.mark.parametrize(
    ("op", "tiles"), [(MLP, None), (SWIGLU, SMALL_TILES)], ids=["mlp", "swiglu"]
)
def test_compiles_into_one_graph(op, tiles, device):
    inputs, dy = op.inputs(device), torch.randn(T, op.n, device=device)
    compiled = torch.compile(op.fn, fullgraph=True, backend="aot_eager")
    expected, got = (run(with_pairs(fn), inputs, dy, config=tiles) for fn in (op.fn, compiled))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@each_op
def test_second_derivative_is_refused(op, device):
    inputs = op.inputs(device)
    y = with_pairs(op.fn)(**inputs | {"x": inputs["x"].requires_grad_()})
    (dx,) = torch.autograd.grad(
        y, inputs["x"], torch.ones_like(y).requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
        dx.sum().backward()
