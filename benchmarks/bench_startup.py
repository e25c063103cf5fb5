"""Start-up: import beyond torch, the extension's load, first calls, Triton cache cold and warm.

    python benchmarks/bench_startup.py [--device cuda] [--repeats 5] [--json results.jsonl]

Each figure is the median of fresh processes, taken in turn with its baseline, that find Python's
bytecode as pip leaves it. Without a GPU no kernel can be called: then "first call" is an
ahead-of-time compile for sm_90 of the kernels of one call, with Triton's cache cold and warm, and
the rows say so ("compile only").
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _harness import ROOT, append, environment

# What has been imported anyway, and the statement that is timed.
IMPORTS = {
    "import GatedLinear": ("import torch", "import gatepack; gatepack.GatedLinear"),
    "import and attach": (
        "import torch, transformers; transformers.LlamaForCausalLM",
        "import gatepack; gatepack.attach",
    ),
    "import kernels": ("import torch", "import gatepack.kernels"),
}
_EXTENSION = """
from gatepack import _ext
import time
start = time.perf_counter()
_ext.backend()
print(time.perf_counter() - start)
"""
_FIRST_CALL = """
import time, torch
from gatepack.kernels import {op}_fn
x = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
w = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
start = time.perf_counter()
{call}
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
_COMPILE = """
import sys, time
sys.path.insert(0, {folder!r})
import aot
call = aot.cases([{op!r}])
(op, case), run = next(iter(call.items()))
launches = aot.record(run, "sm_90")
start = time.perf_counter()
for (kernel, args, kwargs), _ in launches:
    aot.compile_launch(op, case, "sm_90", kernel, args, kwargs)
print(time.perf_counter() - start)
"""
# On a GPU: forward of an op on small tensors, one kernel each.
_CALLS = {
    "gated_linear": "gated_linear_fn(x, w)",
    "packed_linear": "packed_linear_fn(x, w)",
    "column_dot": "column_dot_fn(x, x)",
}


def seconds(code: str, **environ: str) -> float:
    """What a fresh process prints last."""
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **environ}
    # Set to keep a tree clean, it would have every process compile all of our sources anew: 50 ms.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a start-up probe failed:\n{done.stderr.strip()[-2000:]}")
    return float(done.stdout.split()[-1])


def import_seconds(before: str, statement: str) -> float:
    """Of a statement, in a process that has run the one before."""
    return seconds(
        f"import time\n{before}\nstart = time.perf_counter()\n{statement}\n"
        "print(time.perf_counter() - start)"
    )


def first_call(op: str, on_gpu: bool) -> dict[str, float]:
    """{"cold", "warm"}: seconds with an empty Triton cache, and with what that left."""
    if on_gpu:
        code = _FIRST_CALL.format(op=op, call=_CALLS[op])
    else:
        code = _COMPILE.format(folder=str(Path(__file__).parent), op=op)
    with tempfile.TemporaryDirectory() as cache:
        return {kind: seconds(code, TRITON_CACHE_DIR=cache) for kind in ("cold", "warm")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ops", nargs="*", choices=_CALLS, default=list(_CALLS))
    parser.add_argument("--json", help="file to append to, one line per number")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    times: dict[str, list[float]] = {}
    for statements in IMPORTS.values():
        import_seconds(*statements)  # leaves the bytecode
    for _ in range(options.repeats):
        for what, statements in IMPORTS.items():
            times.setdefault(what, []).append(import_seconds(*statements))
        times.setdefault("extension", []).append(seconds(_EXTENSION))
    rows = [{"what": what, "seconds": statistics.median(v)} for what, v in times.items()]
    kind = "first call" if on_gpu else "compile only"
    for op in options.ops:
        for cache, value in first_call(op, on_gpu).items():
            rows.append({"what": f"{kind}, {cache}", "op": op, "seconds": value})
    stamp = environment(options.device)
    for row in rows:
        print(f"{row['what']:24}{row.get('op', ''):16}{row['seconds']:8.3f} s")
    if options.json:
        rows = [{"bench": "startup", **row, "seconds": round(row["seconds"], 4)} for row in rows]
        append(options.json, [{**row, **stamp} for row in rows])


if __name__ == "__main__":
    main()
