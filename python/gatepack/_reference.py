"""Stage 5, pack: the ops of gatepack._C in plain torch; every backend packs to the same bytes.

Refuses what the C++ ops refuse, in the same words. csrc/layout.h draws the layout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
ORDERS = ("keep", "row", "column")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DTYPE_NAMES = "float32, float64, float16 or bfloat16"
_E4M3_LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-126


def _row_major(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1


def empty_like_order(like: Tensor, m: int, n: int, dtype: torch.dtype, order: int = 0) -> Tensor:
    """[m, n] in the majorness of a matrix, or in the one that order (of ORDERS) asks for."""
    row_major = _row_major(like) if order == 0 else ORDERS[order] == "row"
    if row_major:
        return like.new_empty((m, n), dtype=dtype)
    return like.new_empty((n, m), dtype=dtype).t()


def rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _check_index(op: str, name: str, index: Tensor | None, bound: int) -> int:
    if index is None:
        return bound
    _require(index.dim() == 1, f"{op}: {name} must have 1 dimension, got {index.dim()}")
    _require(
        index.dtype in (torch.int64, torch.int32),
        f"{op}: {name} must be int64 or int32, got {index.dtype}",
    )
    # Reading an index that lives elsewhere would stop the host; torch checks its range there.
    if index.device.type == "cpu" and index.numel():
        _require(bool((index[1:] > index[:-1]).all()), f"{op}: {name} must be strictly increasing")
        low, high = int(index[0]), int(index[-1])
        _require(
            low >= 0 and high < bound,
            f"{op}: {name} must be in [0, {bound}), got {low if low < 0 else high}",
        )
    return index.numel()


def _check_gate(op: str, name: str, gate: Tensor | None, kept: int, wide: bool) -> None:
    if gate is None:
        return
    allowed = (torch.float32, torch.float64) if wide else (torch.float32,)
    _require(gate.dim() == 1, f"{op}: {name} must have 1 dimension, got {gate.dim()}")
    _require(
        gate.dtype in allowed,
        f"{op}: {name} must be float32{' or float64' if wide else ''}, got {gate.dtype}",
    )
    _require(
        gate.numel() == kept,
        f"{op}: {name} must have one value per kept unit ({kept}), got {gate.numel()}",
    )


def _check(op, name, matrix, rows, cols, z_out, z_in, shape, place="") -> tuple[int, int]:
    """Refuse what the C++ op refuses; return the compact shape."""
    _require(
        _row_major(matrix) or matrix.stride(0) == 1 or matrix.shape[0] <= 1,
        f"{op}: {name}{place} must have stride 1 in one dimension, got strides {matrix.stride()}",
    )
    kept = (
        _check_index(op, f"rows{place}", rows, shape[0]),
        _check_index(op, f"cols{place}", cols, shape[1]),
    )
    wide = matrix.dtype == torch.float64
    _check_gate(op, f"z_out{place}", z_out, kept[0], wide)
    _check_gate(op, f"z_in{place}", z_in, kept[1], wide)
    return kept


def _check_full(op, w, place, dtype, e4m3=False) -> None:
    _require(w.dim() == 2, f"{op}: w{place} must have 2 dimensions, got {w.dim()}")
    _require(w.dtype in _DTYPES, f"{op}: w{place} must be {_DTYPE_NAMES}, got {w.dtype}")
    allowed = (*_DTYPES, E4M3) if e4m3 else _DTYPES
    names = "float32, float64, float16, bfloat16 or float8_e4m3fn" if e4m3 else _DTYPE_NAMES
    _require(dtype is None or dtype in allowed, f"{op}: dtype must be {names}, got {dtype}")


def _scaled(kept: Tensor, z_out: Tensor | None, z_in: Tensor | None) -> Tensor:
    if z_out is None and z_in is None:
        return kept
    kept = kept if kept.dtype == torch.float64 else kept.float()
    kept = kept if z_out is None else kept * z_out[:, None]
    return kept if z_in is None else kept * z_in[None, :]


def _select(matrix: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    matrix = matrix if rows is None else matrix.index_select(0, rows)
    return matrix if cols is None else matrix.index_select(1, cols)


def fold_pack_ref(
    w, rows=None, cols=None, z_out=None, z_in=None, dtype=None, stream=False
) -> Tensor:
    """(w[rows, cols] · z_out) · z_in in fp32, rounded once: what every backend must equal."""
    _check_full("fold_pack", w, "", dtype)
    m, n = _check("fold_pack", "w", w, rows, cols, z_out, z_in, w.shape)
    values = _scaled(_select(w, rows, cols), z_out, z_in)
    return empty_like_order(w, m, n, dtype or w.dtype).copy_(values)


def _merged(kept: Tensor, a: Tensor, b: Tensor, scale: float, rows, cols) -> Tensor:
    """kept + scale · (b a), the products added one by one in the order of the rank."""
    dtype = torch.float64 if kept.dtype == torch.float64 else torch.float32
    a = _select(a.to(dtype), None, cols)
    b = _select(b.to(dtype), rows, None)
    total = b[:, :1] * a[:1]
    for k in range(1, a.shape[0]):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    return kept.to(dtype) + total * torch.tensor(scale, dtype=dtype)


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values / scale and the fp32 scales of the rows."""
    values = values.float()
    if values.shape[1] == 0:
        return values.to(E4M3), values.new_ones(values.shape[0])
    largest = values.abs().amax(1)
    scale = (largest / _E4M3_LARGEST).clamp(min=_SMALLEST_SCALE)
    scale = torch.where(largest == 0, 1.0, scale)
    return (values / scale[:, None]).to(E4M3), scale


def _check_extras(w, a, b, row_multiple, col_multiple, order, place) -> None:
    op = "pack_tensors"
    _require(
        row_multiple >= 1 and col_multiple >= 1,
        f"{op}: row_multiple{place} and col_multiple must be at least 1, got {row_multiple} and "
        f"{col_multiple}",
    )
    _require(order in (0, 1, 2), f"{op}: order{place} must be 0, 1 or 2, got {order}")
    _require((a is None) == (b is None), f"{op}: lora_a{place} and lora_b must come together")
    if a is None:
        return
    rank = a.shape[0] if a.dim() == 2 else 0
    for name, factor, m, n in (("lora_a", a, rank, w.shape[1]), ("lora_b", b, w.shape[0], rank)):
        got = " x ".join(map(str, factor.shape))
        _require(
            factor.dim() == 2 and tuple(factor.shape) == (m, n),
            f"{op}: {name}{place} must be {m} x {n}, got {got}",
        )
        _require(
            factor.dtype in _DTYPES,
            f"{op}: {name}{place} must be {_DTYPE_NAMES}, got {factor.dtype}",
        )


def _same_lengths(op: str, first: list, *others: list) -> None:
    for other in others:
        _require(
            len(other) == len(first),
            f"{op}: every list must have one entry per matrix ({len(first)}), got {len(other)}",
        )


def pack_tensors_ref(
    w, rows, cols, z_out, z_in, lora_a, lora_b, lora_scale, row_multiple, col_multiple, order, dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """fold_pack of many matrices, with LoRA, padding, order and e4m3; (packed, scales of e4m3)."""
    lists = (
        w, rows, cols, z_out, z_in, lora_a, lora_b, lora_scale, row_multiple, col_multiple, order,
    )  # fmt: skip
    _same_lengths("pack_tensors", *lists)
    shapes = []
    for i, (full, r, c, zo, zi, a, b, _, rm, cm, o) in enumerate(zip(*lists, strict=True)):
        _check_full("pack_tensors", full, f"[{i}]", dtype, e4m3=True)
        shapes.append(_check("pack_tensors", "w", full, r, c, zo, zi, full.shape, f"[{i}]"))
        _check_extras(full, a, b, rm, cm, o, f"[{i}]")
    packed, scales = [], []
    for full, r, c, zo, zi, a, b, s, rm, cm, o in zip(*lists, strict=True):
        values = _select(full, r, c)
        if a is not None and a.shape[0]:
            values = _merged(values, a, b, s, r, c)
        values = _scaled(values, zo, zi)
        (m, n), target = values.shape, dtype or full.dtype
        out = empty_like_order(full, rounded_up(m, rm), rounded_up(n, cm), target, o)
        if target == E4M3:
            values, scale = _quantised(values)
            scales.append(scale.new_ones(out.shape[0]))
            scales[-1][:m] = scale
        out.view(torch.uint8).zero_() if target == E4M3 else out.zero_()
        out[:m, :n] = values
        packed.append(out)
    return packed, scales


def _write_results(op, out, scales, packed, found) -> None:
    """Copies what was computed to memory that the caller brings, refusing what C++ refuses."""
    for name, given, computed in (("out", out, packed), ("scales", scales, found)):
        _require(
            len(given) == len(computed),
            f"{op}: {name} must have one entry per matrix ({len(computed)}), got {len(given)}",
        )
    for i, (target, value) in enumerate(zip(out, packed, strict=True)):
        m, n = value.shape
        got = " x ".join(map(str, target.shape))
        _require(target.shape == value.shape, f"{op}: out[{i}] must be {m} x {n}, got {got}")
        _require(
            target.dtype == value.dtype,
            f"{op}: out[{i}] must be {value.dtype}, got {target.dtype}",
        )
        fits = zip(value.shape, target.stride(), value.stride(), strict=True)
        _require(
            not value.numel() or all(size <= 1 or have == want for size, have, want in fits),
            f"{op}: out[{i}] must have strides {value.stride()}, got {target.stride()}",
        )
    for i, (target, value) in enumerate(zip(scales, found, strict=True)):
        _require(
            target.dtype == torch.float32 and target.shape == value.shape,
            f"{op}: scales[{i}] must be float32 with one value per row ({value.numel()}), got "
            f"{target.numel()} of {target.dtype}",
        )
    for target, value in zip([*out, *scales], [*packed, *found], strict=True):
        target.copy_(value)


def _require_apart(op, matrices, results) -> None:
    """That no result shares memory with another tensor."""
    ranges = []
    for written, tensors in ((False, matrices), (True, results)):
        for t in tensors:
            if t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                begin = t.data_ptr()
                ranges.append((begin, begin + (last + 1) * t.element_size(), written))
    end_of_any = end_of_written = 0
    for begin, end, written in sorted(ranges):
        _require(
            begin >= (end_of_any if written else end_of_written),
            f"{op}: out must share no memory with the matrices or with itself",
        )
        end_of_any = max(end_of_any, end)
        end_of_written = max(end_of_written, end) if written else end_of_written


def pack_tensors_out_ref(w, *arguments) -> None:
    """pack_tensors_ref into the last two arguments, out and scales."""
    *arguments, out, scales = arguments
    _require_apart("pack_tensors", w, [*out, *scales])
    _write_results("pack_tensors", out, scales, *pack_tensors_ref(w, *arguments))


def _unpacked(g, rows, cols, z_out, z_in, O, I, dtype) -> Tensor:
    dtype = dtype or g.dtype
    values = _scaled(g.float() if g.dtype == E4M3 else g, z_out, z_in).to(dtype)
    if cols is not None:
        values = values.new_zeros(values.shape[0], I).index_copy_(1, cols.long(), values)
    if rows is not None:
        values = values.new_zeros(O, I).index_copy_(0, rows.long(), values)
    return empty_like_order(g, O, I, dtype).copy_(values)


def _check_compact(op, g, rows, cols, z_out, z_in, O, I, dtype, place="") -> None:
    _require(g.dim() == 2, f"{op}: g{place} must have 2 dimensions, got {g.dim()}")
    _require(
        g.dtype in _DTYPES or (g.dtype == E4M3 and dtype is not None),
        f"{op}: g{place} must be {_DTYPE_NAMES} (or float8_e4m3fn, with a dtype), got {g.dtype}",
    )
    _require(dtype is None or dtype in _DTYPES, f"{op}: dtype must be {_DTYPE_NAMES}, got {dtype}")
    _require(O >= 0 and I >= 0, f"{op}: O{place} and I must not be negative, got {O} and {I}")
    kept = _check(op, "g", g, rows, cols, z_out, z_in, (O, I), place)
    _require(
        tuple(g.shape) == kept,
        f"{op}: g{place} must be {kept[0]} x {kept[1]}, got {g.shape[0]} x {g.shape[1]}",
    )


def fold_pack_adjoint_ref(g, rows, cols, z_out, z_in, O, I, dtype=None) -> Tensor:
    """The adjoint of fold_pack in w: g scaled and put back, zero elsewhere."""
    _check_compact("fold_pack_adjoint", g, rows, cols, z_out, z_in, O, I, dtype)
    return _unpacked(g, rows, cols, z_out, z_in, O, I, dtype)


def unpack_tensors_ref(g, rows, cols, z_out, z_in, O, I, dtype) -> list[Tensor]:
    """fold_pack_adjoint of many matrices."""
    lists = (g, rows, cols, z_out, z_in, O, I)
    _same_lengths("unpack_tensors", *lists)
    for i, arguments in enumerate(zip(*lists, strict=True)):
        _check_compact("unpack_tensors", *arguments, dtype, f"[{i}]")
    return [_unpacked(*arguments, dtype) for arguments in zip(*lists, strict=True)]


def unpack_tensors_out_ref(g, *arguments) -> None:
    """unpack_tensors_ref into the last argument, out."""
    *arguments, out = arguments
    _require_apart("unpack_tensors", g, out)
    _write_results("unpack_tensors", out, [], unpack_tensors_ref(g, *arguments), [])


def open_sets_ref(masks) -> list[Tensor]:
    """bool [n] each -> int32 [n + 1]: open units, closed units, number of open units."""
    for i, mask in enumerate(masks):
        _require(mask.dtype == torch.bool, f"open_sets: masks[{i}] must be bool, got {mask.dtype}")
        _require(mask.dim() == 1, f"open_sets: masks[{i}] must have 1 dimension, got {mask.dim()}")
    return [
        torch.cat([torch.argsort(~mask, stable=True), mask.sum().view(1)]).to(torch.int32)
        for mask in masks
    ]


def remap_ids_ref(ids, table) -> Tensor:
    """table[ids] in the dtype of ids, refusing ids outside of table and those it drops (-1)."""
    op = "remap_ids"
    _require(
        ids.dtype in (torch.int64, torch.int32),
        f"{op}: ids must be int64 or int32, got {ids.dtype}",
    )
    _require(ids.is_contiguous(), f"{op}: ids must be contiguous")
    _require(table.dtype == torch.int32, f"{op}: table must be int32, got {table.dtype}")
    _require(table.dim() == 1, f"{op}: table must have 1 dimension, got {table.dim()}")
    flat = ids.flatten()
    inside = (flat >= 0) & (flat < table.numel())
    if ids.device.type != "cpu":
        return table.index_select(0, flat).view(ids.shape).to(ids.dtype)
    names = table.index_select(0, torch.where(inside, flat, 0)) if table.numel() else flat - flat
    refused = (~inside | (names < 0)).nonzero()
    if refused.numel():
        at = int(refused[0])
        _require(
            not inside[at],
            f"{op}: ids must be kept ones, got {flat[at]} at position {at}, which table drops: "
            "encode the text with the packed tokenizer",
        )
        _require(
            False, f"{op}: ids must be in [0, {table.numel()}), got {flat[at]} at position {at}"
        )
    return names.view(ids.shape).to(ids.dtype)


def _lane_values(z: Tensor | None, lanes: int) -> Tensor | float:
    return 1.0 if z is None else z.repeat_interleave(lanes)


def open_linear_ref(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    z_out: Tensor | None,
    z_in: Tensor | None,
    out_lanes: int,
    in_lanes: int,
) -> Tensor:
    part = _select(w, rows, cols).float()
    y = (x.float() * _lane_values(z_in, in_lanes)) @ part.t()
    if bias is not None:
        y = y + (bias if rows is None else bias[rows]).float()
    return (y * _lane_values(z_out, out_lanes)).to(x.dtype)


def _per_unit(a: Tensor, b: Tensor, lanes: int) -> Tensor:
    return column_products_ref(a, b).reshape(-1, lanes).sum(1)


def open_linear_backward_ref(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    w: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    z_out: Tensor | None,
    z_in: Tensor | None,
    out_lanes: int,
    in_lanes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = (dy.float() * _lane_values(z_out, out_lanes)) @ _select(w, rows, cols).float()
    dz_in, dz_out = (dy.new_empty(0, dtype=torch.float32) for _ in range(2))
    if x is not None:
        dz_in = torch.where(z_in > 0, _per_unit(x, dx, in_lanes), 0.0)
    if y is not None:
        dz_out = torch.where(z_out > 0, _per_unit(dy, y, out_lanes) / z_out, 0.0)
    return (dx * _lane_values(z_in, in_lanes)).to(dy.dtype), dz_out, dz_in


def swiglu_ref(a: Tensor, u: Tensor, z: Tensor | None = None) -> Tensor:
    h = F.silu(a) * u
    return h if z is None else torch.where(z == 0, 0.0, h * z)


def swiglu_backward_ref(
    dh: Tensor, a: Tensor, u: Tensor, z: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(a)
    dz = a.new_empty(0)
    if z is not None:
        dz = torch.where(z == 0, 0.0, (dh * (a * s * u)).flatten(0, -2).sum(0))
        dh = torch.where(z == 0, 0.0, dh * z)
    return dh * u * (s * (1 + a * (1 - s))), dh * (a * s), dz


def gate_lanes_ref(x: Tensor, z: Tensor, lanes: int) -> Tensor:
    z = z.repeat_interleave(lanes)
    return torch.where(z == 0, 0.0, x * z).to(x.dtype)


def gate_lanes_backward_ref(dy: Tensor, x: Tensor, z: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    products = (dy.to(wide) * x.to(wide)).reshape(x.shape[:-1].numel(), x.shape[-1])
    dz = torch.where(z == 0, 0.0, products.sum(0).reshape(-1, lanes).sum(1)).to(z.dtype)
    return gate_lanes_ref(dy, z, lanes), dz


def column_products_ref(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() * b.float()).sum(0)
