"""Every kernel compiles for chips that are not here, without spills, on the matrix units."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The rows of benchmarks/aot.py, made in a process without the interpreter."""
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "python")
    command = [sys.executable, str(ROOT / "benchmarks/aot.py"), "--json", str(file)]
    command += ["--jobs", str(os.cpu_count()), "--targets", *TARGETS]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return json.loads(file.read_text())


@pytest.fixture(scope="module", params=TARGETS)
def rows(request, report):
    return [row for row in report if row["arch"] == request.param]


def label(row):
    return f"{row['arch']} {row['op']} {row['case']} {row['kernel']} {row['tile']}"


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


def test_addresses_are_64_bit(rows):
    """No product of two run-time values in 32 bits ends in an address: it would wrap past 2^31."""
    narrow = {label(row): row["narrow_products"] for row in rows if row["narrow_products"]}
    assert not narrow


BAD = """
module {
  tt.func public @k(%x_ptr: !tt.ptr<bf16>, %n: i32) {
    %c64 = arith.constant 64 : i32
    %pid = tt.get_program_id x : i32
    %tile = arith.muli %pid, %c64 : i32
    %row = arith.muli %tile, %n : i32 loc(#loc3)
    %lane = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
    %all = tt.splat %row : i32 -> tensor<64xi32>
    %at = arith.addi %all, %lane : tensor<64xi32>
    %ptr = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>>
    %p = tt.addptr %ptr, %at : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc4)
"""


def test_a_32_bit_address_would_be_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # importing aot.py unsets it: restored afterwards
    narrow_products = importlib.import_module("aot").narrow_products
    assert narrow_products(BAD) == ["%row = arith.muli %tile, %n"]
    wide = BAD.replace(
        "%all = tt.splat %row", "%wide = arith.extsi %n : i32 to i64\n%all = tt.splat %c64"
    )
    assert narrow_products(wide) == []
