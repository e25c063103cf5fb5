"""Compile every kernel ahead of time, for chips that need not be there, and report what it costs.

    python benchmarks/aot.py [--json FILE] [--targets sm_90 gfx942] [--ops gated_linear] [--jobs N]

The AOT cases in benchmarks/ops/ call public ops on bf16 tensors of a model shape, forward and
backward; gated_attention's on fp32 ones, too. Instead of launching, the kernels record the
arguments that the launcher really passes; each distinct record is then compiled for each target
with the tiles that `choose_config` gives that target. Needs triton and its bundled ptxas and
cuobjdump; no GPU.

Columns: registers per thread, spill bytes per thread (NVIDIA: stack), shared memory in bytes per
block, how many blocks of it fit on a multiprocessor at once (NVIDIA), whether the matrix
instruction of the chip is in the code, the widest global load in bytes, descriptor (TMA) loads, and
32-bit products of run-time values that end in an address.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from _suite import modules
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type


@dataclasses.dataclass(frozen=True)
class Chip:
    target: GPUTarget
    matrix_instruction: str  # pattern in the assembly
    shared_limit: int  # bytes per block


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), r"mma\.sync", 163 * 1024),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), r"mma\.sync", 99 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), r"wgmma\.mma_async", 227 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), r"tcgen05\.mma", 227 * 1024),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), r"mma\.sync", 99 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), r"v_mfma", 64 * 1024),
}


def cases(ops=None) -> dict:
    """{(op, case): a call of its public op}. Nothing is computed: sizes cost address space only."""
    return {(op, name): call for op, m in modules(ops).items() for name, call in m.AOT.items()}


class _Recorder:
    """Stands in for a jit kernel and keeps the arguments of each launch."""

    def __init__(self, kernel, launches, grids):
        self.kernel, self.launches, self.grids = kernel, launches, grids

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((self.kernel, args, kwargs))
            self.grids.append(math.prod(grid(kwargs) if callable(grid) else grid))

        return launch


def record(case, arch: str) -> list:
    """The launches that one case makes on a chip: ((kernel, args, kwargs), blocks in the grid)."""
    import gatepack.kernels

    launches, grids, undo = [], [], []
    prefix = gatepack.kernels.__name__ + "."
    for name, module in list(sys.modules.items()):
        if not name.startswith(prefix):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and key.endswith("_kernel"):
                undo.append((module, key, value))
                setattr(module, key, _Recorder(value, launches, grids))
        for key, stand_in in (("arch_of", lambda _: arch), ("check_device", lambda *_: None)):
            if hasattr(module, key):
                undo.append((module, key, getattr(module, key)))
                setattr(module, key, stand_in)
    try:
        case()
    finally:
        for module, key, value in undo:
            setattr(module, key, value)
    return list(zip(launches, grids, strict=True))


def source_of(kernel, args, kwargs):
    """(ASTSource, compile options) specialised as a launch would: on 1 and multiples of 16."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | kwargs
    options = {k: v for k, v in kwargs.items() if k not in names}
    constexpr_params = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attrs = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if name in constexpr_params or value is None or (is_int and value == 1):
            signature[name] = "constexpr"
            constexprs[(index,)] = value
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (is_int and value % 16 == 0):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs), options


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def _amd_usage(assembly: str) -> tuple[int, int]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])


_LOADS = {
    "cuda": r"ld\.global[\w.:]*?(?:\.v(?P<n>\d))?\.[bufs](?P<bits>\d+) "
    r"|cp\.async\.c[ag]\S+ .*, (?P<b>0x\w+),",
    "hip": r"(?:global|buffer)_load_(?:dword(?:x(?P<n>\d))?|[us]?(?:short|byte))\b",
}


def load_bytes(text: str, backend: str) -> int:
    """Bytes of the widest global load of one thread; a descriptor load counts as 16."""
    widest = 16 if "cp.async.bulk.tensor" in text else 0
    for match in re.finditer(_LOADS[backend], text):
        if backend == "hip":
            width = 4 * int(match["n"] or 1)
        elif match["b"]:
            width = int(match["b"], 16)
        else:
            width = int(match["n"] or 1) * int(match["bits"]) // 8
        widest = max(widest, width)
    return widest


def narrow_products(ttir: str) -> list[str]:
    """32-bit products of run-time values that become part of an address: they wrap past 2^31.

    Walks back from every widening to 64 bits and every pointer offset through 32-bit arithmetic.
    """
    definition = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?\(?\s*(.*)$", re.M)
    made = {m[1]: (m[2], m[3]) for m in definition.finditer(ttir)}
    through = {
        "arith.addi", "arith.subi", "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.muli",
    }  # fmt: skip

    def operands(text):
        return re.findall(r"%[\w#]+", text.split(" : ")[0])

    def is_constant(name):
        kind, rest = made.get(name, ("", ""))
        if kind in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            return is_constant(operands(rest)[0])
        return kind == "arith.constant"

    starts = []
    for kind, rest in made.values():
        if kind == "arith.extsi" and re.search(r"i32>? to .*i64", rest):
            starts += operands(rest)
        elif kind == "tt.addptr" and re.search(r"i32>?( loc.*)?$", rest.rstrip()):
            starts += operands(rest)[1:]
    found, seen = [], set()
    while starts:
        name = starts.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        kind, rest = made[name]
        if kind == "arith.muli" and not any(is_constant(n) for n in operands(rest)):
            found.append(f"{name} = {kind} {rest.split(' : ')[0]}")
        if kind in through:
            starts += operands(rest)
    return found


# Registers, shared memory in bytes and warps of a multiprocessor.
_MULTIPROCESSOR = {
    "sm_80": (65536, 164 * 1024, 64),
    "sm_86": (65536, 100 * 1024, 48),
    "sm_90": (65536, 228 * 1024, 64),
    "sm_100": (65536, 228 * 1024, 64),
    "sm_120": (65536, 100 * 1024, 48),
}


def blocks_per_multiprocessor(arch: str, registers: int, shared: int, warps: int) -> int | None:
    """How many blocks are resident at once: registers come in units of 8 per thread, and a block
    takes 1 KiB of shared memory beside its own; None for chips that are not NVIDIA's."""
    if arch not in _MULTIPROCESSOR:
        return None
    all_registers, all_shared, all_warps = _MULTIPROCESSOR[arch]
    by_registers = all_registers // (-(-max(registers, 1) // 8) * 8 * 32 * warps)
    return min(by_registers, all_shared // (shared + 1024), all_warps // warps, 32)


def compile_launch(op: str, case: str, arch: str, kernel, args, kwargs, blocks: int = 0) -> dict:
    """Compile one recorded launch; a row of the report."""
    chip = CHIPS[arch]
    source, options = source_of(kernel, args, kwargs)
    compiled = triton.compile(source, target=chip.target, options=options)
    if chip.target.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spill = _nvidia_usage(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers, spill = _amd_usage(text)
    ttir = str(compiled.asm["ttir"])
    return {
        "op": op,
        "case": case,
        "kernel": kernel.__name__,
        "tile": {k: v for k, v in kwargs.items() if k.startswith("BLOCK")},
        "has_dot": "tt.dot" in ttir,
        "has_fp32_dot": bool(re.search(r"tt\.dot .* : tensor<[\dx]+xf32> \*", ttir)),
        "arch": arch,
        "registers": registers,
        "spill_bytes": spill,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": chip.shared_limit,
        "warps": compiled.metadata.num_warps,
        "grid": blocks,
        "resident": blocks_per_multiprocessor(
            arch, registers, compiled.metadata.shared, compiled.metadata.num_warps
        ),
        "tensor_columns": getattr(compiled.metadata, "tmem_size", 0),
        "matrix_instruction": bool(re.search(chip.matrix_instruction, text)),
        "load_bytes": load_bytes(text, chip.target.backend),
        "descriptor_loads": len(re.findall(r"tt\.descriptor_(?:load|gather)", ttir)),
        "narrow_products": narrow_products(ttir),
    }


def _report_of(arch: str, op: str) -> list[dict]:
    """One row for each distinct launch of an op on a chip."""
    rows, seen = [], set()
    for (_, case), call in cases([op]).items():
        for (kernel, args, kwargs), blocks in record(call, arch):
            source, options = source_of(kernel, args, kwargs)
            key = (source.hash(), str(sorted(options.items())))
            if key not in seen:
                seen.add(key)
                rows.append(compile_launch(op, case, arch, kernel, args, kwargs, blocks))
    return rows


def report(archs, ops=None, jobs: int = 1) -> list[dict]:
    """One row for each op, distinct launch of it and chip."""
    work = [(arch, op) for arch in archs for op in dict.fromkeys(op for op, _ in cases(ops))]
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(_report_of, *zip(*work, strict=True)) for row in rows]


def _print_table(rows) -> None:
    print(
        f"{'arch':7}{'op':22}{'case':14}{'kernel':38}{'tile':16}"
        "regs spill  shared fit matrix load tma"
    )
    for row in rows:
        tile = "x".join(str(v) for v in row["tile"].values())
        print(
            f"{row['arch']:7}{row['op']:22}{row['case']:14}{row['kernel']:38}{tile:15} "
            f"{row['registers']:4} {row['spill_bytes']:5} {row['shared_bytes']:7} "
            f"{row['resident'] or '-':>3} "
            f"{'yes' if row['matrix_instruction'] else 'no' if row['has_dot'] else '-':6} "
            f"{row['load_bytes']:4} {row['descriptor_loads']:3} {' '.join(row['narrow_products'])}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--ops", nargs="+", help="files of benchmarks/ops, default all")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    options = parser.parse_args()
    rows = report(options.targets, options.ops, options.jobs)
    _print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows))
