import math

import pytest
import torch
import torch.nn.functional as F
from ops import DTYPES, captured, ids, no_host_sync, to

from gatepack.kernels import (
    Panel,
    choose_config,
    linear_cross_entropy_fn,
    linear_cross_entropy_ref,
)
from gatepack.kernels.linear_cross_entropy import CHUNK_BYTES, _chunk_tokens
from gatepack.testing import assert_close_to_fp64, poisoned_empty

T, D, ROWS, OLD = 9, 24, 97, 130
IGNORED = -100
SMALL = Panel(1, 16, span=1, num_warps=1)


def make_inputs(dtype, t=T, d=D, rows=ROWS, old=OLD, seed=0):
    """CPU tensors: x, w, bias; labels on `old` tokens with one in eight ignored, and remap, which
    drops the tokens that have no row."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    remap = torch.full((old,), -1, dtype=torch.int32)
    kept = torch.randperm(old, generator=random)[:rows].sort().values
    remap[kept] = torch.arange(rows, dtype=torch.int32)
    labels = torch.randint(old, (t,), generator=random)
    labels[::8] = IGNORED
    inputs = {"x": normal(t, d), "w": normal(rows, d) * 2 / d**0.5, "bias": normal(rows)}
    return inputs, {"labels": labels, "remap": remap}


def run(fn, inputs, upstream=0.7, **settings):
    """{"loss": ..., "counted": ..., "dropped": ..., "dx": ..., ...} of fn."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    result = fn(**leaves, **settings)
    grads = torch.autograd.grad(result.loss * upstream, leaves.values())
    result = {name: t.detach() for name, t in result._asdict().items()}
    return result | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check(inputs, settings, device, **ours_only):
    """Loss, counts and every gradient, from poisoned memory, against fp64 and torch's own error."""
    inputs = to(inputs, device)
    settings = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    truth = run(linear_cross_entropy_ref, {k: t.double() for k, t in inputs.items()}, **settings)
    theirs = run(linear_cross_entropy_ref, inputs, **settings)
    with poisoned_empty():
        ours = run(linear_cross_entropy_fn, inputs, **settings, **ours_only)
    for name in ("counted", "dropped"):
        assert ours[name].dtype == torch.int64 and torch.equal(ours[name], truth[name])
    for name in ("loss", *(f"d{i}" for i in inputs)):
        factor, dtype = 2 if name == "loss" else 3, inputs["x"].dtype
        assert_close_to_fp64(name, ours[name], theirs[name], truth[name], factor, dtype)
    return ours


@pytest.mark.parametrize("t", [1, 9, 33])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_tokens(dtype, reduction, t, device):
    inputs, settings = make_inputs(dtype, t=t, seed=t)
    settings["labels"][-1] = OLD // 2
    settings["remap"][OLD // 2] = 3
    check(inputs, settings | {"reduction": reduction}, device)


@pytest.mark.parametrize(
    ("rows", "config"), [(1, None), (16, SMALL), (97, SMALL), (128, None), (1030, None)]
)
def test_vocabularies(rows, config, device):
    inputs, settings = make_inputs(torch.float32, rows=rows, old=rows)
    check(inputs, settings, device, config=config)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_chunks(dtype, chunk, device):
    check(*make_inputs(dtype), device, chunk=chunk)


@pytest.mark.parametrize("index", [torch.int32, torch.int64, None], ids=ids)
@pytest.mark.parametrize("bias", [True, False])
def test_optional_arguments(bias, index, device):
    inputs, settings = make_inputs(torch.float32)
    if not bias:
        del inputs["bias"]
    if index is None:
        settings = {"labels": settings["labels"].clamp(max=ROWS - 1)}
    else:
        settings["remap"] = settings["remap"].to(index)
    check(inputs, settings, device)


def test_without_remap_is_cross_entropy_of_linear(device):
    inputs, settings = make_inputs(torch.float32)
    x, w, bias = to(inputs, device).values()
    labels = settings["labels"].to(device).clamp(max=ROWS - 1)
    loss, counted, dropped = linear_cross_entropy_fn(x, w, labels, bias=bias)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w, bias), labels))
    assert counted == (labels != IGNORED).sum() and dropped == 0


def test_dropped_and_ignored_labels(device):
    inputs, _ = make_inputs(torch.float32, rows=3)
    remap = torch.tensor([2, -1, 0, -1, 1])
    labels = torch.tensor([0, 1, 2, 3, 4, 7, 7, 1, 0])
    ours = check(inputs, {"labels": labels, "remap": remap, "ignore_index": 7}, device)
    assert ours["counted"] == 4 and ours["dropped"] == 3
    assert (ours["dx"][[1, 3, 5, 6, 7]] == 0).all() and ours["dx"][[0, 2, 4, 8]].any(1).all()


def test_ignore_index_within_the_vocabulary(device):
    inputs, settings = make_inputs(torch.float32)
    settings["labels"][:] = torch.arange(T) % 3
    check(inputs, settings | {"ignore_index": 1}, device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("why", ["ignored", "dropped"])
def test_no_label_counted(why, reduction, device):
    inputs, settings = make_inputs(torch.float32)
    if why == "ignored":
        settings["labels"].fill_(IGNORED)
    else:
        settings["remap"].fill_(-1)
    settings = to(settings, device)
    ours = run(linear_cross_entropy_fn, to(inputs, device), reduction=reduction, **settings)
    assert ours["counted"] == 0
    assert ours["loss"].isnan() if reduction == "mean" else ours["loss"] == 0
    assert all((ours[name] == 0).all() for name in ("dx", "dw", "dbias"))


@pytest.mark.parametrize("chunk", [4, None])
def test_padding_rows_are_not_read(chunk, device):
    inputs, settings = make_inputs(torch.float32)
    expected = run(linear_cross_entropy_fn, to(inputs, device), **to(settings, device), chunk=chunk)
    for name in ("w", "bias"):
        rows = (*inputs[name].shape[1:],)
        inputs[name] = torch.cat([inputs[name], torch.full((7, *rows), float("nan"))])
    settings = to(settings, device) | {"vocab_size": ROWS, "chunk": chunk}
    with poisoned_empty():
        got = run(linear_cross_entropy_fn, to(inputs, device), **settings)
    for name, tensor in expected.items():
        if name in ("dw", "dbias"):
            assert (got[name][ROWS:] == 0).all()
            got[name] = got[name][:ROWS]
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("with_remap", [True, False])
@pytest.mark.parametrize("label", [-1, ROWS + 3])
def test_a_label_outside_the_vocabulary_shows(label, with_remap, device):
    inputs, _ = make_inputs(torch.float32)
    settings = {"labels": torch.zeros(T, dtype=torch.int64)}
    settings["labels"][2] = label
    if with_remap:
        settings["remap"] = torch.arange(ROWS + 2)  # its last two rows are not in w either
    ours = run(linear_cross_entropy_fn, to(inputs, device), **to(settings, device))
    assert ours["loss"].isnan() and ours["counted"] == T and ours["dropped"] == 0
    assert ours["dx"][2].isnan().all() and ours["dx"][[0, 1, 3]].isfinite().all()
    if with_remap:
        settings["labels"][2] = ROWS
        ours = run(linear_cross_entropy_fn, to(inputs, device), **to(settings, device))
        assert ours["loss"].isnan()


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_large_logits(shift, device):
    inputs, settings = make_inputs(torch.float32)
    inputs["bias"] = inputs["bias"] + shift
    check(inputs, settings, device)


def test_logits_of_minus_infinity(device):
    inputs, settings = make_inputs(torch.float32)
    settings = to({"labels": settings["labels"].clamp(max=40)}, device)
    expected = linear_cross_entropy_fn(
        inputs["x"].to(device), inputs["w"][:50].to(device), **settings
    )
    bias = torch.zeros(ROWS)
    bias[50:] = -float("inf")
    inputs = {"x": inputs["x"], "w": inputs["w"], "bias": bias}
    ours = run(linear_cross_entropy_fn, to(inputs, device), config=SMALL, **settings)
    torch.testing.assert_close(ours["loss"], expected.loss)
    assert (ours["dw"][50:] == 0).all() and ours["dx"].isfinite().all()
    flipped = to({"x": inputs["x"], "w": inputs["w"].flip(0), "bias": bias.flip(0)}, device)
    labels = torch.where(settings["labels"] >= 0, ROWS - 1 - settings["labels"], IGNORED)
    ours = run(linear_cross_entropy_fn, flipped, config=SMALL, labels=labels)
    torch.testing.assert_close(ours["loss"], expected.loss)


@pytest.mark.parametrize("layout", ["channel_major", "sliced", "every_second"])
def test_strides(layout, device):
    inputs, settings = make_inputs(torch.float32)
    for name, tensor in (inputs | settings).items():
        owner = inputs if name in inputs else settings
        if layout == "every_second":
            owner[name] = tensor.repeat_interleave(2, dim=-1)[..., ::2]
        elif tensor.dim() == 2 and layout == "channel_major":
            owner[name] = tensor.t().contiguous().t()
        elif tensor.dim() == 2:
            owner[name] = F.pad(tensor, (3, 5))[:, 3:-5]
    check(inputs, settings, device)


@pytest.mark.parametrize("lead", [(), (2, 4)], ids=ids)
def test_leading_dimensions(lead, device):
    inputs, settings = make_inputs(torch.float32)
    inputs["x"] = torch.randn(*lead, D)
    settings["labels"] = torch.randint(ROWS, lead)
    settings["remap"][:] = torch.arange(OLD) % ROWS
    check(inputs, settings, device)


@pytest.mark.parametrize("sizes", [{"t": 0}, {"d": 0}, {"t": 0, "d": 0}], ids=ids)
def test_zero_sizes(sizes, device):
    inputs, settings = make_inputs(torch.float32, **sizes)
    with poisoned_empty():
        ours = run(linear_cross_entropy_fn, to(inputs, device), **to(settings, device))
    theirs = run(linear_cross_entropy_ref, to(inputs, device), **to(settings, device))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, equal_nan=True, msg=name)


def test_empty_vocabulary(device):
    inputs, settings = make_inputs(torch.float32, rows=0)
    ours = run(linear_cross_entropy_fn, to(inputs, device), **to(settings, device))
    assert ours["loss"].isnan() and ours["dropped"] == T - math.ceil(T / 8)
    assert (ours["dx"] == 0).all()


def test_deterministic(device):
    inputs, settings = make_inputs(torch.bfloat16, t=33)
    inputs, settings = to(inputs, device), to(settings, device)
    first, second = (run(linear_cross_entropy_fn, inputs, chunk=8, **settings) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_backward_twice_and_scaled(device):
    inputs, settings = make_inputs(torch.float32)
    x = inputs["x"].to(device).requires_grad_()
    w, settings = inputs["w"].to(device), to(settings, device)
    loss = linear_cross_entropy_fn(x, w, **settings).loss
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    (both,) = torch.autograd.grad(loss + 2 * loss, x)
    torch.testing.assert_close(again, 3 * once)
    torch.testing.assert_close(both, 3 * once)


def test_small_gradients_survive_fp16(device):
    """The mean over many tokens is applied after an upstream gradient such as a loss scale."""
    inputs, settings = make_inputs(torch.float16)
    upstream = 2.0**-14
    inputs = to(inputs, device)
    ours = run(linear_cross_entropy_fn, inputs, upstream, **to(settings, device))
    scaled = run(linear_cross_entropy_fn, inputs, 1.0, **to(settings, device))
    for name in ("dx", "dw"):
        expected = scaled[name].float() * upstream
        torch.testing.assert_close(ours[name].float(), expected, rtol=1e-3, atol=2.0**-24)


@pytest.mark.parametrize("name", ["x", "w", "bias"])
def test_one_gradient_at_a_time(name, device, monkeypatch):
    inputs, settings = make_inputs(torch.bfloat16)
    inputs, settings = to(inputs, device), to(settings, device)
    everything = run(linear_cross_entropy_fn, inputs, 1.0, **settings)
    inputs[name].requires_grad_()
    result = linear_cross_entropy_fn(**inputs, **settings)
    assert torch.equal(result.loss.detach(), everything["loss"])
    (alone,) = torch.autograd.grad(result.loss, [inputs[name]])
    assert torch.equal(alone, everything[f"d{name}"])


@pytest.mark.parametrize("wanted", [(), ("x",)], ids=["none", "x"])
def test_only_wanted_gradients_are_made(wanted, device):
    inputs, settings = make_inputs(torch.float32)
    inputs = {k: v.to(device).requires_grad_(k in wanted) for k, v in inputs.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = linear_cross_entropy_fn(**inputs, **to(settings, device)).loss
    assert loss.requires_grad == bool(wanted)
    assert sorted(t.numel() for t in kept) == ([1, T * D] if wanted else [])


def test_no_grad_gives_the_same_loss(device):
    inputs, settings = make_inputs(torch.float32)
    inputs, settings = to(inputs, device), to(settings, device)
    expected = run(linear_cross_entropy_fn, inputs, **settings)
    with torch.no_grad():
        leaves = {name: t.requires_grad_() for name, t in inputs.items()}
        got = linear_cross_entropy_fn(**leaves, **settings)
    assert torch.equal(got.loss, expected["loss"]) and not got.loss.requires_grad


def test_autocast_changes_nothing(device):
    inputs, settings = make_inputs(torch.float32)
    inputs, settings = to(inputs, device), to(settings, device)
    expected = run(linear_cross_entropy_fn, inputs, chunk=4, **settings)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(linear_cross_entropy_fn, inputs, chunk=4, **settings)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.parametrize("need_w", [True, False])
@pytest.mark.parametrize("t", [1, 1000, 8192, 100_000])
@pytest.mark.parametrize("vocabulary", [97, 32000, 128256])
def test_chunks_fit_their_memory_and_are_of_equal_size(vocabulary, t, need_w):
    chunk = _chunk_tokens(t, vocabulary, 2, need_w, None)
    chunks = -(-t // chunk)
    assert chunk * vocabulary * 2 <= CHUNK_BYTES * (2 if need_w else 1)
    assert chunk * chunks - t < 128 * chunks
    assert _chunk_tokens(t, vocabulary, 2, need_w, 50) == min(50, t)


def operator_arguments(device, dtype=torch.float32):
    inputs, settings = make_inputs(dtype)
    x, w, bias = (t.requires_grad_() for t in to(inputs, device).values())
    labels, remap = to(settings, device).values()
    return x, w, labels, bias, remap, IGNORED, True, None, 4, [True] * 3, []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
def test_opcheck_forward(dtype, device):
    operator = torch.ops.gatepack.linear_cross_entropy.default
    torch.library.opcheck(operator, operator_arguments(device, dtype))


def test_opcheck_backward(device):
    arguments = operator_arguments(device)
    _, counted, _, dx, dw, db = torch.ops.gatepack.linear_cross_entropy(*arguments)
    dloss = torch.ones((), device=device)
    operator = torch.ops.gatepack.linear_cross_entropy_backward.default
    torch.library.opcheck(operator, (dloss, counted, dx, dw, db, True, torch.float32))


def test_the_op_refuses_a_gradient_it_was_not_asked_to_make(device):
    arguments = list(operator_arguments(device))
    arguments[9] = [True, False, True]
    with pytest.raises(RuntimeError, match="linear_cross_entropy: expected needs"):
        torch.ops.gatepack.linear_cross_entropy(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_compiles_into_one_graph(dtype, device):
    inputs, settings = make_inputs(dtype)
    inputs, settings = to(inputs, device), to(settings, device)
    compiled = torch.compile(linear_cross_entropy_fn, fullgraph=True, backend="aot_eager")
    expected = run(linear_cross_entropy_fn, inputs, chunk=4, **settings)
    got = run(compiled, inputs, chunk=4, **settings)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_second_derivative_is_refused(device):
    inputs, settings = make_inputs(torch.float32)
    x = inputs["x"].to(device).requires_grad_()
    loss = linear_cross_entropy_fn(x, inputs["w"].to(device), **to(settings, device)).loss
    upstream = torch.ones_like(loss).requires_grad_()
    (dx,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        dx.sum().backward()


REFUSED = [
    ({"x": torch.zeros(T, D, dtype=torch.float64)}, "x: expected dtype float32, bfloat16 or"),
    ({"x": torch.zeros(())}, "x: expected at least one dimension, got a scalar"),
    ({"x": torch.zeros(T, D + 1)}, rf"x: expected shape \({T}, {D}\), got \({T}, {D + 1}\)"),
    ({"w": torch.zeros(D)}, rf"w: expected two dimensions, got shape \({D},\)"),
    ({"w": torch.zeros(ROWS, D).half()}, "w: expected dtype torch.float32, got torch.float16"),
    ({"bias": torch.zeros(1)}, rf"bias: expected shape \({ROWS},\), got \(1,\)"),
    ({"labels": torch.zeros(T)}, "labels: expected dtype torch.int64, got torch.float32"),
    ({"labels": torch.zeros(T - 1).long()}, rf"labels: expected shape \({T},\), got \({T - 1},\)"),
    ({"remap": torch.zeros(1, 2).int()}, r"remap: expected one dimension, got shape \(1, 2\)"),
    ({"remap": torch.zeros(OLD)}, "remap: expected dtype torch.int32 or torch.int64, got torch.f"),
    ({"reduction": "none"}, r"reduction: expected one of \('mean', 'sum'\), got 'none'"),
    ({"vocab_size": ROWS + 1}, rf"vocab_size: expected 0 to {ROWS} .* got {ROWS + 1}"),
    ({"chunk": 0}, "chunk: expected at least 1 token, got 0"),
    ({"w": torch.zeros(ROWS, D, device="meta")}, r"w: expected device .* \(that of x\), got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    inputs, settings = make_inputs(torch.float32)
    arguments = to(inputs, device) | to(settings, device)
    for name, value in change.items():
        is_local = isinstance(value, torch.Tensor) and value.device.type != "meta"
        arguments[name] = value.to(device) if is_local else value
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_fn(**arguments)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "cpu"])
@pytest.mark.parametrize("vocabulary", [0, 97, 128256])
def test_every_choice_is_a_valid_panel(vocabulary, arch):
    panel = choose_config("linear_cross_entropy", (8192, vocabulary, 4096), torch.bfloat16, arch)
    assert panel.rows == panel.span == 1 and panel.columns <= 8192


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("d", "rows", "old"), [(576, 32011, 49152), (1024, 50000, 128256)])
def test_model_shapes(d, rows, old, dtype, chunk, device):
    check(*make_inputs(dtype, 1025, d, rows, old), device, chunk=chunk)


@pytest.mark.gpu
def test_a_step_is_captured_and_never_waits_for_the_host(device):
    inputs, settings = make_inputs(torch.bfloat16, t=256, d=64, rows=1000, old=1500)
    inputs, settings = to(inputs, device), to(settings, device)

    def step():
        return run(linear_cross_entropy_fn, inputs, chunk=100, **settings)

    expected = step()
    with no_host_sync():
        step()
    for name, tensor in captured(step).items():
        assert torch.equal(tensor, expected[name]), name
