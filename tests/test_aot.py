"""Every kernel compiles for chips that are not here, without spills, on the matrix units.

sm_90 runs by default; the other chips, at about 6 s each, are slow tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module", params=TARGETS)
def rows(request, tmp_path_factory):
    """The report of benchmarks/aot.py for one chip, made in a process without the interpreter."""
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "python")
    command = [sys.executable, str(ROOT / "benchmarks/aot.py"), "--json", str(file)]
    command += ["--targets", request.param]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return json.loads(file.read_text())


def label(row):
    return f"{row['arch']} {row['case']} {row['kernel']} {row['tile']}"


def test_every_kernel_is_compiled(rows):
    source = "".join(file.read_text() for file in (ROOT / "triton_kernels").glob("*.py"))
    kernels = set(re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", source))
    assert kernels and {row["kernel"] for row in rows} == kernels


def test_nothing_spills(rows):
    spills = {label(row): row["spill_bytes"] for row in rows if row["spill_bytes"]}
    assert not spills


def test_shared_memory_fits_the_chip(rows):
    over = {label(r): r["shared_bytes"] for r in rows if r["shared_bytes"] > r["shared_limit"]}
    assert not over


def test_matmuls_use_the_matrix_units(rows):
    matmuls = [row for row in rows if row["has_dot"]]
    assert matmuls
    scalar = [label(row) for row in matmuls if not row["matrix_instruction"]]
    assert not scalar
