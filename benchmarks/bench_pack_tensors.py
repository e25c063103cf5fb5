"""pack_tensors against a copy of the bytes it writes, and against torch, on one decoder layer.

python benchmarks/bench_pack_tensors.py [--shape llama-3-8b] [--device cuda] [--json results.jsonl]

The seven matrices of a layer with 60 % of its heads and channels open, in one call, or back. Like
is compared with like: "fresh" calls allocate their results, whose pages arrive one fault at a time,
and are held against torch's threaded clone; "mapped" ones write to memory that is already there,
and are held against copy_, a threaded memcpy of the same bytes.
"""

import torch
from _copies import check, dtype_name, options, run, timed

from gatepack._reference import E4M3, pack_tensors_ref
from gatepack.repack import Piece, pack_tensors, plan_channels, plan_heads, unpack_tensors
from gatepack.testing import MODEL_SHAPES, ModelShape

KEPT = 0.6
RANK = 16
BASES = ("copy", "torch")


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


def unpacked(piece: Piece, shape: tuple[int, int]) -> torch.Tensor:
    return put_back(piece, torch.empty(shape, dtype=piece.matrix.dtype, device=piece.matrix.device))


def put_back(piece: Piece, full: torch.Tensor) -> torch.Tensor:
    full.zero_()
    if piece.rows is not None:
        return full.index_copy_(0, piece.rows, piece.matrix)
    return full.index_copy_(1, piece.cols, piece.matrix)


def select_into(piece: Piece, out: torch.Tensor) -> torch.Tensor:
    dim, index = (0, piece.rows) if piece.cols is None else (1, piece.cols)
    return torch.index_select(piece.matrix, dim, index, out=out)


def each(function, *lists):
    return lambda: [function(*items) for items in zip(*lists, strict=True)]


def contenders(pieces: list[Piece], out: torch.dtype | None, torchs) -> dict:
    """memory -> op -> call; torchs: what plain torch does with one piece, if anything."""
    packed, scales = pack_tensors(pieces, out)
    targets = [torch.empty_like(p).copy_(p) for p in packed]
    fresh = {"copy": each(torch.clone, packed), "pack": lambda: pack_tensors(pieces, out)}
    mapped = {
        "copy": each(torch.Tensor.copy_, targets, packed),
        "pack": lambda: pack_tensors(pieces, out, out=(targets, scales)),
    }
    if torchs:
        fresh["torch"] = each(torchs, pieces)
    if torchs is selected:
        mapped["torch"] = each(select_into, pieces, [torch.empty_like(p) for p in packed])
    return {"fresh": fresh, "mapped": mapped}


def unpackers(pieces: list[Piece]) -> dict:
    """As contenders, for the way back; the copy is one of the full matrices."""
    packed, _ = pack_tensors(pieces)
    compact = [Piece(t, p.rows, p.cols) for t, p in zip(packed, pieces, strict=True)]
    shapes = [tuple(p.matrix.shape) for p in pieces]
    full = unpack_tensors(compact, shapes)
    for piece, ours in zip(compact, full, strict=True):
        check(ours, unpacked(piece, ours.shape), "unpack_tensors")
    others = [torch.empty_like(t).copy_(t) for t in full]
    return {
        "fresh": {
            "copy": each(torch.clone, full),
            "unpack": lambda: unpack_tensors(compact, shapes),
            "torch": each(unpacked, compact, shapes),
        },
        "mapped": {
            "copy": each(torch.Tensor.copy_, others, full),
            "unpack": lambda: unpack_tensors(compact, shapes, out=others),
            "torch": each(put_back, compact, others),
        },
    }


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
        ("layer, back", list(layer.values()), None, None),
    )
    rows = []
    for name, pieces, out, torchs in lines:
        check_against_reference(pieces, out)
        back = name == "layer, back"
        calls = unpackers(pieces) if back else contenders(pieces, out, torchs)
        written = [p.matrix for p in pieces] if back else pack_tensors(pieces, out)[0]
        for memory, functions in calls.items():
            rows += timed(
                functions,
                BASES,
                sum(t.nbytes for t in written),
                seconds,
                device,
                bench="pack_tensors",
                along=name,
                memory=memory,
                shape=shape,
                dtype=dtype_name(dtype),
                kept=KEPT,
            )
    return rows


def main() -> None:
    parser = options(__doc__, seconds=5.0)
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(MODEL_SHAPES))
    chosen = parser.parse_args()
    tables = (
        (
            f"{chosen.shape} layer, {dtype_name(dtype)}, {KEPT:.0%} kept",
            measure(chosen.shape, dtype, chosen.device, chosen.seconds),
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    run(chosen, BASES, ("along", "memory", "op"), tables)


if __name__ == "__main__":
    main()
