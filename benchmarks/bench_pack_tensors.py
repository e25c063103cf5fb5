"""pack_tensors against a copy of the bytes it writes, and against torch, on one decoder layer.

python benchmarks/bench_pack_tensors.py [--shape llama-3-8b] [--device cuda] [--json results.jsonl]

The seven matrices of a layer with 60 % of its heads and channels open, in one call. "copy" is
torch's threaded clone of what each line writes, and allocates its result, too; "into" copies it
into memory that is already mapped.
"""

import argparse

import torch
from _harness import append, environment, interleaved
from bench_fold_pack import check

from gatepack import _ext
from gatepack._reference import E4M3, pack_tensors_ref
from gatepack.repack import Piece, pack_tensors, plan_channels, plan_heads, unpack_tensors
from gatepack.testing import MODEL_SHAPES, ModelShape

KEPT = 0.6
RANK = 16


def some_open(units: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(units, generator=generator)[: round(KEPT * units)].sort().values


def layer_pieces(
    s: ModelShape, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, Piece]:
    """One Piece for each matrix; query heads are open in equal numbers per key/value head."""
    ratio = s.heads // s.kv_heads
    within = some_open(ratio, generator)
    heads = (torch.arange(s.kv_heads)[:, None] * ratio + within).flatten()
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = {"q": (q, s.hidden), "k": (kv, s.hidden), "v": (kv, s.hidden), "o": (s.hidden, q)}
    parts = dict(plan_heads(heads, shapes, s.head_dim).parts)
    mlp = {"gate": (s.mlp, s.hidden), "up": (s.mlp, s.hidden), "down": (s.hidden, s.mlp)}
    parts |= plan_channels(some_open(s.mlp, generator), mlp).parts
    return {
        name: Piece(
            torch.randn(part.shape, generator=generator).to(device, dtype),
            *(None if index is None else index.to(device) for index in (part.rows, part.cols)),
        )
        for name, part in parts.items()
    }


def with_lora(piece: Piece, generator: torch.Generator) -> Piece:
    w = piece.matrix
    a = torch.randn(RANK, w.shape[1], generator=generator).to(w)
    b = torch.randn(w.shape[0], RANK, generator=generator).to(w)
    return Piece(w, piece.rows, piece.cols, lora=(a, b, 0.5))


def selected(piece: Piece) -> torch.Tensor:
    w = piece.matrix if piece.rows is None else piece.matrix.index_select(0, piece.rows)
    return w if piece.cols is None else w.index_select(1, piece.cols)


def merged(piece: Piece) -> torch.Tensor:
    a, b, scale = piece.lora
    full = Piece(torch.addmm(piece.matrix, b, a, alpha=scale), piece.rows, piece.cols)
    return selected(full)


def check_against_reference(pieces: list[Piece], dtype: torch.dtype | None) -> None:
    """The bytes of plain torch, on a corner of every matrix: the whole would take minutes."""
    corner = [
        Piece(
            p.matrix[:96, :160],
            *(None if i is None else i[i < n] for i, n in ((p.rows, 96), (p.cols, 160))),
            lora=p.lora and (p.lora[0][:, :160], p.lora[1][:96], p.lora[2]),
            order=p.order,
        )
        for p in pieces
    ]
    lists = [[getattr(p, name) for p in corner] for name in ("matrix", "rows", "cols")]
    lora = [list(x) for x in zip(*(p.lora or (None, None, 1.0) for p in corner), strict=True)]
    none, ones = [None] * len(corner), [1] * len(corner)
    order = [("keep", "row", "column").index(p.order) for p in corner]
    expected, scales = pack_tensors_ref(*lists, none, none, *lora, ones, ones, order, dtype)
    packed, found = pack_tensors(corner, dtype)
    for got, want in zip([*packed, *found], [*expected, *scales], strict=True):
        check(got.view(torch.uint8) if got.dtype == E4M3 else got,
              want.view(torch.uint8) if want.dtype == E4M3 else want, "pack_tensors")  # fmt: skip


def measure(shape: str, dtype: torch.dtype, device: str, seconds: float) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    layer = layer_pieces(MODEL_SHAPES[shape], dtype, device, generator)
    adapted = {name: with_lora(piece, generator) for name, piece in layer.items()}
    crossed = {name: Piece(p.matrix, p.rows, p.cols, order="column") for name, p in layer.items()}
    by_rows = ["q", "k", "v", "gate", "up"]
    lines = (
        ("rows", [layer[n] for n in by_rows], None, selected),
        ("columns", [layer[n] for n in ("o", "down")], None, selected),
        ("layer", list(layer.values()), None, selected),
        ("layer, LoRA", list(adapted.values()), None, merged),
        ("layer, e4m3", list(layer.values()), E4M3, None),
        ("layer, crossed", list(crossed.values()), None, lambda p: selected(p).t().contiguous()),
    )
    rows = []
    for name, pieces, out, torchs in lines:
        check_against_reference(pieces, out)
        packed, _ = pack_tensors(pieces, out)
        targets = [torch.empty_like(p) for p in packed]
        functions = {
            "copy": lambda ps=packed: [p.clone() for p in ps],
            "into": lambda ps=packed, ts=targets: [t.copy_(p) for t, p in zip(ts, ps, strict=True)],
            "pack_tensors": lambda ps=pieces, out=out: pack_tensors(ps, out),
        }
        if torchs:
            functions["torch"] = lambda ps=pieces, f=torchs: [f(p) for p in ps]
        if name == "layer":
            back = [Piece(t, p.rows, p.cols) for t, p in zip(packed, pieces, strict=True)]
            shapes = [tuple(p.matrix.shape) for p in pieces]
            functions["unpack_tensors"] = lambda b=back, s=shapes: unpack_tensors(b, s)
        times = interleaved(functions, seconds, device)
        size = sum(p.nbytes for p in packed)
        for op, time in times.items():
            rows.append(
                {
                    "bench": "pack_tensors",
                    "op": op,
                    "along": name,
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "kept": KEPT,
                    "backend": _ext.backend().name,
                    **{key: round(value, 5) for key, value in time.items()},
                    "GB/s": round(2e-6 * size / time["ms"], 2),
                    "of_copy": round(times["copy"]["ms"] / time["ms"], 3),
                    "of_into": round(times["into"]["ms"] / time["ms"], 3),
                    "of_torch": round(times["torch"]["ms"] / time["ms"], 3) if torchs else None,
                    "error": 0.0,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(MODEL_SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="per line")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", help="file to append to, one line per number")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    stamp = environment(options.device)
    print(f"{stamp['device']}, torch {stamp['torch']}, {_ext.backend().reason}")
    print("x: how many times faster than each; GB/s: bytes kept, read + written")
    for dtype in (torch.bfloat16, torch.float32):
        rows = measure(options.shape, dtype, options.device, options.seconds)
        print(f"\n{options.shape} layer, {rows[0]['dtype']}, {KEPT:.0%} kept")
        columns = ("ms", "p20", "p80", "GB/s", "x copy", "x into", "x torch")
        print(" " * 30 + "".join(f"{column:>9}" for column in columns))
        for row in rows:
            torchs = f"{row['of_torch']:9.2f}" if row["of_torch"] else ""
            print(
                f"{row['along']:16}{row['op']:14}{row['ms']:9.2f}{row['p20']:9.2f}{row['p80']:9.2f}"
                f"{row['GB/s']:9.1f}{row['of_copy']:9.2f}{row['of_into']:9.2f}{torchs}"
            )
        if options.json:
            append(options.json, [{**row, **stamp} for row in rows])


if __name__ == "__main__":
    main()
