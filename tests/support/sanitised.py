"""Runs every op of a library built with sanitizers against plain torch: python sanitised.py LIBRARY

The library holds the CPU kernels and, as gatepack_on_cpu, the CUDA kernels over cuda_on_cpu.
Prints how many calls were compared; a sanitizer that finds something ends the process.
"""

import random
import sys

import torch

from gatepack import _ext
from gatepack._reference import E4M3, open_sets_ref, pack_tensors_ref, remap_ids_ref
from gatepack._reference import unpack_tensors_ref as unpack_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("gatepack", "gatepack_on_cpu")


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
    choose, compared = random.Random(0), 0
    for level in ("scalar", "avx2", "avx512", "emulated"):
        name = NAMES[level == "emulated"]
        if name == NAMES[0]:
            try:
                torch.ops.gatepack.set_simd_level(level)
            except ValueError:
                continue
        ops = getattr(torch.ops, name)
        for _ in range(40):
            compare_packing(ops, some_call(choose))
            compared += 1
        # Rows beyond the last cache, which leave the CPU's kernels another way.
        w, rows = torch.rand(4203, 2111)[:, 1:], torch.arange(0, 4202)
        assert_same([ops.fold_pack(w, rows, None, None, None, None)], [w[rows]], "fold_pack")
        rows = torch.arange(2, 1200)[torch.rand(1198) < 0.8]
        assert_same([ops.pack_rows(w, rows)], [w[rows]], "pack_rows")
        masks = [torch.rand(n) < p for n, p in ((0, 0.5), (1, 1), (300, 0.4), (2000, 0.9), (5, 0))]
        assert_same(ops.open_sets(masks), open_sets_ref(masks), "open_sets")
        table = torch.randperm(50).int()
        ids = torch.randint(0, 50, (3, 400))
        assert_same([ops.remap_ids(ids, table)], [remap_ids_ref(ids, table)], "remap_ids")
        compared += 4
    cpu = torch.ops.gatepack
    refused(cpu.fold_pack, torch.ones(3, 4), torch.tensor([0, 3]), None, None, None, None)
    refused(cpu.pack_rows, torch.ones(3, 4), torch.tensor([0, 3]))
    refused(cpu.fold_pack, torch.ones(3, 4), None, torch.tensor([1, 0]), None, None, None)
    refused(cpu.remap_ids, torch.tensor([1, 7]), torch.tensor([0, 1], dtype=torch.int32))
    print(compared)


if __name__ == "__main__":
    main()
