"""fold_pack against a copy of the bytes it writes, and against torch's index_select.

python benchmarks/bench_fold_pack.py [--device cuda] [--threads N] [--json results.jsonl]

"copy" is torch's threaded clone of the compact matrix: it too allocates its result. "into" copies
into memory that is already mapped, which no op with a fresh result can reach on large matrices.
"""

import argparse
import itertools

import torch
from _harness import append, environment, interleaved

from gatepack import _ext
from gatepack._ext import fold_pack, fold_pack_adjoint, fold_pack_ref

SHAPES = ((576, 1536), (4096, 14336))  # SmolLM2-135M's gate_proj, transposed, and Llama 3 8B's
DTYPES = (torch.float32, torch.bfloat16)
KEPT = 0.6


def kept_indices(size: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(size, generator=generator)
    return order[: int(KEPT * size)].sort().values


def check(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    if not torch.equal(actual, expected):
        raise SystemExit(f"{name} is wrong: not timed")


def measure(m: int, n: int, dtype: torch.dtype, device: str, seconds: float) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(m, n, generator=generator).to(device, dtype)
    rows = []
    for along, size in (("rows", m), ("cols", n)):
        index = kept_indices(size, generator).to(device)
        z = torch.rand(len(index), generator=generator).to(device)
        by_rows = along == "rows"
        chosen = (index, None) if by_rows else (None, index)
        gates = (z, None) if by_rows else (None, z)
        packed = fold_pack(w, *chosen)
        target = torch.empty_like(packed)
        check(packed, w.index_select(0 if by_rows else 1, index), "fold_pack")
        check(fold_pack(w, *chosen, *gates), fold_pack_ref(w, *chosen, *gates), "fold_pack, gates")
        back = fold_pack_adjoint(packed, *chosen, None, None, m, n)
        check(fold_pack(back, *chosen), packed, "fold_pack_adjoint")
        functions = {
            "copy": packed.clone,
            "into": lambda packed=packed, target=target: target.copy_(packed),
            "index_select": lambda d=0 if by_rows else 1, i=index: w.index_select(d, i),
            "pack": lambda c=chosen: fold_pack(w, *c),
            "pack, gates": lambda c=chosen, g=gates: fold_pack(w, *c, *g),
            "torch, gates": lambda c=chosen, g=gates: fold_pack_ref(w, *c, *g),
            "adjoint": lambda c=chosen, p=packed: fold_pack_adjoint(p, *c, None, None, m, n),
        }
        times = interleaved(functions, seconds, device)
        for name, time in times.items():
            rows.append(
                {
                    "bench": "fold_pack",
                    "op": name,
                    "along": along,
                    "shape": [m, n],
                    "dtype": str(dtype).removeprefix("torch."),
                    "kept": KEPT,
                    "backend": _ext.backend().name,
                    **{key: round(value, 5) for key, value in time.items()},
                    "GB/s": round(2e-6 * packed.nbytes / time["ms"], 2),
                    "of_copy": round(times["copy"]["ms"] / time["ms"], 3),
                    "of_index_select": round(times["index_select"]["ms"] / time["ms"], 3),
                    "error": 0.0,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="per table")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", help="file to append to, one line per number")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    stamp = environment(options.device)
    print(f"{stamp['device']}, torch {stamp['torch']}, {_ext.backend().reason}")
    print(
        "x copy, x index_select: how many times faster than each; GB/s: bytes kept, read + written"
    )
    for (m, n), dtype in itertools.product(SHAPES, DTYPES):
        rows = measure(m, n, dtype, options.device, options.seconds)
        print(f"\n{m} x {n} {rows[0]['dtype']}, {KEPT:.0%} kept")
        print(f"{'':20}{'ms':>9}{'p20':>9}{'p80':>9}{'GB/s':>9}{'x copy':>9}{'x index_select':>16}")
        for row in rows:
            print(
                f"{row['along']:6}{row['op']:14}{row['ms']:9.3f}{row['p20']:9.3f}{row['p80']:9.3f}"
                f"{row['GB/s']:9.1f}{row['of_copy']:9.2f}{row['of_index_select']:16.2f}"
            )
        if options.json:
            append(options.json, [{**row, **stamp} for row in rows])


if __name__ == "__main__":
    main()
