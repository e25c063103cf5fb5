"""Importing the kernels costs nothing, and says what is wrong where it cannot work."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGES = Path(__file__).resolve().parent.parent / "python"


def run(code: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(PACKAGES)
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
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
    text = run(code)
    assert "gated_linear: expected tensors on a CUDA or ROCm device, got cpu" in text


def test_without_triton_the_error_names_the_cure():
    code = """
import sys
sys.modules["triton"] = None
try:
    import gatepack.kernels
except ImportError as error:
    print(error)
"""
    assert "gatepack.kernels needs Triton: pip install triton" in run(code)
