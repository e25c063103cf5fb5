"""Runs every op of a library built with sanitizers against plain torch: python sanitised.py LIBRARY

The library holds the CPU kernels, which run on every instruction set of the machine, and, as
gatepack_on_cpu, the CUDA kernels over cuda_on_cpu. Prints how often each op was called, as JSON:
{instruction set or "emulated": {op: calls}}; a sanitizer that finds something ends the process.
"""

import collections
import json
import random
import sys

import torch

from gatepack import _env, _ext, _reference
from gatepack._reference import E4M3, open_sets_ref, pack_tensors_ref, remap_ids_ref
from gatepack._reference import unpack_tensors_ref as unpack_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Counted:
    """The ops of a namespace of torch.ops, and how often each was taken."""

    def __init__(self, namespace: str):
        self.namespace = getattr(torch.ops, namespace)
        self.calls: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str):
        self.calls[name] += 1
        return getattr(self.namespace, name)


def assert_same(actual, expected, what):
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype, what
        got, want = (t.contiguous().flatten().view(torch.uint8) for t in (got, want))
        same = got == want
        assert bool(same.all()), f"{what}: {int((~same).sum())} bytes of {same.numel()} differ"


def subset(choose: random.Random, size: int):
    kind = choose.choice(("all", "empty", "full", "some", "some"))
    if kind == "all":
        return None
    share = {"empty": 0.0, "full": 1.0}.get(kind, choose.random())
    kept = [i for i in range(size) if choose.random() < share]
    return torch.tensor(kept, dtype=choose.choice((torch.int64, torch.int32)))


def some_matrix(choose, m, n, dtype):
    """With gaps between its lines at times, row-major or column-major."""
    wide = torch.randn(m + 2, n + 3).to(dtype)[1 : m + 1, 2 : n + 2]
    wide = wide if choose.random() < 0.5 else wide.contiguous()
    return wide if choose.random() < 0.5 else wide.t().contiguous().t()


def some_call(choose: random.Random):
    """Arguments of pack_tensors: one to four matrices, and the dtype of the result."""
    dtype = choose.choice(DTYPES)
    pieces = []
    for _ in range(choose.randint(1, 4)):
        m, n = choose.choice(((0, 3), (1, 1), (7, 70), (33, 129), (70, 16), (12, 300)))
        rows, cols = subset(choose, m), subset(choose, n)
        kept = [size if index is None else len(index) for index, size in ((rows, m), (cols, n))]
        gates = [torch.rand(k) if choose.random() < 0.5 else None for k in kept]
        a = b = None
        if choose.random() < 0.4:
            rank = choose.randint(0, 3)
            a = some_matrix(choose, rank, n, torch.float32)
            b = some_matrix(choose, m, rank, torch.bfloat16)
        multiples = [choose.choice((1, 1, 8, 64)) for _ in range(2)]
        w = some_matrix(choose, m, n, dtype)
        pieces.append((w, rows, cols, *gates, a, b, 0.75, *multiples, choose.randint(0, 2)))
    return (*map(list, zip(*pieces, strict=True)), choose.choice((None, *DTYPES, E4M3)))


def compare_packing(ops, call) -> None:
    w, rows, cols, z_out, z_in = call[:5]
    packed, scales = ops.pack_tensors(*call)
    expected, expected_scales = pack_tensors_ref(*call)
    assert_same([*packed, *scales], [*expected, *expected_scales], "pack_tensors")
    out, out_scales = ([torch.empty_like(t) for t in ts] for ts in (packed, scales))
    ops.pack_tensors_out(*call, out, out_scales)
    assert_same([*out, *out_scales], [*expected, *expected_scales], "pack_tensors_out")
    sizes = [t.shape[0] for t in w], [t.shape[1] for t in w]
    kept = [
        [size if index is None else len(index) for size, index in zip(full, index, strict=True)]
        for full, index in zip(sizes, (rows, cols), strict=True)
    ]
    compact = [p[:m, :n] for p, m, n in zip(packed, *kept, strict=True)]
    back = (compact, rows, cols, z_out, z_in, *sizes, torch.float32)
    full = ops.unpack_tensors(*back)
    assert_same(full, unpack_ref(*back), "unpack_tensors")
    out = [torch.empty_like(t) for t in full]
    ops.unpack_tensors_out(*back, out)
    assert_same(out, full, "unpack_tensors_out")


def compare_one(ops, w, rows, cols, z_out, z_in, dtype, stream) -> None:
    """fold_pack of one matrix, and back."""
    part = (rows, cols, z_out, z_in)
    packed = _reference.fold_pack_ref(w, *part, dtype)
    assert_same([ops.fold_pack(w, *part, dtype, stream)], [packed], "fold_pack")
    back = (packed, *part, *w.shape, w.dtype)
    full = _reference.fold_pack_adjoint_ref(*back)
    assert_same([ops.fold_pack_adjoint(*back)], [full], "fold_pack_adjoint")


def compare_folding(ops, choose: random.Random) -> None:
    for _ in range(40):
        call = some_call(choose)
        compare_packing(ops, call)
        w, rows, cols, z_out, z_in = (values[0] for values in call[:5])
        dtype = choose.choice((None, *(DTYPES if w.dtype != torch.float64 else DTYPES[3:])))
        compare_one(ops, w, rows, cols, z_out, z_in, dtype, choose.random() < 0.5)
    # Rows beyond the last cache, which leave the CPU's kernels another way.
    w, rows = torch.rand(4203, 2111)[:, 1:], torch.arange(0, 4202)
    assert_same([ops.fold_pack(w, rows, None, None, None, None)], [w[rows]], "fold_pack")
    rows = torch.arange(2, 1200)[torch.rand(1198) < 0.8]
    assert_same([ops.pack_rows(w, rows)], [w[rows]], "pack_rows")
    # Large enough to be written past the caches.
    for dtype in DTYPES:
        w, rows = some_matrix(choose, 517, 301, dtype), torch.arange(1, 516)
        compare_one(ops, w, rows, None, torch.rand(515), None, None, True)


def compare_sets(ops) -> None:
    masks = [torch.rand(n) < p for n, p in ((0, 0.5), (1, 1), (300, 0.4), (2000, 0.9), (5, 0))]
    assert_same(ops.open_sets(masks), open_sets_ref(masks), "open_sets")
    table = torch.randperm(50).int()
    ids = torch.randint(0, 50, (3, 400))
    assert_same([ops.remap_ids(ids, table)], [remap_ids_ref(ids, table)], "remap_ids")


def compare_close(ops, name: str, *arguments):
    """An op whose sums are added in an order of their own; returns what it gave."""
    got = getattr(ops, name)(*arguments)
    want = getattr(_reference, f"{name}_ref")(*arguments)
    pairs = [(got, want)] if isinstance(got, torch.Tensor) else zip(got, want, strict=True)
    loose = 0.05 if arguments[0].dtype == torch.bfloat16 else 1e-3
    for mine, theirs in pairs:
        largest = theirs.float().abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(
            mine, theirs, rtol=loose, atol=loose * (1 + largest),
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip
    return got


def some_gate(units: int) -> torch.Tensor:
    return torch.where(torch.rand(units) < 0.2, 0.0, torch.rand(units) + 0.5)


def some_side(choose: random.Random, units: int, lanes: int):
    """Indices of whole units or None for all, and their gates or None."""
    index, kept = subset(choose, units), units
    if index is not None:
        kept = len(index)
        lane = torch.arange(lanes, dtype=index.dtype)
        index = (index[:, None] * lanes + lane).flatten()
    return index, some_gate(kept) if choose.random() < 0.7 else None, kept * lanes


def compare_linear(ops, choose: random.Random) -> None:
    dtype = choose.choice((torch.float32, torch.bfloat16))
    tokens = choose.choice((0, 1, 2, 3, 5, 13, 48))
    out_units, in_units = choose.choice(((0, 8), (8, 0), (1, 1), (3, 15), (33, 25), (10, 144)))
    out_lanes, in_lanes = choose.choice((1, 4)), choose.choice((1, 4))
    rows, z_out, n = some_side(choose, out_units, out_lanes)
    cols, z_in, k = some_side(choose, in_units, in_lanes)
    wide = torch.randn(out_units * out_lanes, in_units * in_lanes + 3).to(dtype)
    w = wide[:, 3:] if choose.random() < 0.5 else wide[:, 3:].contiguous()
    bias = torch.randn(len(w)).to(dtype) if choose.random() < 0.5 else None
    x, dy = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype)
    part = (rows, cols, z_out, z_in, out_lanes, in_lanes)
    y = compare_close(ops, "open_linear", x, w, bias, *part)
    saved = None if z_in is None else x, None if z_out is None else y
    compare_close(ops, "open_linear_backward", dy, *saved, w, *part)


def compare_passes(ops, choose: random.Random) -> None:
    tokens = choose.choice((0, 1, 3, 65, 300))
    units, lanes = choose.choice(((0, 5), (1, 1), (9, 7), (37, 1), (5, 64)))
    n = units * lanes
    a, u, dh = (torch.randn(tokens, n) for _ in range(3))
    z = some_gate(n) if choose.random() < 0.5 else None
    compare_close(ops, "swiglu", a, u, z)
    compare_close(ops, "swiglu_backward", dh, a, u, z)
    dtype = choose.choice((torch.float32, torch.bfloat16))
    x, dy, z = a.to(dtype), dh.to(dtype), some_gate(units)
    compare_close(ops, "gate_lanes", x, z, lanes)
    compare_close(ops, "gate_lanes_backward", dy, x, z, lanes)
    compare_close(ops, "column_products", x, dy)


def refused(function, *arguments) -> None:
    try:
        with _ext.refusals():
            function(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{function} accepted {arguments}")


def main() -> None:
    torch.manual_seed(0)
    on_cpu = torch.library.Library("gatepack_on_cpu", "DEF")
    for schema in _ext.schemas():
        on_cpu.define(schema)
    torch.ops.load_library(sys.argv[1])
    cpu, choose, calls = torch.ops.gatepack, random.Random(0), {}
    best = _ext.build_info()["simd"]
    for level in _env.SIMD_LEVELS[_env.SIMD_LEVELS.index(best) :]:
        cpu.set_simd_level(level)
        ops = Counted("gatepack")
        compare_folding(ops, choose)
        compare_sets(ops)
        for _ in range(40):
            compare_linear(ops, choose)
            compare_passes(ops, choose)
        calls[level] = ops.calls
    emulated = Counted("gatepack_on_cpu")
    compare_folding(emulated, choose)
    compare_sets(emulated)
    calls["emulated"] = emulated.calls
    refused(cpu.fold_pack, torch.ones(3, 4), torch.tensor([0, 3]), None, None, None, None)
    refused(cpu.pack_rows, torch.ones(3, 4), torch.tensor([0, 3]))
    refused(cpu.fold_pack, torch.ones(3, 4), None, torch.tensor([1, 0]), None, None, None)
    refused(cpu.remap_ids, torch.tensor([1, 7]), torch.tensor([0, 1], dtype=torch.int32))
    print(json.dumps(calls))


if __name__ == "__main__":
    main()
