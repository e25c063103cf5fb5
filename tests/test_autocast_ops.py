"""Kernels under autocast: it casts the operands of torch's own products, and none of an op's."""

import pytest
import torch
from glu import make_inputs, normal, with_pairs, without
from ops import ids, run, to

from gatepack.kernels import gated_mlp_fn, gated_swiglu_fn, packed_linear_fn

DTYPES = [torch.float32, torch.bfloat16]
MLPS = [(gated_mlp_fn, "aud"), (gated_swiglu_fn, "au")]


def check(fn, inputs, device, **settings):
    """Outputs and gradients inside autocast, and gradients after it, have the same bits as without.

    In a dtype other than autocast's, so that nothing is the same by chance.
    """
    inputs = to(inputs, device)
    with torch.no_grad():
        dy = normal(*fn(**inputs, **settings).shape).to(inputs["x"])
    expected = run(fn, inputs, dy, **settings)
    lower = torch.float16 if inputs["x"].dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast(device.type, lower):
        inside = run(fn, inputs, dy, **settings)
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y = fn(**leaves, **settings)
    after = torch.autograd.grad(y, leaves.values(), dy)
    after = {"y": y} | {f"d{name}": g for name, g in zip(leaves, after, strict=True)}
    for name, tensor in expected.items():
        for got in (inside[name], after[name]):
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


@pytest.mark.parametrize("absent", [(), ("z",), ("z", "bias_d")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("fn", "branches"), MLPS, ids=["mlp", "swiglu"])
def test_mlp(fn, branches, dtype, absent, device):
    """Without a gate, torch multiplies."""
    check(with_pairs(fn), without(make_inputs(dtype, branches=branches), *absent), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_packed_linear(dtype, device):
    shapes = {"x": (3, 8), "w": (6, 4), "bias": (6,), "accumulate": (3, 10)}
    inputs = {name: normal(*shape).to(dtype) for name, shape in shapes.items()}
    lanes = {
        "rows": torch.arange(6, dtype=torch.int32, device=device),
        "cols": torch.arange(4, dtype=torch.int32, device=device),
    }
    check(packed_linear_fn, inputs, device, out_features=10, **lanes)
