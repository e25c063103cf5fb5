import pytest
import torch
import torch.nn.functional as F
from ops import DTYPES, captured, ids, no_host_sync

from gatepack.kernels import ChannelStats, Panel, channel_stats_fn, channel_stats_ref
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty

SMALL = Panel(rows=4, columns=16, span=8, num_warps=1)


def make_input(dtype, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_stats(got, x, token_mask=None, shift=None, **terms):
    """Every statistic against fp64 and torch's own error; terms as in assert_close_to_fp64."""
    truth = channel_stats_ref(x.double(), token_mask, shift)
    theirs = channel_stats_ref(x, token_mask, shift)
    assert got.count.item() == truth.count.item() and got.count.dtype == torch.int64
    assert torch.equal(got.max_abs, theirs.max_abs)
    if x.numel():
        terms["sum"] = truth.abs_sum.max().item()
        terms["mean"] = terms["sum"] / max(1, truth.count.item())
    for name in ("sum", "mean", "abs_sum", "square_sum", "deviation"):
        ours, of_torch, true = (getattr(stats, name) for stats in (got, theirs, truth))
        assert_close_to_fp64(name, ours, of_torch, true, terms=terms.get(name, 0.0))


def check(x, device, token_mask=None, shift=None, config=SMALL):
    x, token_mask, shift = (None if t is None else t.to(device) for t in (x, token_mask, shift))
    with poisoned_empty():
        got = channel_stats_fn(x, token_mask, shift, config=config)
    check_stats(got, x, token_mask, shift)
    return got


@pytest.mark.parametrize("c", [1, 16, 37])
@pytest.mark.parametrize("t", [1, 8, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sizes(dtype, t, c, device):
    check(make_input(dtype, t, c), device)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_token_mask_and_shift(dtype, kept, device):
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < kept
    check(make_input(dtype, 3, 11, 20), device, mask, torch.linspace(-1, 1, 20))


def test_default_config(device):
    check(make_input(torch.bfloat16, 33, 96), device, config=None)


def test_more_splits_than_one_step_of_the_merge(device):
    config = Panel(rows=2, columns=16, span=2, num_warps=1)
    check(make_input(torch.float32, 150, 5), device, config=config)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_large_mean_does_not_cancel_the_variance(shifted, device):
    x = 1000 + make_input(torch.float32, 600, 8)
    got = check(x, device, shift=torch.full((8,), 1000.0) if shifted else None, config=None)
    variance = x.double().var(0, correction=0).float().to(device)
    torch.testing.assert_close(got.variance, variance, rtol=1e-5, atol=0)


def test_an_outlier_does_not_cancel_the_variance(device):
    """As the first token of a language model, whose activations are thousands of times larger."""
    x = make_input(torch.float32, 64, 8)
    x[0] = 5000.0
    mask = torch.ones(64, dtype=torch.bool)
    check(x, device, mask)
    mask[0] = False
    check(x, device, mask)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every_second", "expanded"])
def test_strides(layout, device):
    x = make_input(torch.bfloat16, 9, 20)
    x = {
        "transposed": x.t().contiguous().t(),
        "sliced": F.pad(x, (3, 5))[:, 3:-5],
        "every_second": x.repeat_interleave(2, dim=-1)[:, ::2],
        "expanded": x[:1].expand(9, 20),
    }[layout]
    mask = (torch.arange(18) % 3 != 0)[::2]
    check(x, device, mask, torch.linspace(-1, 1, 40)[::2])


def test_vector(device):
    got = check(make_input(torch.float32, 20), device)
    assert got.count == 1 and (got.variance == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3)], ids=ids)
def test_zero_sizes(shape, device):
    x = make_input(torch.float32, *shape)
    check(x, device)
    check(x, device, torch.ones(shape[:-1], dtype=torch.bool))


def test_nan_in_masked_tokens_changes_nothing(device):
    x, mask = make_input(torch.float32, 9, 20), torch.arange(9) % 2 == 0
    clean = check(x, device, mask)
    x[~mask] = float("nan")
    dirty = channel_stats_fn(x.to(device), mask.to(device), config=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_nan_stays_in_its_channel(device):
    x = make_input(torch.float32, 9, 20)
    x[2, 3] = float("nan")
    for statistic in channel_stats_fn(x.to(device))[1:]:
        assert statistic[3].isnan() and statistic.isnan().sum() == 1


@pytest.mark.parametrize("sizes", [(5, 28), (0, 33), (33, 0), (0, 0)], ids=ids)
def test_merge(sizes, device):
    x = (100 + make_input(torch.float32, sum(sizes), 8)).to(device)
    first, second = (channel_stats_fn(part, config=SMALL) for part in torch.split(x, sizes))
    merged = first.merge(second)
    assert isinstance(merged, ChannelStats)
    # A mean is rounded before the two are compared.
    gap = (first.mean - second.mean).abs() * min(sizes)
    check_stats(merged, x, deviation=(2 * gap * merged.mean.abs()).max().item())


def test_inputs_that_require_grad_are_constants(device):
    x = make_input(torch.float32, 9, 20).to(device).requires_grad_()
    shift = torch.zeros(20, device=device, requires_grad=True)
    assert not any(t.requires_grad for t in channel_stats_fn(x, shift=shift))


def test_deterministic(device):
    x = make_input(torch.bfloat16, 33, 20).to(device)
    first, second = (channel_stats_fn(x, config=SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(device):
    x, mask = make_input(torch.float32, 9, 20).to(device), torch.ones(9, device=device).bool()
    arguments = (x, mask, torch.zeros(20, device=device), [])
    torch.library.opcheck(torch.ops.gatepack.channel_stats.default, arguments)


def test_compiles_into_one_graph(device):
    x, mask = make_input(torch.float32, 9, 20).to(device), torch.ones(9, device=device).bool()
    compiled = torch.compile(channel_stats_fn, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x, mask), channel_stats_fn(x, mask), strict=True):
        assert torch.equal(ours, theirs)


REFUSED = [
    ({"x": torch.zeros(3, 4).double()}, "x: expected dtype float32, bfloat16 or float16, got"),
    ({"x": torch.zeros(())}, "x: expected at least one dimension, got a scalar"),
    ({"token_mask": torch.ones(3)}, r"token_mask: expected dtype torch.bool, got"),
    ({"token_mask": torch.ones(4).bool()}, r"token_mask: expected shape \(3,\), got \(4,"),
    ({"shift": torch.ones(3)}, r"shift: expected shape \(4,\), got"),
    ({"shift": torch.ones(4, device="meta")}, r"shift: expected device .* \(that of x\), got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = {"x": torch.zeros(3, 4)} | change
    for name, value in arguments.items():
        if value.device.type != "meta":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        channel_stats_fn(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_llama_3_8b(dtype, device):
    x = make_input(dtype, 1025, MODEL_SHAPES["llama-3-8b"].mlp)
    check(x, device, torch.arange(1025) % 10 != 0, config=None)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture(device):
    x = make_input(torch.bfloat16, 64, 96).to(device)
    mask = torch.ones(64, device=device).bool()
    expected = channel_stats_fn(x, mask)
    with no_host_sync():
        channel_stats_fn(x, mask)
    got = captured(lambda: channel_stats_fn(x, mask))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
