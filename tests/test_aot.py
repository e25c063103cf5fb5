"""Every kernel compiles for chips that are not here, without spills, on the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The report of benchmarks/aot.py, made in a process without the interpreter."""
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "python")
    command = [sys.executable, str(ROOT / "benchmarks/aot.py"), "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return json.loads(file.read_text())


def label(row):
    return f"{row['arch']} {row['case']} {row['kernel']} {row['tile']}"


def test_every_kernel_is_compiled_for_every_chip(rows):
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "_gated_matmul_kernel",
        "_gated_outer_kernel",
        "_column_sums_kernel",
        "_open_set_fwd_kernel",
    }
    for arch in ARCHS:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == kernels


def test_nothing_spills(rows):
    spills = {label(row): row["spill_bytes"] for row in rows if row["spill_bytes"]}
    assert not spills


def test_shared_memory_fits_the_chip(rows):
    over = {label(r): r["shared_bytes"] for r in rows if r["shared_bytes"] > r["shared_limit"]}
    assert not over


def test_matmuls_use_the_matrix_units(rows):
    matmuls = [row for row in rows if row["has_dot"]]
    assert {row["arch"] for row in matmuls} == set(ARCHS)
    scalar = [label(row) for row in matmuls if not row["matrix_instruction"]]
    assert not scalar
