"""Every kernel compiles for chips that are not here, without spills, on the matrix units."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GATHERED = "reads single lanes of an open set"
SEGMENTS = "segments of a flat vector begin anywhere"
SMALL = "reads a vector, once, beside which nothing of size is read"
# kernel -> (bytes of its widest load where that is less than 16, why)
NARROW_LOADS = {
    "_column_sums_kernel": (4, GATHERED),
    "_gate_penalty_bwd_kernel": (4, SEGMENTS),
    "_gate_penalty_fwd_kernel": (4, SEGMENTS),
    "_gather_norm_bwd_columns_kernel": (8, "more columns per thread leave no registers for sums"),
    "_gather_norm_bwd_dx_kernel": (8, "on gfx942, whole rows in registers leave 4 lanes a thread"),
    "_key_bounds_kernel": (8, "on gfx942, the mask is read in two halves"),
    "_linear_cross_entropy_bwd_kernel": (4, "a bias of any length has no alignment"),
    "_open_set_fwd_kernel": (4, SMALL),
    "_packed_linear_fwd_sum_kernel": (8, SMALL),
    "_sample_gates_bwd_kernel": (8, SEGMENTS),
    "_sample_gates_fwd_kernel": (4, SEGMENTS),
    "_scatter_add_bwd_kernel": (4, GATHERED),
    "_slot_sums_kernel": (4, SMALL),
    "_token_words_kernel": (0, "reads the seed only"),
}
# Matmuls without descriptors on sm_90 and later: kernel -> why
POINTER_MATMULS = {
    "_gated_attention_fwd_kernel": "sequences of any length, heads of any stride",
    "_gated_attention_bwd_dq_kernel": "as the forward",
    "_gated_attention_bwd_dkv_kernel": "as the forward",
    "_packed_linear_fwd_kernel": "few tokens: every row of W is read once, by one program",
}
# Cases of _gated_matmul_kernel that gather both operands, which the copy engine cannot on these.
GATHERED_MATMULS = {("channels", "sm_90"), ("channels", "sm_120")}
GATHERED_MATMULS |= {("masked+drop", "sm_90"), ("masked+drop", "sm_120")}

# Kernels whose fp32 products of head_dim 256 do not fit the registers: kernel -> chips
FP32_SPILLS = {
    "_gated_attention_fwd_kernel": ("gfx942",),
    "_gated_attention_bwd_dq_kernel": ("sm_80", "sm_90", "sm_100", "sm_120"),
    "_gated_attention_bwd_dkv_kernel": ("gfx942",),
}

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
SMALLER = "sm_86"  # and sm_89: as sm_80, but for less shared memory


def compiled(file, *options, **variables):
    """The rows of benchmarks/aot.py, made in a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    env["PYTHONPATH"] = str(ROOT / "python")
    command = [sys.executable, str(ROOT / "benchmarks/aot.py"), "--json", str(file), *options]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    return compiled(file, "--jobs", str(os.cpu_count()), "--targets", *TARGETS, SMALLER)


@pytest.fixture(scope="module", params=TARGETS)
def rows(request, report):
    return [row for row in report if row["arch"] == request.param]


def label(row):
    return f"{row['arch']} {row['op']} {row['case']} {row['kernel']} {row['tile']}"


def test_every_kernel_is_compiled(rows):
    source = "".join(file.read_text() for file in (ROOT / "triton_kernels").glob("*.py"))
    kernels = set(re.findall(r"@triton\.jit(?:\(.+\))?\ndef (\w+_kernel)\(", source))
    assert kernels and {row["kernel"] for row in rows} == kernels


def test_nothing_spills(rows):
    spills = {
        label(row): row["spill_bytes"]
        for row in rows
        if row["spill_bytes"]
        and not (row["has_fp32_dot"] and row["arch"] in FP32_SPILLS.get(row["kernel"], ()))
    }
    assert not spills


@pytest.mark.parametrize("arch", (*TARGETS, SMALLER))
def test_shared_memory_fits_the_chip(arch, report):
    rows = [row for row in report if row["arch"] == arch]
    over = {label(r): r["shared_bytes"] for r in rows if r["shared_bytes"] > r["shared_limit"]}
    assert rows and not over


def test_matmuls_use_the_matrix_units(rows):
    """In 16 bit: NVIDIA's have no exact fp32 products."""
    matmuls = [row for row in rows if row["has_dot"] and not row["has_fp32_dot"]]
    assert matmuls
    scalar = [label(row) for row in matmuls if not row["matrix_instruction"]]
    assert not scalar


def test_sums_fit_the_tensor_memory(rows):
    over = {label(row): row["tensor_columns"] for row in rows if row["tensor_columns"] > 512}
    assert not over


def test_loads_are_16_bytes_wide(rows):
    """Or as wide as the table says, and no kernel is in the table without need."""
    narrow = {}
    for row in rows:
        allowed, _ = NARROW_LOADS.get(row["kernel"], (16, ""))
        if row["load_bytes"] < allowed:
            narrow[label(row)] = row["load_bytes"]
    assert not narrow


def test_every_exception_is_needed(report):
    for kernel, (allowed, reason) in NARROW_LOADS.items():
        assert min(r["load_bytes"] for r in report if r["kernel"] == kernel) == allowed, reason


def test_matmuls_fetch_through_descriptors(rows):
    if rows[0]["arch"] not in ("sm_90", "sm_100", "sm_120"):
        assert not [label(row) for row in rows if row["descriptor_loads"]]
        return
    pointers = [
        label(row)
        for row in rows
        if row["has_dot"]
        and not row["descriptor_loads"]
        and row["kernel"] not in POINTER_MATMULS
        and (row["case"], row["arch"]) not in GATHERED_MATMULS
    ]
    assert not pointers


def test_addresses_are_64_bit(rows):
    """No product of two run-time values in 32 bits ends in an address: it would wrap past 2^31."""
    narrow = {label(row): row["narrow_products"] for row in rows if row["narrow_products"]}
    assert not narrow


def test_a_second_process_compiles_nothing(tmp_path):
    def binaries():
        files = (tmp_path / "cache").rglob("*.cubin")
        return {file: file.stat().st_mtime_ns for file in files}

    options = ("--ops", "column_dot", "--targets", "sm_90")
    first = compiled(tmp_path / "1.json", *options, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    made = binaries()
    again = compiled(tmp_path / "2.json", *options, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert made and binaries() == made
    assert again == first


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
