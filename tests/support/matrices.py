"""What the tests of the packing ops share: matrices, open sets, one instruction set at a time."""

import contextlib

import pytest
import torch
from hypothesis import strategies as st

from gatepack import _ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEVELS = ("scalar", "avx2", "avx512")


def matrix(m, n, dtype, column_major=False, seed=0):
    """Normal values over several powers of two, so that roundings differ; finite in fp16."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=generator, dtype=torch.float64)
    w = (w * torch.randn(m, n, generator=generator).mul(3).exp()).clamp(-6e4, 6e4).to(dtype)
    return w.t().contiguous().t() if column_major else w


def gate(size, seed, dtype=torch.float32):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(t):
    return t.contiguous().flatten().view(torch.uint8)


def assert_same_bytes(actual, expected):
    """Every byte; of a NaN, that it is one: its payload is left open (csrc/layout.h)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = expected.isnan()
    if nan.any():
        assert torch.equal(actual.isnan(), nan)
        actual, expected = (t.float().masked_fill(nan, 0) for t in (actual, expected))
    assert torch.equal(bits(actual), bits(expected))


@contextlib.contextmanager
def instruction_set(level):
    """Run the C++ ops on one instruction set; skips where there is none."""
    if _ext.backend().name == "torch":
        pytest.skip(_ext.backend().reason)
    best = _ext.build_info()["simd"]
    with contextlib.suppress(ValueError):
        torch.ops.gatepack.set_simd_level(level)
    if _ext.build_info()["simd"] != level:
        pytest.skip(f"this machine has no {level}")
    try:
        yield
    finally:
        torch.ops.gatepack.set_simd_level(best)


@st.composite
def open_sets(draw, size):
    """None for all, or sorted unique indices below size: empty, full and every shape between."""
    kind = draw(st.sampled_from(("all", "empty", "full", "some", "some", "some")))
    if kind == "all":
        return None
    if kind == "some" and size:
        kept = sorted(draw(st.sets(st.integers(0, size - 1))))
    else:
        kept = range(size if kind == "full" else 0)
    return torch.tensor(list(kept), dtype=draw(st.sampled_from((torch.int64, torch.int32))))
