"""fold_pack against a copy of the bytes it writes, and against torch's index_select.

python benchmarks/bench_fold_pack.py [--device cuda] [--threads N] [--json results.jsonl]

"copy" is torch's threaded clone of the compact matrix: it too allocates its result. "into" copies
into memory that is already mapped, which no op with a fresh result can reach on large matrices.
"""

import itertools

import torch
from _copies import check, dtype_name, options, run, timed

from gatepack._ext import fold_pack, fold_pack_adjoint, fold_pack_ref

# Where a call costs more than its bytes; SmolLM2-135M's gate_proj and down_proj; results of 2 to
# 20 MB, which the caches hold in part; Llama 3 8B's down_proj.
SHAPES = ((64, 64), (192, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 2048), (4096, 14336))
DTYPES = (torch.float32, torch.bfloat16)
KEPT = 0.6
BASES = ("copy", "index_select")


def kept_indices(size: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(size, generator=generator)
    return order[: int(KEPT * size)].sort().values


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
        rows += timed(
            functions,
            BASES,
            packed.nbytes,
            seconds,
            device,
            bench="fold_pack",
            along=along,
            shape=[m, n],
            dtype=dtype_name(dtype),
            kept=KEPT,
        )
    return rows


def main() -> None:
    chosen = options(__doc__, seconds=3.0).parse_args()
    tables = (
        (
            f"{m} x {n} {dtype_name(dtype)}, {KEPT:.0%} kept",
            measure(m, n, dtype, chosen.device, chosen.seconds),
        )
        for (m, n), dtype in itertools.product(SHAPES, DTYPES)
    )
    run(chosen, BASES, ("along", "op"), tables)


if __name__ == "__main__":
    main()
