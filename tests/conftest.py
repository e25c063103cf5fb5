"""Without a CUDA device, kernels run in Triton's interpreter: to be chosen before the import."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the repository root on the path, where triton_kernels/ would answer to
# the name of OpenAI's package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
