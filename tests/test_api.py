"""The public names: each one imports, and importing gatepack alone loads none of what is heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gatepack


@pytest.mark.parametrize("name", gatepack.__all__)
def test_public_name_imports(name):
    assert getattr(gatepack, name) is not None
    assert name in dir(gatepack)


@pytest.mark.parametrize("name", gatepack.methods.__all__)
def test_method_imports_on_first_use(name):
    assert getattr(gatepack.methods, name) is not None
    assert name in dir(gatepack.methods)


def test_unknown_method_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Guess'"):
        _ = gatepack.methods.Guess


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_this'"):
        _ = gatepack.nothing_like_this


def test_kernels_are_reached_by_the_package_name():
    pytest.importorskip("triton")
    from gatepack import kernels

    assert callable(kernels.gated_linear_fn)
    assert kernels.__name__ == "gatepack.kernels"


def test_gates_need_no_transformers():
    code = (
        "import sys, gatepack as gp; gp.GateConfig(); gp.GateSet; gp.GatedLinear; "
        "sys.exit('transformers' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "python")}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
