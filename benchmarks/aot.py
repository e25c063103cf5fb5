"""Compile every kernel ahead of time, for chips that need not be there, and report what it costs.

    python benchmarks/aot.py [--json FILE] [--targets sm_90 gfx942]

Each case below calls a public op on bf16 tensors of a model shape, forward and backward. Instead of
launching, the kernels record the arguments that the launcher really passes; each distinct record
is then compiled for each target with the tiles that `choose_config` gives that target. A new op is
one more case. Needs triton and its bundled ptxas and cuobjdump; no GPU.

Columns: registers per thread, spill bytes per thread (NVIDIA: stack), shared memory in bytes per
block, and whether the matrix instruction of the chip is in the code.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
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
    "sm_90": Chip(GPUTarget("cuda", 90, 32), r"wgmma\.mma_async", 227 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), r"tcgen05\.mma", 227 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), r"v_mfma", 64 * 1024),
}


def _bf16(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16).requires_grad_()


def _gated_linear(t, n, k, *, gates=(), rank=0, channel_major=False, **groups):
    from gatepack.kernels import gated_linear_fn

    inputs = {"x": _bf16(t, k), "w": _bf16(k, n).t() if channel_major else _bf16(n, k)}
    if "z_in" in gates:
        inputs["z_in"] = torch.ones(k // groups.get("group_in", 1), requires_grad=True)
    if "z_out" in gates:
        inputs["z_out"] = torch.ones(n // groups.get("group_out", 1), requires_grad=True)
        inputs["bias"] = _bf16(n)
    if rank:
        inputs["lora_a"], inputs["lora_b"] = _bf16(rank, k), _bf16(n, rank)
    y = gated_linear_fn(**inputs, **groups)
    torch.autograd.grad(y, inputs.values(), torch.empty_like(y))


# name -> a call of a public op. Nothing is computed, so sizes cost address space only.
CASES = {
    "dense": lambda: _gated_linear(4096, 4096, 4096),
    "heads+lora": lambda: _gated_linear(4096, 4096, 4096, gates=("z_in",), rank=16, group_in=128),
    "channels": lambda: _gated_linear(4096, 4096, 14336, gates=("z_in",), channel_major=True),
    "rows+bias": lambda: _gated_linear(4096, 14336, 4096, gates=("z_out",)),
}


class _Recorder:
    """Stands in for a jit kernel and keeps the arguments of each launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(case, arch: str) -> list:
    """The launches (kernel, args, kwargs) that one case makes on a chip."""
    import gatepack.kernels

    launches, undo = [], []
    prefix = gatepack.kernels.__name__ + "."
    for name, module in list(sys.modules.items()):
        if not name.startswith(prefix):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and key.endswith("_kernel"):
                undo.append((module, key, value))
                setattr(module, key, _Recorder(value, launches))
        for key, stand_in in (("arch_of", lambda _: arch), ("check_device", lambda *_: None)):
            if hasattr(module, key):
                undo.append((module, key, getattr(module, key)))
                setattr(module, key, stand_in)
    try:
        case()
    finally:
        for module, key, value in undo:
            setattr(module, key, value)
    return launches


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


def compile_launch(case: str, arch: str, kernel, args, kwargs) -> dict:
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
    return {
        "case": case,
        "kernel": kernel.__name__,
        "tile": {k: v for k, v in kwargs.items() if k.startswith("BLOCK")},
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "arch": arch,
        "registers": registers,
        "spill_bytes": spill,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": chip.shared_limit,
        "matrix_instruction": bool(re.search(chip.matrix_instruction, text)),
    }


def report(archs) -> list[dict]:
    """One row for each case, distinct launch and chip."""
    rows = []
    for arch in archs:
        seen = set()
        for case, call in CASES.items():
            for kernel, args, kwargs in record(call, arch):
                source, options = source_of(kernel, args, kwargs)
                key = (source.hash(), str(sorted(options.items())))
                if key not in seen:
                    seen.add(key)
                    rows.append(compile_launch(case, arch, kernel, args, kwargs))
    return rows


def _print_table(rows) -> None:
    print(f"{'arch':7} {'case':11} {'kernel':34} {'tile':15} regs spill  shared matrix")
    for row in rows:
        tile = "x".join(str(v) for v in row["tile"].values())
        print(
            f"{row['arch']:7} {row['case']:11} {row['kernel']:34} {tile:15} {row['registers']:4} "
            f"{row['spill_bytes']:5} {row['shared_bytes']:7} "
            f"{'yes' if row['matrix_instruction'] else 'no' if row['has_dot'] else '-'}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    options = parser.parse_args()
    rows = report(options.targets)
    _print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows))
