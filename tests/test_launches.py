"""Every op reaches its kernels as on a GPU, whatever sizes it is given: support/launches.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "support" / "launches.py"
OPS = tuple(file.stem for file in (ROOT / "benchmarks" / "ops").glob("*.py"))

pytest.importorskip("triton")


def test_launches_of_any_size_lower_to_ir():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "python")
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_op_is_launched():
    text = SCRIPT.read_text(encoding="utf-8")
    assert OPS and all(f"kernels.{op}_fn" in text for op in OPS)
