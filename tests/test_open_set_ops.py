"""open_sets and remap_ids of csrc: every backend against plain torch, refusals, registrations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import no_host_sync

from gatepack import _ext
from gatepack._reference import open_sets_ref, remap_ids_ref


def op(name):
    _ext.backend()
    return getattr(torch.ops.gatepack, name).default


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=300), min_size=1, max_size=40))
def test_open_units_then_closed_ones_then_the_count(masks):
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
    for mask, got, ref in zip(masks, op("open_sets")(masks), open_sets_ref(masks), strict=True):
        assert got.dtype == ref.dtype == torch.int32 and torch.equal(got, ref)
        n, count = mask.numel(), int(got[-1])
        assert count == int(mask.sum())
        assert got[:count].tolist() == mask.nonzero()[:, 0].tolist()
        assert got[count:n].tolist() == (~mask).nonzero()[:, 0].tolist()


def test_open_sets_refuse_what_is_not_a_mask():
    for run in (op("open_sets"), open_sets_ref):
        with pytest.raises(ValueError, match=r"masks\[1\] must be bool"), _ext.refusals():
            run([torch.ones(2, dtype=torch.bool), torch.ones(2)])
        with (
            pytest.raises(ValueError, match=r"masks\[0\] must have 1 dimension, got 2"),
            _ext.refusals(),
        ):
            run([torch.ones(2, 2, dtype=torch.bool)])


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
@pytest.mark.parametrize("shape", ((0,), (7,), (3, 50_000)))
def test_remapped_ids_keep_shape_and_dtype(shape, dtype):
    table = torch.randperm(1000).int()
    ids = torch.randint(0, 1000, shape).to(dtype)
    got = op("remap_ids")(ids, table)
    assert got.dtype == dtype and torch.equal(got, table[ids.long()].to(dtype))
    assert torch.equal(remap_ids_ref(ids, table), got)


@pytest.mark.parametrize("run", (remap_ids_ref, None))
def test_dropped_and_unknown_ids_are_refused(run):
    run = run or op("remap_ids")
    table = torch.tensor([0, -1, 1], dtype=torch.int32)
    ids = torch.zeros(100_000, dtype=torch.int64)
    ids[70_000], ids[99_999] = 1, 5
    with (
        pytest.raises(ValueError, match="got 1 at position 70000, which table drops"),
        _ext.refusals(),
    ):
        run(ids, table)
    for bad in (3, -1):
        with (
            pytest.raises(ValueError, match=rf"ids must be in \[0, 3\), got {bad} at position 1"),
            _ext.refusals(),
        ):
            run(torch.tensor([0, bad]), table)
    with pytest.raises(ValueError, match="ids must be int64 or int32"), _ext.refusals():
        run(torch.ones(2), table)
    with pytest.raises(ValueError, match="table must be int32"), _ext.refusals():
        run(ids, table.long())


@pytest.mark.gpu
def test_cuda_equals_the_reference_without_waiting_for_the_host():
    masks = [torch.rand(n) < p for n, p in ((0, 0.5), (1, 1), (300, 0.4), (20_000, 0.9), (5, 0))]
    table, ids = torch.randperm(50).int(), torch.randint(0, 50, (3, 400))
    on_gpu, table_there, ids_there = [m.cuda() for m in masks], table.cuda(), ids.cuda()
    with no_host_sync():
        sets = op("open_sets")(on_gpu)
        names = op("remap_ids")(ids_there, table_there)
    for got, want in zip(sets, open_sets_ref(masks), strict=True):
        assert torch.equal(got.cpu(), want)
    assert torch.equal(names.cpu(), remap_ids_ref(ids, table))
