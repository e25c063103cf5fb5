"""Without a CUDA device, kernels run in Triton's interpreter: to be chosen before the import."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the repository root on the path, where triton_kernels/ would answer to
# the name of OpenAI's package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


settings.register_profile("thorough", max_examples=4000)


def _keep_bools(create_splat):
    """create_splat of Triton's interpreter, which fills int32 from a scalar bool.

    Up to 3.8 such a mask was taken all the same; 3.9 refuses it. Compiled code is not concerned.
    """

    def splat(self, ret_ty, arg):
        handle = create_splat(self, ret_ty, arg)
        if arg.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    return splat


def _validate(self):
    """TensorDescHandle.validate of Triton's interpreter, whose 3.5 counts strides in elements.

    The copy engine, and every later interpreter, wants multiples of 16 bytes.
    """
    itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
    assert self.base.data.item() % 16 == 0
    assert all(stride.data.item() * itemsize % 16 == 0 for stride in self.strides[:-1])
    assert self.strides[-1].data.item() == 1


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from triton import __version__ as triton_version
    from triton.runtime.interpreter import InterpreterBuilder, TensorDescHandle

    InterpreterBuilder.create_splat = _keep_bools(InterpreterBuilder.create_splat)
    if triton_version.startswith("3.5."):
        TensorDescHandle.validate = _validate


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def folded(monkeypatch):
    """Gated modules pack their weights for the few tokens of a test, too."""
    monkeypatch.setenv("GATEPACK_BACKEND", "folded")


@pytest.fixture
def free_calls(monkeypatch):
    """Tiny layers pack from a few tokens on, as wide ones do."""
    monkeypatch.setattr("gatepack.paths.CALL", 0.0)


@pytest.fixture
def simd_levels():
    """simd_levels() runs through the instruction sets of gatepack._C; the best one is put back."""
    from gatepack import _ext

    best, names = _ext.build_info()["simd"], ("scalar", "avx2", "avx512")

    def levels():
        for name in names[: names.index(best) + 1]:
            torch.ops.gatepack.set_simd_level(name)
            yield name

    yield levels
    torch.ops.gatepack.set_simd_level(best)


@pytest.fixture(scope="session")
def device():
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
