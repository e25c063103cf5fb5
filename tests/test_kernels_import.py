"""Importing the kernels costs nothing, and says what is wrong where it cannot work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, path: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(path)
    }
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_touches_no_device_and_compiles_nothing_and_cpu_tensors_are_refused():
    code = """
import torch
import triton
from gatepack import kernels
from gatepack.kernels import gated_matmul
assert not torch.cuda.is_initialized()
kernel = gated_matmul._gated_matmul_kernel
assert isinstance(kernel, triton.JITFunction) and not kernel.device_caches
try:
    kernels.gated_linear_fn(torch.ones(2, 4), torch.ones(3, 4))
except ValueError as error:
    print(error)
"""
    text = run(code, ROOT / "python")
    assert "gated_linear: expected tensors on a CUDA or ROCm device, got cpu" in text


@pytest.mark.parametrize(
    ("before", "module", "path", "message"),
    [
        ("", "triton_kernels", ROOT, "import gatepack.kernels instead"),
        ("sys.modules['triton'] = None", "gatepack.kernels", ROOT / "python", "pip install triton"),
    ],
)
def test_import_error_names_the_cure(before, module, path, message):
    code = f"""
import sys
{before}
try:
    import {module}
except ImportError as error:
    print(error)
"""
    assert message in run(code, path)
