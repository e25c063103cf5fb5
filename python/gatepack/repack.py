"""Stage 5, pack: many matrices in one call, and plans that say which rows of which tensor stay."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from gatepack import _ext
from gatepack._ext import fold_pack, fold_pack_adjoint
from gatepack._reference import E4M3, ORDERS

__all__ = [
    "PackPlan",
    "Part",
    "Piece",
    "fold_pack",
    "fold_pack_adjoint",
    "open_sets",
    "pack_heads",
    "pack_tensors",
    "plan_channels",
    "plan_heads",
    "unpack_tensors",
]

PLAN_VERSION = 1


@dataclass(frozen=True)
class Piece:
    """One matrix of a call [O, I] and what becomes of it; every field as in fold_pack.

    lora: (a [r, I], b [O, r], scale): w + scale · b a is what is packed, the products added in fp32
    in the order of r. row_multiple, col_multiple: zeros follow the kept rows and columns up to a
    multiple. order: of the result in memory, "keep", "row" (row-major) or "column" (column-major,
    which for down_proj is channel-major); its shape stays [rows, columns].
    """

    matrix: Tensor
    rows: Tensor | None = None
    cols: Tensor | None = None
    z_out: Tensor | None = None
    z_in: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    row_multiple: int = 1
    col_multiple: int = 1
    order: str = "keep"


def _require_no_grad(op: str, pieces: Sequence[Piece]) -> None:
    if not torch.is_grad_enabled():
        return
    for i, piece in enumerate(pieces):
        tensors = (piece.matrix, piece.z_out, piece.z_in, *(piece.lora or ())[:2])
        if any(t is not None and t.requires_grad for t in tensors):
            raise ValueError(
                f"{op}: pieces[{i}] must not require grad, the op has no gradient; detach it, or "
                "use gatepack.repack.fold_pack, which has one"
            )


def _order(i: int, order: str) -> int:
    if order not in ORDERS:
        raise ValueError(f"pack_tensors: order[{i}] must be one of {ORDERS}, got {order!r}")
    return ORDERS.index(order)


def _gates(pieces: Sequence[Piece]) -> tuple[list, ...]:
    names = ("matrix", "rows", "cols", "z_out", "z_in")
    return tuple([getattr(piece, name) for piece in pieces] for name in names)


def pack_tensors(
    pieces: Iterable[Piece],
    dtype: torch.dtype | None = None,
    out: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Each piece's matrix[rows, cols] · z_out · z_in, its LoRA merged, padded: one pass over each.

    One threaded pass on a CPU, a launch for each 100 or so matrices of a dtype on CUDA. dtype: of
    the results, default each matrix's own. With torch.float8_e4m3fn a row holds value / scale, and
    the second list has the scales, fp32 [rows]: largest magnitude / 448; else that list is empty.
    out: what an earlier call for the same shapes returned, to be written again instead of fresh
    memory, whose pages cost more than the packing; nothing in it may overlap.
    Refuses what fold_pack refuses, before anything is written; "rows[3]" is those of the fourth.
    """
    pieces = list(pieces)
    if not pieces:
        return [], []
    _require_no_grad("pack_tensors", pieces)
    _ext.backend()
    lora = [piece.lora or (None, None, 1.0) for piece in pieces]
    call = (
        *_gates(pieces),
        *map(list, zip(*lora, strict=True)),
        [piece.row_multiple for piece in pieces],
        [piece.col_multiple for piece in pieces],
        [_order(i, piece.order) for i, piece in enumerate(pieces)],
        dtype,
    )
    with _ext.refusals():
        if out is None:
            return torch.ops.gatepack.pack_tensors.default(*call)
        packed, scales = map(list, out)
        torch.ops.gatepack.pack_tensors_out.default(*call, packed, scales)
        return packed, scales


def unpack_tensors(
    pieces: Iterable[Piece],
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The adjoint of pack_tensors: each matrix · z_out · z_in put back, zero elsewhere.

    shapes: (O, I) of each result. With no gates, the inverse on what was kept. An e4m3 matrix needs
    a dtype, and its scales as z_out. Padding is left out by slicing: packed[:m, :n]. out: what an
    earlier call for the same shapes returned, to be written again.
    """
    pieces, shapes = list(pieces), list(shapes)
    if not pieces:
        return []
    _require_no_grad("unpack_tensors", pieces)
    _ext.backend()
    call = (*_gates(pieces), [m for m, _ in shapes], [n for _, n in shapes], dtype)
    with _ext.refusals():
        if out is None:
            return torch.ops.gatepack.unpack_tensors.default(*call)
        full = list(out)
        torch.ops.gatepack.unpack_tensors_out.default(*call, full)
        return full


def open_sets(masks: Iterable[Tensor]) -> list[Tensor]:
    """bool masks [n] -> int32 [n + 1] each: open units, closed units, number of open units.

    All of them in one launch and without a host sync; the layout of kernels.open_set_fn.
    """
    masks = list(masks)
    if not masks:
        return []
    _ext.backend()
    with _ext.refusals():
        return torch.ops.gatepack.open_sets.default(masks)


def _ranges(index: Tensor | None) -> list[list[int]] | None:
    """Sorted indices as [start, stop] pairs."""
    if index is None:
        return None
    index = index.long().cpu()
    breaks = (index[1:] != index[:-1] + 1).nonzero()[:, 0] + 1
    parts = torch.tensor_split(index, breaks) if index.numel() else ()
    return [[int(part[0]), int(part[-1]) + 1] for part in parts]


def _indices(ranges, size: int, name: str) -> Tensor | None:
    if ranges is None:
        return None
    pairs = ranges if isinstance(ranges, list) else [ranges]
    if not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_size, pair))
        for pair in pairs
    ):
        raise ValueError(f"{name}: expected [start, stop] pairs, got {ranges!r}")
    end = -1
    for start, stop in pairs:
        if not end < start < stop <= size:
            raise ValueError(
                f"{name}: expected ascending ranges in [0, {size}) that do not touch, got "
                f"{ranges!r}"
            )
        end = stop
    parts = [torch.arange(start, stop) for start, stop in pairs]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Part:
    """What stays of one tensor [O, I], or [O] for a bias, whose rows these are; as in Piece."""

    shape: tuple[int, ...]
    rows: Tensor | None = None
    cols: Tensor | None = None
    row_multiple: int = 1
    col_multiple: int = 1
    order: str = "keep"

    def __post_init__(self):
        if len(self.shape) not in (1, 2) or (len(self.shape) == 1 and self.cols is not None):
            raise ValueError(f"shape: expected [O, I], or [O] without cols, got {self.shape}")

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of what stays, without padding."""
        indices = (self.rows, self.cols)[: len(self.shape)]
        return tuple(
            size if index is None else index.numel()
            for size, index in zip(self.shape, indices, strict=True)
        )


@dataclass(frozen=True)
class PackPlan:
    """Which rows and columns of which tensor stay: made once, run on any tensors of these shapes.

    parts: tensor name -> Part. Indices live on the CPU and are moved to a device when a plan first
    runs there. to_dict and from_dict keep a plan as JSON.
    """

    parts: Mapping[str, Part]
    _moved: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def _index(self, name: str, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        key = (name, device)
        if key not in self._moved:
            part = self.parts[name]
            self._moved[key] = tuple(
                None if index is None else index.to(device) for index in (part.rows, part.cols)
            )
        return self._moved[key]

    def _piece(self, name, tensor, z_out, z_in, lora, shape) -> Piece:
        if name not in self.parts:
            raise ValueError(f"tensors: the plan has no part {name!r}; it has {list(self.parts)}")
        part = self.parts[name]
        if tuple(tensor.shape) != tuple(shape(part)):
            raise ValueError(
                f"tensors: {name!r} must be {list(shape(part))}, got {list(tensor.shape)}"
            )
        rows, cols = self._index(name, tensor.device)
        if tensor.dim() == 2:
            return Piece(
                tensor, rows, cols, z_out, z_in, lora,
                part.row_multiple, part.col_multiple, part.order,
            )  # fmt: skip
        # A bias is one row whose columns are the rows of its matrix.
        return Piece(tensor[None], None, rows, None, z_out, col_multiple=part.row_multiple)

    def pack(
        self,
        tensors: Mapping[str, Tensor],
        *,
        z_out: Mapping[str, Tensor] | None = None,
        z_in: Mapping[str, Tensor] | None = None,
        lora: Mapping[str, tuple[Tensor, Tensor, float]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The packed tensors by name; z_out, z_in and lora by name too, as in Piece.

        With torch.float8_e4m3fn, biases keep their dtype and each matrix is followed by its scales,
        named after it: "...weight" and "...weight_scale".
        """
        gates = [mapping or {} for mapping in (z_out, z_in, lora)]
        pieces = {
            name: self._piece(name, tensor, *(m.get(name) for m in gates), lambda part: part.shape)
            for name, tensor in tensors.items()
        }
        apart = [name for name in pieces if dtype == E4M3 and tensors[name].dim() == 1]
        named = [name for name in pieces if name not in apart]
        packed, scales = pack_tensors([pieces[name] for name in named], dtype)
        biases, _ = pack_tensors([pieces[name] for name in apart])
        found = dict(zip([*named, *apart], [*packed, *biases], strict=True))
        scale_of = dict(zip(named, scales, strict=False))
        result = {}
        for name, tensor in tensors.items():
            result[name] = found[name] if tensor.dim() == 2 else found[name][0]
            if name in scale_of:
                result[f"{name}_scale"] = scale_of[name]
        return result

    def unpack(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Tensors of the full shapes, zero where pack left something out.

        Accepts what pack returns: padding is dropped, scales are multiplied in (and need a dtype).
        """
        scales = {
            name for name in tensors if name.removesuffix("_scale") in tensors.keys() - {name}
        }
        pieces, shapes = {}, []
        for name in (name for name in tensors if name not in scales):
            part = self.parts.get(name)
            kept = part.kept if part else ()
            compact = tensors[name][tuple(slice(size) for size in kept)]
            scale = tensors.get(f"{name}_scale")
            scale = None if scale is None else scale[: kept[0]]
            pieces[name] = self._piece(name, compact, scale, None, None, lambda part: part.kept)
            shapes.append(part.shape if len(part.shape) == 2 else (1, *part.shape))
        full = unpack_tensors(pieces.values(), shapes, dtype)
        return {
            name: tensor if len(self.parts[name].shape) == 2 else tensor[0]
            for name, tensor in zip(pieces, full, strict=True)
        }

    def to_dict(self) -> dict:
        """JSON: open sets as [start, stop] ranges, null for all."""
        return {
            "version": PLAN_VERSION,
            "parts": {
                name: {
                    "shape": list(part.shape),
                    "rows": _ranges(part.rows),
                    "cols": _ranges(part.cols),
                    "row_multiple": part.row_multiple,
                    "col_multiple": part.col_multiple,
                    "order": part.order,
                }
                for name, part in self.parts.items()
            },
        }

    @classmethod
    def from_dict(cls, record: Mapping) -> "PackPlan":
        """The inverse of to_dict; ValueError for another version or an unreadable record."""
        version = record.get("version") if isinstance(record, Mapping) else None
        if version != PLAN_VERSION:
            raise ValueError(f"version: expected {PLAN_VERSION}, got {version!r}")
        parts = record.get("parts")
        if not isinstance(parts, Mapping):
            raise ValueError(f"parts: expected an object, got {parts!r}")
        return cls({name: _part(saved, f"parts[{name!r}]") for name, saved in parts.items()})


def _part(saved, name: str) -> Part:
    known = {field.name for field in fields(Part)}
    if not isinstance(saved, Mapping) or not {"shape"} <= saved.keys() <= known:
        raise ValueError(f"{name}: expected a shape and some of {sorted(known)}, got {saved!r}")
    shape = saved["shape"]
    if not isinstance(shape, list | tuple) or not all(_is_size(size) for size in shape):
        raise ValueError(f"{name}.shape: expected a list of sizes, got {shape!r}")
    values = {**saved, "shape": tuple(shape)}
    for side, size in zip(("rows", "cols"), (*shape, 0, 0), strict=False):
        values[side] = _indices(saved.get(side), size, f"{name}.{side}")
    for side in ("row_multiple", "col_multiple"):
        if not _is_size(saved.get(side, 1)) or saved.get(side, 1) < 1:
            raise ValueError(f"{name}.{side}: expected an integer >= 1, got {saved[side]!r}")
    if saved.get("order", "keep") not in ORDERS:
        raise ValueError(f"{name}.order: expected one of {ORDERS}, got {saved['order']!r}")
    try:
        return Part(**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _sorted_lanes(index: Tensor | None, size: int, blocks: int, name: str) -> list[Tensor]:
    """Kept places in [0, size) for each of `blocks`: index is None, [n], or [blocks, n]."""
    if index is None:
        index = torch.arange(size)
    if index.dim() == 1:
        index = index.expand(blocks, -1)
    if index.dim() != 2 or index.shape[0] != blocks:
        raise ValueError(f"{name}: expected [n] or [{blocks}, n], got {list(index.shape)}")
    index = index.long().cpu()
    if bool((index[:, 1:] <= index[:, :-1]).any()) or (
        index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size
    ):
        raise ValueError(f"{name}: expected strictly increasing values in [0, {size})")
    return list(index)


def plan_heads(
    open_heads: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    head_dim: int,
    *,
    pairs: Tensor | None = None,
    v_lanes: Tensor | None = None,
    interleaved: bool = False,
) -> PackPlan:
    """The plan of q, k, v and o (and biases "q.bias" ...) when only open_heads stay.

    open_heads: sorted query heads. shapes: of "q" [H·D, hidden], "k", "v" [KV·D, hidden], "o"
    [hidden, H·D], and of any biases. Query heads share key/value heads H / KV each: a key/value
    head stays while one of its query heads does, and those that stay need equally many (engines
    know one ratio). pairs: RoPE pairs that stay, sorted, [P] or [KV, P] for each key/value head:
    lanes p and p + D/2 of q and k (2p and 2p + 1 if interleaved), so that scores of the others
    only are lost; the rotary frequencies to keep are inv_freq[pairs]. v_lanes: lanes of v and o
    that stay, [n] or [KV, n]. Raises ValueError for anything else.
    """
    heads, kv = shapes["q"][0] // head_dim, shapes["k"][0] // head_dim
    if kv == 0 or heads % kv or shapes["q"][0] % head_dim or shapes["k"][0] % head_dim:
        raise ValueError(
            f"shapes: expected query heads in multiples of key/value heads of {head_dim} lanes, "
            f"got {shapes['q'][0]} and {shapes['k'][0]} rows"
        )
    (open_heads,) = _sorted_lanes(open_heads, heads, 1, "open_heads")
    ratio = heads // kv
    counts = torch.bincount(open_heads // ratio, minlength=kv)
    open_groups = counts.nonzero()[:, 0]
    if len(set(counts[open_groups].tolist())) > 1:
        raise ValueError(
            "open_heads: expected equally many query heads for each key/value head that stays, got "
            f"{counts.tolist()}; gatepack.masks.physical_mask adds the missing ones"
        )
    half = head_dim // 2
    qk = []
    for p in _sorted_lanes(pairs, half, kv, "pairs") if pairs is not None else ():
        lanes = torch.stack([2 * p, 2 * p + 1], 1).flatten() if interleaved else None
        qk.append(torch.cat([p, p + half]) if lanes is None else lanes)
    qk = qk or [torch.arange(head_dim)] * kv
    vo = _sorted_lanes(v_lanes, head_dim, kv, "v_lanes")

    def lanes_of(units: Tensor, per_group: list[Tensor], share: int) -> Tensor:
        parts = [unit * head_dim + per_group[int(unit) // share] for unit in units]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    kept = {
        "q": (lanes_of(open_heads, qk, ratio), None),
        "k": (lanes_of(open_groups, qk, 1), None),
        "v": (lanes_of(open_groups, vo, 1), None),
        "o": (None, lanes_of(open_heads, vo, ratio)),
    }
    return PackPlan(
        {
            name: Part(tuple(shape), *kept[name.split(".")[0]][: len(shape)])
            for name, shape in shapes.items()
        }
    )


def pack_heads(
    tensors: Mapping[str, Tensor],
    open_heads: Tensor,
    head_dim: int,
    *,
    z: Tensor | None = None,
    pairs: Tensor | None = None,
    v_lanes: Tensor | None = None,
    interleaved: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """q, k, v and o with only open_heads left, in one call; arguments as in plan_heads.

    tensors: "q", "k", "v", "o" and any biases. z: fp32 value of each open head's gate, folded into
    the columns of o. The result has the same names.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    options = {"pairs": pairs, "v_lanes": v_lanes, "interleaved": interleaved}
    plan = plan_heads(open_heads, shapes, head_dim, **options)
    z_in = None
    if z is not None:
        if tuple(z.shape) != tuple(open_heads.shape):
            raise ValueError(f"z: expected {list(open_heads.shape)}, got {list(z.shape)}")
        lanes = plan.parts["o"].cols.numel() // max(z.numel(), 1)
        z_in = {"o": z.repeat_interleave(lanes)}
    return plan.pack(tensors, z_in=z_in, dtype=dtype)


def plan_channels(
    open_channels: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    down: str = "down",
    *,
    multiple: int = 1,
    channel_major: bool = False,
) -> PackPlan:
    """The plan of an MLP when only open_channels stay: rows of all tensors but `down`, its columns.

    multiple: widths are padded with closed (zero) channels up to it. channel_major: keep `down`
    column-major, so that packing it again copies rows.
    """
    channels = open_channels.long().cpu()
    order = "column" if channel_major else "keep"
    return PackPlan(
        {
            name: Part(tuple(shape), None, channels, 1, multiple, order)
            if name == down
            else Part(tuple(shape), channels, None, multiple)
            for name, shape in shapes.items()
            if name != f"{down}.bias"
        }
    )
