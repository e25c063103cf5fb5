"""pack_tensors and unpack_tensors: the reference against the formula, every backend against the
reference, byte by byte; properties; refusals before anything is written."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrices import DTYPES, LEVELS, assert_same_bytes, gate, instruction_set, matrix, open_sets

from gatepack import _ext
from gatepack._ext import fold_pack, fold_pack_adjoint
from gatepack._reference import (
    E4M3,
    pack_tensors_out_ref,
    pack_tensors_ref,
    unpack_tensors_out_ref,
    unpack_tensors_ref,
)
from gatepack.repack import Piece, pack_tensors, unpack_tensors

PER_TEST = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def op(name):
    _ext.backend()
    return getattr(torch.ops.gatepack, name).default


@pytest.fixture(params=LEVELS)
def level(request):
    with instruction_set(request.param):
        yield request.param


@st.composite
def pieces(draw, dtype):
    """The arguments of one matrix, in the order of the op's lists."""
    m, n = draw(st.integers(0, 70)), draw(st.integers(0, 150))
    seed = draw(st.integers(0, 1000))
    w = matrix(m, n, dtype, draw(st.booleans()), seed)
    if draw(st.booleans()) and m > 2 and n > 2:
        w = w[1:, : n - 1]
    m, n = w.shape
    rows, cols = draw(open_sets(m)), draw(open_sets(n))
    z_out = z_in = a = b = None
    if draw(st.booleans()):
        z_out = gate(m if rows is None else len(rows), seed + 1)
    if draw(st.booleans()):
        z_in = gate(n if cols is None else len(cols), seed + 2)
    if draw(st.booleans()):
        rank, factor = draw(st.integers(0, 5)), draw(st.sampled_from(DTYPES))
        a = matrix(rank, n, factor, draw(st.booleans()), seed + 3)
        b = matrix(m, rank, factor, draw(st.booleans()), seed + 4)
    multiples = [draw(st.sampled_from((1, 2, 8, 64))) for _ in range(2)]
    scale = draw(st.sampled_from((0.0, 1.0, -0.37)))
    return (w, rows, cols, z_out, z_in, a, b, scale, *multiples, draw(st.integers(0, 2)))


@st.composite
def calls(draw, out_types=(None, *DTYPES, E4M3)):
    dtype = draw(st.sampled_from(DTYPES))
    chosen = draw(st.lists(pieces(dtype), min_size=1, max_size=4))
    return (*map(list, zip(*chosen, strict=True)), draw(st.sampled_from(out_types)))


@PER_TEST
@given(call=calls())
def test_every_instruction_set_writes_the_bytes_of_the_reference(level, call):
    packed, scales = op("pack_tensors")(*call)
    expected, expected_scales = pack_tensors_ref(*call)
    assert len(scales) == len(expected_scales) == (len(packed) if call[-1] == E4M3 else 0)
    for got, want in zip([*packed, *scales], [*expected, *expected_scales], strict=True):
        assert_same_bytes(got, want)
        assert got.stride() == want.stride() or 1 in got.shape or not got.numel()


@settings(max_examples=40, deadline=None)
@given(call=calls(out_types=(torch.float64,)))
def test_reference_is_the_formula(call):
    """Nothing shared with the package, in fp64; LoRA merges before anything is left out."""
    packed, _ = pack_tensors_ref(*call)
    for out, w, rows, cols, z_out, z_in, a, b, scale, rm, cm, order in zip(
        packed, *call[:-1], strict=True
    ):
        full = w.double()
        size = full.abs()
        if a is not None:
            full = full + scale * b.double() @ a.double()
            size = size + abs(scale) * b.double().abs() @ a.double().abs()
        for z, index, dim in ((z_out, rows, 0), (z_in, cols, 1)):
            index = torch.arange(full.shape[dim]) if index is None else index.long()
            full, size = full.index_select(dim, index), size.index_select(dim, index)
            if z is not None:
                shape = (-1, 1) if dim == 0 else (1, -1)
                full, size = full * z.double().view(shape), size * z.double().view(shape)
        m, n = full.shape
        assert out.shape == (-(-m // rm) * rm, -(-n // cm) * cm)
        assert not out[m:].any() and not out[:, n:].any()
        eps = torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps
        assert ((out[:m, :n] - full).abs() <= 12 * eps * size).all()
        if order and out.numel():
            assert (out if order == 1 else out.t()).is_contiguous()


@settings(max_examples=40, deadline=None)
@given(call=calls(out_types=(E4M3,)))
def test_e4m3_is_as_close_as_its_three_bits_allow(call):
    packed, scales = pack_tensors_ref(*call)
    exact, _ = pack_tensors_ref(*call[:-1], torch.float64)
    for q, scale, values in zip(packed, scales, exact, strict=True):
        assert scale.shape == q.shape[:1] and (scale > 0).all()
        back = q.double() * scale[:, None].double()
        largest = values.abs().amax(1, keepdim=True) if values.shape[1] else values[:, :1]
        bound = (values.abs() / 16).maximum(largest / 448 * 2.0**-10) * (1 + 1e-6)
        assert ((back - values).abs() <= bound + 1e-37).all()
        assert (q.float().abs().amax(1)[largest[:, 0] > 0] == 448).all() if q.numel() else True


@PER_TEST
@given(call=calls(), seed=st.integers(0, 1000))
def test_packing_commutes_with_any_permutation(level, call, seed):
    """Rows and columns renamed, with their gates, factors and open sets: what is kept has the same
    values, in the new order. One matrix: the permuted lists of a call would say no more."""
    generator = torch.Generator().manual_seed(seed)
    w, rows, cols, z_out, z_in, a, b, scale, *_ = (x[0] for x in call[:-1])
    dtype = None if call[-1] == E4M3 else call[-1]
    parts = [w, a, b]
    opened, gates, moves = [], [], []
    for dim, (index, gate_values) in enumerate(((rows, z_out), (cols, z_in))):
        order = torch.randperm(w.shape[dim], generator=generator)  # unit order[i] becomes unit i
        for i, along in ((0, dim), (2, 0) if dim == 0 else (1, 1)):
            parts[i] = None if parts[i] is None else parts[i].index_select(along, order)
        old = torch.arange(w.shape[dim]) if index is None else index.long()
        place = torch.full((w.shape[dim],), -1)
        place[old] = torch.arange(len(old))
        move = place[order][place[order] >= 0]  # kept unit move[i] becomes kept unit i
        opened.append(None if index is None else (place[order] >= 0).nonzero()[:, 0])
        gates.append(None if gate_values is None else gate_values[move])
        moves.append(move)

    def packed(w, rows, cols, z_out, z_in, a, b):
        lists = ([x] for x in (w, rows, cols, z_out, z_in, a, b, scale, 1, 1, 0))
        return op("pack_tensors")(*lists, dtype)[0][0]

    moved = packed(parts[0], *opened, *gates, *parts[1:])
    expected = packed(w, rows, cols, z_out, z_in, a, b)
    assert_same_bytes(moved, expected[moves[0]][:, moves[1]])


@PER_TEST
@given(kept=st.lists(st.integers(-2, 30), max_size=12), by_rows=st.booleans())
def test_index_is_refused_unless_increasing_and_inside(level, kept, by_rows):
    """Before a byte is written: the matrix in front of the refused one keeps its result too."""
    w, index = matrix(29, 29, torch.float32), torch.tensor(kept, dtype=torch.int64)
    out = [torch.full((29, 29), 7.0), torch.full((len(kept), 29), 7.0)]
    if not by_rows:
        out[1] = torch.full((29, len(kept)), 7.0)
    none, ones = [None] * 2, [1] * 2
    sides = [[None, index], none] if by_rows else [none, [None, index]]
    call = ([w, w], *sides, *[none] * 4, [1.0] * 2, ones, ones, [0] * 2, None, out, [])
    if kept == sorted(set(kept)) and set(kept) <= set(range(29)):
        op("pack_tensors_out")(*call)
        assert_same_bytes(out[0], w)
        assert_same_bytes(out[1], w.index_select(0 if by_rows else 1, index))
        return
    name = "rows" if by_rows else "cols"
    with pytest.raises(ValueError, match=rf"pack_tensors: {name}\[1\] must be"), _ext.refusals():
        op("pack_tensors_out")(*call)
    assert all(bool((t == 7).all()) for t in out)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rows_beyond_the_last_cache(level, dtype):
    """33 MB and more leave the kernels another way; lines that begin anywhere in a cache line."""
    w = torch.arange(6000 * 5003, dtype=torch.int32).view(dtype).view(-1, 5003)
    w = w[:, 1:]
    rows = (torch.arange(len(w)) % 3 != 0).nonzero()[:, 0]
    packed, _ = pack_tensors([Piece(w, rows, row_multiple=64)])
    assert packed[0].nbytes > 33 << 20
    bits = w.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    assert torch.equal(packed[0][: len(rows)].view(bits.dtype), bits.index_select(0, rows))
    assert not packed[0][len(rows) :].any()


@PER_TEST
@given(call=calls(out_types=(None,)))
def test_unpack_returns_what_was_kept_and_zero_elsewhere(level, call):
    w, rows, cols, *_ = call
    none, ones = [None] * len(w), [1] * len(w)
    packed, _ = op("pack_tensors")(
        w, rows, cols, none, none, none, none, [1.0] * len(w), ones, ones, call[-2], None
    )
    sizes = [t.shape[0] for t in w], [t.shape[1] for t in w]
    full = op("unpack_tensors")(packed, rows, cols, none, none, *sizes, None)
    for back, original, r, c in zip(full, w, rows, cols, strict=True):
        kept = torch.zeros(original.shape, dtype=torch.bool)
        at_rows = torch.arange(kept.shape[0]) if r is None else r.long()
        at_cols = torch.arange(kept.shape[1]) if c is None else c.long()
        kept[at_rows[:, None], at_cols[None]] = True
        assert_same_bytes(back, torch.where(kept, original, 0))


@PER_TEST
@given(call=calls())
def test_unpack_writes_the_bytes_of_the_reference(level, call):
    w, rows, cols, z_out, z_in = call[:5]
    out = torch.float32 if call[-1] == E4M3 else call[-1]
    packed, scales = pack_tensors_ref(*call)
    # What is padded is left out as a view: its lines then have gaps.
    packed = [
        p[: p.shape[0] if r is None and p.shape[0] == t.shape[0] else len(r) if r is not None
          else t.shape[0], : t.shape[1] if c is None else len(c)]
        for p, t, r, c in zip(packed, w, rows, cols, strict=True)
    ]  # fmt: skip
    if w[0].dtype != torch.float64 and packed[0].dtype == torch.float64:
        z_out, z_in = [None] * len(w), [None] * len(w)
    if scales:
        z_out = [s[: p.shape[0]] for s, p in zip(scales, packed, strict=True)]
    sizes = [t.shape[0] for t in w], [t.shape[1] for t in w]
    arguments = (packed, rows, cols, z_out, z_in, *sizes, out)
    for got, want in zip(
        op("unpack_tensors")(*arguments), unpack_tensors_ref(*arguments), strict=True
    ):
        assert_same_bytes(got, want)


def poisoned(tensors):
    """Memory of the same layout, with NaN in it."""
    like = [torch.empty_like(t) for t in tensors]
    assert [t.stride() for t in like] == [t.stride() for t in tensors]
    return [t.fill_(float("nan")) for t in like]


@pytest.mark.parametrize("run", (pack_tensors_out_ref, None))
@settings(max_examples=40, deadline=None)
@given(call=calls())
def test_out_is_written_whole(run, call):
    packed, scales = pack_tensors_ref(*call)
    out, out_scales = poisoned(packed), poisoned(scales)
    assert (run or op("pack_tensors_out"))(*call, out, out_scales) is None
    for got, want in zip([*out, *out_scales], [*packed, *scales], strict=True):
        assert_same_bytes(got, want)


@pytest.mark.parametrize("run", (unpack_tensors_out_ref, None))
@settings(max_examples=40, deadline=None)
@given(call=calls(out_types=(None,)))
def test_out_of_unpack_is_written_whole(run, call):
    w, rows, cols, *_ = call
    none, ones = [None] * len(w), [1] * len(w)
    packed, _ = pack_tensors_ref(
        w, rows, cols, none, none, none, none, [1.0] * len(w), ones, ones, call[-2], None
    )
    sizes = [t.shape[0] for t in w], [t.shape[1] for t in w]
    arguments = (packed, rows, cols, none, none, *sizes, None)
    full = unpack_tensors_ref(*arguments)
    out = poisoned(full)
    assert (run or op("unpack_tensors_out"))(*arguments, out) is None
    for got, want in zip(out, full, strict=True):
        assert_same_bytes(got, want)


def test_out_keeps_its_memory():
    pieces = [
        Piece(matrix(5, 40, torch.bfloat16), cols=torch.arange(0, 40, 3)),
        Piece(matrix(6, 7, torch.float32), rows=torch.tensor([1, 4])),
    ]
    for dtype in (None, E4M3):
        packed, scales = pack_tensors(pieces, dtype)
        kept = [t.clone() for t in (*packed, *scales)]
        for t in (*packed, *scales):
            t.zero_()
        again, again_scales = pack_tensors(pieces, dtype, out=(packed, scales))
        assert [*map(id, (*again, *again_scales))] == [*map(id, (*packed, *scales))]
        for got, want in zip([*again, *again_scales], kept, strict=True):
            assert_same_bytes(got, want)
    packed, _ = pack_tensors(pieces)
    compact = [Piece(t, p.rows, p.cols) for t, p in zip(packed, pieces, strict=True)]
    full = unpack_tensors(compact, [(5, 40), (6, 7)])
    kept = [t.clone() for t in full]
    again = unpack_tensors(compact, [(5, 40), (6, 7)], out=[t.fill_(1) for t in full])
    assert [*map(id, again)] == [*map(id, full)]
    for got, want in zip(again, kept, strict=True):
        assert_same_bytes(got, want)


W, BOTH = torch.ones(4, 6), torch.empty(4, 12)


@pytest.mark.parametrize("run", (pack_tensors_out_ref, None))
@pytest.mark.parametrize(
    "dtype, out, scales, message",
    (
        (None, [W.clone()], [], r"out must have one entry per matrix \(2\), got 1"),
        (None, [W.clone(), torch.ones(4, 5)], [], r"out\[1\] must be 4 x 6, got 4 x 5"),
        (None, [W.clone(), W.half()], [], r"out\[1\] must be .*float32, got .*float16"),
        (None, [W.clone(), torch.ones(6, 4).t()], [], r"out\[1\] must have strides"),
        (None, [W, W.clone()], [], "out must share no memory with the matrices or with itself"),
        (None, [BOTH[:, :6], BOTH[:, 3:9]], [], "out must share no memory"),
        (None, [W.clone(), W.clone()], [torch.ones(4)], "scales must have one entry"),
        (E4M3, [W.to(E4M3), W.to(E4M3)], [torch.ones(4), torch.ones(3)], r"scales\[1\] must be"),
    ),
)
def test_refuses_an_out_before_anything_is_written(run, dtype, out, scales, message):
    none, ones = [None] * 2, [1] * 2
    w = [W, W + 1]
    kept = [t.clone() for t in (*out, *scales)]
    with pytest.raises(ValueError, match="pack_tensors: " + message), _ext.refusals():
        (run or op("pack_tensors_out"))(
            w, *[none] * 6, [1.0] * 2, ones, ones, [0, 0], dtype, out, scales
        )
    for got, want in zip((*out, *scales), kept, strict=True):
        assert torch.equal(got.float(), want.float())


def test_one_matrix_is_fold_pack():
    w, rows, cols = matrix(9, 40, torch.bfloat16), torch.tensor([1, 4, 8]), torch.arange(0, 40, 3)
    z_out, z_in = gate(3, 0), gate(14, 1)
    one = [[rows], [cols], [z_out], [z_in]]
    packed, _ = op("pack_tensors")([w], *one, [None], [None], [1.0], [1], [1], [0], torch.float32)
    assert_same_bytes(packed[0], fold_pack(w, rows, cols, z_out, z_in, torch.float32))
    full = op("unpack_tensors")(packed, *one, [9], [40], torch.bfloat16)
    expected = fold_pack_adjoint(packed[0], rows, cols, z_out, z_in, 9, 40, torch.bfloat16)
    assert_same_bytes(full[0], expected)


@pytest.mark.parametrize("order", (0, 1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, E4M3))
def test_threads_share_many_matrices(order, dtype):
    """Pieces of several matrices on several threads: the bytes do not depend on how many."""
    w = [matrix(m, n, torch.bfloat16, i % 2 == 1, i) for i, (m, n) in enumerate(
        ((700, 900), (3, 5), (1025, 513), (64, 4097))
    )]  # fmt: skip
    cols = [torch.arange(0, t.shape[1], 2) for t in w]
    a = [matrix(3, t.shape[1], torch.float32) for t in w]
    b = [matrix(t.shape[0], 3, torch.float32) for t in w]
    none, four = [None] * 4, [16] * 4
    call = (w, none, cols, none, none, a, b, [0.5] * 4, four, four, [order] * 4, dtype)
    expected = pack_tensors_ref(*call)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for got, want in zip(op("pack_tensors")(*call), expected, strict=True):
                for one, other in zip(got, want, strict=True):
                    assert_same_bytes(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_e4m3_row_with_a_value_that_is_not_finite(value):
    w = torch.ones(3, 40)
    w[1, 7] = value
    none, one = [None], [1]
    call = ([w], none, none, none, none, none, none, [1.0], one, one, [0], E4M3)
    (q,), (scale,) = op("pack_tensors")(*call)
    assert q[0].float().eq(448).all() and scale[0] == scale[2] == torch.tensor(1.0) / 448
    assert q[1, 7].isnan() and not scale[1].isfinite()
    (want,), (want_scale,) = pack_tensors_ref(*call)
    assert torch.equal(want.float().isnan(), q.float().isnan())
    assert torch.equal(want_scale.isnan(), scale.isnan())


@pytest.mark.parametrize("run", (pack_tensors_ref, None))
@pytest.mark.parametrize(
    "change, message",
    (
        ({"rows": torch.tensor([1, 1])}, r"rows\[1\] must be strictly increasing"),
        ({"cols": torch.tensor([0, 6])}, r"cols\[1\] must be in \[0, 6\), got 6"),
        ({"z_out": torch.ones(3)}, r"z_out\[1\] must have one value per kept unit \(4\), got 3"),
        ({"w": torch.ones(4)}, r"w\[1\] must have 2 dimensions, got 1"),
        ({"w": torch.ones(4, 6, dtype=torch.int32)}, r"w\[1\] must be float32"),
        ({"a": torch.ones(2, 5)}, r"lora_a\[1\] must be 2 x 6, got 2 x 5"),
        ({"b": torch.ones(4, 3)}, r"lora_b\[1\] must be 4 x 2, got 4 x 3"),
        ({"b": None}, r"lora_a\[1\] and lora_b must come together"),
        (
            {"row_multiple": 0},
            r"row_multiple\[1\] and col_multiple must be at least 1, got 0 and 1",
        ),
        ({"order": 3}, r"order\[1\] must be 0, 1 or 2, got 3"),
    ),
)
def test_refusals_name_the_argument_and_its_place(run, change, message):
    one = dict.fromkeys(("rows", "cols", "z_out", "z_in"))
    one = {"w": torch.ones(4, 6), **one, "a": torch.ones(2, 6), "b": torch.ones(4, 2), "s": 1.0}
    one |= {"row_multiple": 1, "col_multiple": 1, "order": 0}
    lists = [[x, y] for x, y in zip(one.values(), {**one, **change}.values(), strict=True)]
    with pytest.raises(ValueError, match="pack_tensors: " + message), _ext.refusals():
        (run or op("pack_tensors"))(*lists, None)


def test_refuses_lists_of_other_lengths():
    lists = [[None]] * 6
    with pytest.raises(ValueError, match=r"per matrix \(2\), got 1"), _ext.refusals():
        op("pack_tensors")([torch.ones(2, 2)] * 2, *lists, [1.0], [1], [1], [0], None)


def test_schemas_are_the_ones_of_the_extension():
    for schema in _ext.schemas():
        name = schema.split("(")[0]
        assert str(op(name)._schema) == f"gatepack::{schema}"
    assert [schema.split("(")[0] for schema in _ext.schemas()] == list(_ext.OPS)


def on_cuda(value):
    if isinstance(value, list):
        return [on_cuda(item) for item in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.gpu
@settings(max_examples=150, deadline=None)
@given(call=calls())
def test_cuda_writes_the_bytes_of_the_reference(call):
    put = [on_cuda(value) for value in call]
    packed, scales = op("pack_tensors")(*put)
    expected, expected_scales = pack_tensors_ref(*call)
    for got, want in zip([*packed, *scales], [*expected, *expected_scales], strict=True):
        assert_same_bytes(got.cpu(), want)
    out, out_scales = poisoned(packed), poisoned(scales)
    op("pack_tensors_out")(*put, out, out_scales)
    for got, want in zip([*out, *out_scales], [*expected, *expected_scales], strict=True):
        assert_same_bytes(got.cpu(), want)
