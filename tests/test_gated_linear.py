import collections
import itertools

import pytest
import torch
import torch.nn.functional as F
from linears import RANK, SMALL_TILES, K, N, T, check, make_inputs
from ops import DTYPES, GATES, captured, ids, no_host_sync, run, to

from gatepack.kernels import (
    gated_linear_fn,
    gated_linear_ref,
    open_set_fn,
)
from gatepack.kernels.column_sums import ROWS, column_sums
from gatepack.kernels.open_sets import Axis
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_gates(dtype, gates, device):
    check(make_inputs(dtype, z_in=gates, z_out=gates), device)


@pytest.mark.parametrize("t", [1, 16, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_tokens(dtype, t, device):
    check(make_inputs(dtype, t=t), device)


@pytest.mark.parametrize(("z_in", "z_out"), [("closed", "mixed"), ("one", "closed")])
def test_sides_closed_apart(z_in, z_out, device):
    check(make_inputs(torch.float32, z_in=z_in, z_out=z_out), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize(
    ("group_in", "group_out"), [(64, 1), (1, 64), (64, 64), (4, 10), (16, 20), (80, 16)]
)
def test_groups(group_in, group_out, dtype, device):
    settings = {"group_in": group_in, "group_out": group_out}
    inputs = make_inputs(dtype, n=3 * group_out, k=2 * group_in, **settings)
    inputs["z_in"] = torch.tensor([0.0, 0.8])
    inputs["z_out"] = torch.tensor([0.3, 0.0, 1.0])
    check(inputs, device, **settings)


@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=4)), ids=ids)
def test_optional_arguments(present, device):
    inputs = make_inputs(torch.float32)
    optional = (("bias",), ("z_in",), ("z_out",), ("lora_a", "lora_b"))
    for keep, names in zip(present, optional, strict=True):
        if not keep:
            for name in names:
                del inputs[name]
    check(inputs, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("layout", ["channel_major", "sliced", "every_second"])
def test_strides(layout, dtype, device):
    inputs = make_inputs(dtype)
    for name in ("x", "w", "lora_a", "lora_b", "bias", "z_in"):
        tensor = inputs[name]
        if layout == "every_second":
            wide = tensor.repeat_interleave(2, dim=-1)
            inputs[name] = wide[..., ::2]
        elif tensor.dim() == 2 and layout == "channel_major":
            inputs[name] = tensor.t().contiguous().t()
        elif tensor.dim() == 2:
            inputs[name] = F.pad(tensor, (3, 5))[:, 3:-5]
    results = check(inputs, device)
    if layout == "channel_major":
        assert results["dw"].stride() == inputs["w"].stride()


@pytest.mark.parametrize("shape", [(K,), (2, 3, K)], ids=ids)
def test_leading_dimensions(shape, device):
    inputs = make_inputs(torch.float32)
    inputs["x"] = torch.randn(*shape)
    assert check(inputs, device)["y"].shape == (*shape[:-1], N)


def test_leading_dimensions_that_do_not_collapse(device):
    inputs = make_inputs(torch.float32)
    inputs["x"] = torch.randn(3, 2, K).transpose(0, 1)
    check(inputs, device, dy=torch.randn(N).expand(2, 3, N))


@pytest.mark.parametrize("rank", [1, 16, 70])
def test_ranks(rank, device):
    check(make_inputs(torch.bfloat16, rank=rank), device)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_masked_form(dtype, gates, device):
    check(make_inputs(dtype, z_in=gates, z_out=gates), device, form="masked")


@pytest.mark.parametrize("present", [("z_in",), ("z_out",), ("z_out", "lora_a", "lora_b")], ids=str)
def test_masked_form_without_some_arguments(present, device):
    inputs = make_inputs(torch.float32)
    check({k: t for k, t in inputs.items() if k in ("x", "w", *present)}, device, form="masked")


@pytest.mark.parametrize("form", ["gated", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_dropout(dtype, form, device):
    check(make_inputs(dtype, t=19, rank=16), device, form=form, dropout=0.3, seed=2**40 + 1)


def test_dropout_follows_its_seed_and_no_tile(device):
    inputs, dy = to(make_inputs(torch.float32, t=19), device), torch.randn(19, N, device=device)
    first = run(gated_linear_fn, inputs, dy, dropout=0.3, seed=1)
    seed = torch.tensor(1, device=device)
    again = run(gated_linear_fn, inputs, dy, dropout=0.3, seed=seed, config=SMALL_TILES)
    other = run(gated_linear_fn, inputs, dy, dropout=0.3, seed=2)
    for name in ("y", "dx", "dlora_a", "dlora_b"):
        torch.testing.assert_close(first[name], again[name])
        assert not torch.allclose(first[name], other[name], rtol=0.01)


@pytest.mark.parametrize("form", ["gated", "masked"])
@pytest.mark.parametrize("groups", [(16, 20), (24, 8)], ids=str)
def test_forms_with_groups(groups, form, device):
    settings = {"group_in": groups[0], "group_out": groups[1], "form": form}
    inputs = make_inputs(torch.bfloat16, t=19, group_in=groups[0], group_out=groups[1])
    check(inputs, device, dropout=0.3, seed=1, **settings)


def test_dropout_without_lora_changes_nothing(device):
    inputs, dy = to(make_inputs(torch.float32, rank=0), device), torch.randn(T, N, device=device)
    plain = run(gated_linear_fn, inputs, dy)
    dropped = run(gated_linear_fn, inputs, dy, dropout=0.5, seed=1)
    for name in plain:
        assert torch.equal(plain[name], dropped[name]), name


def test_rows_beyond_one_program_of_the_column_sums(device):
    y, z = torch.randn(ROWS + 3, 8), torch.tensor([0.5, 0.0, 1.0, 0.0, 0.2, 1.0, 0.7, 0.0])
    axis = Axis(8, z.to(device), open_set_fn(z.to(device)))
    with poisoned_empty():
        total, product = column_sums(y.to(device), y.to(device), axis)
    torch.testing.assert_close(total.cpu(), torch.where(z != 0, y.sum(0), 0.0))
    torch.testing.assert_close(product.cpu(), torch.where(z != 0, y.square().sum(0), 0.0))


@pytest.mark.parametrize("gates", GATES)
def test_many_small_tiles(gates, device):
    inputs = make_inputs(torch.float32, t=19, z_in=gates, z_out=gates)
    check(inputs, device, config=SMALL_TILES)


@pytest.mark.parametrize("groups", [(16, 20), (48, 8), (24, 40)], ids=ids)
def test_small_tiles_in_groups(groups, device):
    settings = {"group_in": groups[0], "group_out": groups[1]}
    inputs = make_inputs(torch.bfloat16, **settings)
    check(inputs, device, config=SMALL_TILES, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_all_ones_is_linear(dtype, device):
    inputs = make_inputs(dtype, rank=0, z_in="open", z_out="open")
    inputs = {name: t.to(device) for name, t in inputs.items()}
    x, w, bias = inputs["x"], inputs["w"], inputs["bias"]
    y = gated_linear_fn(**inputs)
    assert torch.equal(y, gated_linear_fn(x, w, bias))
    truth = F.linear(x.double(), w.double(), bias.double())
    assert_close_to_fp64("y", y, F.linear(x, w, bias), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_rounding_errors_are_no_larger_than_those_of_torch(dtype, device):
    """Pooled over seeds, the mean square error of y and of every gradient."""
    ours, theirs = collections.Counter(), collections.Counter()
    for seed in range(3):
        inputs = to(make_inputs(dtype, t=16, seed=seed), device)
        dy = torch.randn(16, N, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        truth = run(gated_linear_ref, {k: t.double() for k, t in inputs.items()}, dy)
        for errors, fn in ((ours, gated_linear_fn), (theirs, gated_linear_ref)):
            for name, got in run(fn, inputs, dy).items():
                errors[name] += (got.double() - truth[name]).square().sum().item()
    for name in theirs:
        assert ours[name] <= theirs[name], name


def test_tiny_gates_keep_their_gradient_in_fp16(device):
    inputs = make_inputs(torch.float16)
    inputs["z_out"] = inputs["z_out"] * 1e-6
    check(inputs, device)


@pytest.mark.parametrize("group", [1, 16])
def test_closed_lanes_are_never_read(group, device):
    inputs = make_inputs(torch.float32, n=48, group_in=group, group_out=group)
    inputs["z_in"][0] = inputs["z_out"][0] = 0.0
    closed_in = (inputs["z_in"] == 0).repeat_interleave(group)
    closed_out = (inputs["z_out"] == 0).repeat_interleave(group)
    settings = {"group_in": group, "group_out": group}
    dy = torch.randn(T, 48)
    clean = run(gated_linear_fn, to(inputs, device), dy.to(device), **settings)
    inputs["x"][:, closed_in] = float("nan")
    inputs["w"][:, closed_in] = float("nan")
    inputs["w"][closed_out] = float("nan")
    inputs["bias"][closed_out] = float("nan")
    inputs["lora_a"][:, closed_in] = float("nan")
    inputs["lora_b"][closed_out] = float("nan")
    dy[:, closed_out] = float("nan")
    dirty = run(gated_linear_fn, to(inputs, device), dy.to(device), **settings)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


def test_a_nan_token_stays_in_its_row_and_out_of_closed_columns(device):
    inputs = to(make_inputs(torch.float32), device)
    inputs["x"][2] = float("nan")
    y = gated_linear_fn(**inputs)
    is_open = inputs["z_out"] != 0
    assert y[2, is_open].isnan().all() and not y[:2].isnan().any() and not y[3:].isnan().any()
    assert (y[:, ~is_open] == 0).all()


def test_deterministic(device):
    inputs, dy = to(make_inputs(torch.bfloat16, t=33), device), torch.randn(33, N, device=device)
    first, second = (run(gated_linear_fn, inputs, dy) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "sizes", [{"t": 0}, {"n": 0}, {"k": 0}, {"rank": 0}, {"t": 0, "n": 0, "k": 0}], ids=ids
)
def test_zero_sizes(sizes, device):
    check(make_inputs(torch.float32, **sizes), device)


def test_lora_of_rank_zero(device):
    inputs = make_inputs(torch.float32, rank=0)
    inputs["lora_a"], inputs["lora_b"] = torch.zeros(0, K), torch.zeros(N, 0)
    check(inputs, device)


@pytest.mark.parametrize("name", ["x", "w", "bias", "z_in", "z_out", "lora_a", "lora_b"])
def test_one_gradient_at_a_time(name, device):
    inputs, dy = to(make_inputs(torch.float32), device), torch.randn(T, N, device=device)
    everything = run(gated_linear_fn, inputs, dy)
    inputs[name].requires_grad_()
    (alone,) = torch.autograd.grad(gated_linear_fn(**inputs), [inputs[name]], dy)
    assert torch.equal(alone, everything[f"d{name}"])


def test_only_what_the_backward_needs_is_kept(device):
    inputs = to(make_inputs(torch.float32, z_in=None, rank=0), device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_linear_fn(**inputs | {"x": inputs["x"].clone().requires_grad_()})
    assert not any(t.dim() == 2 and t.shape[0] == T for t in kept)


def operator_arguments(inputs):
    names = ("x", "w", "bias", "z_in", "z_out", "lora_a", "lora_b")
    return tuple(inputs.get(name) for name in names)


SETTINGS = (0.5, 1, 1, "gated", 0.25, "exact", 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
def test_opcheck_forward(dtype, device):
    inputs = to(make_inputs(dtype), device)
    arguments = [t.requires_grad_() for t in operator_arguments(inputs)]
    seed, keep_h = torch.tensor(3, device=device), dtype == torch.float16
    operator = torch.ops.gatepack.gated_linear.default
    torch.library.opcheck(operator, (*arguments, seed, *SETTINGS, keep_h, []))


def test_opcheck_backward(device):
    x, w, bias, z_in, z_out, a, b = operator_arguments(to(make_inputs(torch.float32), device))
    seed = torch.tensor(3, device=device)
    y, _, u, open_in, open_out = torch.ops.gatepack.gated_linear(
        x, w, bias, z_in, z_out, a, b, seed, *SETTINGS, False, []
    )
    saved = (x, w, bias, z_in, z_out, open_in, open_out, a, b, y, u, seed)
    arguments = (torch.randn_like(y), *saved, *SETTINGS, True, [True] * 7, [])
    torch.library.opcheck(torch.ops.gatepack.gated_linear_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
def test_compiles_into_one_graph(dtype, device):
    inputs, dy = to(make_inputs(dtype), device), torch.randn(T, N, device=device)
    settings = {"dropout": 0.3, "seed": 1, "closed_grad": "exact", "config": SMALL_TILES}
    compiled = torch.compile(gated_linear_fn, fullgraph=True, backend="aot_eager")
    expected = run(gated_linear_fn, inputs, dy, **settings)
    got = run(compiled, inputs, dy, **settings)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_second_derivative_is_refused(device):
    x, w = torch.randn(T, K, device=device, requires_grad=True), torch.randn(N, K, device=device)
    y = gated_linear_fn(x, w)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="gated_linear has no second derivative"):
        dx.sum().backward()


REFUSED_SETTINGS = [
    ({"form": "soft"}, r"form: expected one of \('gated', 'masked'\), got 'soft'"),
    ({"dropout": 1.0}, "dropout: expected at least 0 and below 1, got 1.0"),
    ({"dropout": 0.1}, "seed: expected an integer or an int64 tensor for dropout, got None"),
    ({"dropout": 0.1, "seed": 0.5}, "seed: expected an integer of 64 bits, got 0.5"),
    ({"seed": torch.zeros(2)}, r"seed: expected an int64 tensor of one element on .*, got"),
    ({"closed_grad": "all"}, "closed_grad: expected one of .* got 'all'"),
    ({"closed_grad": "sampled"}, "seed: expected .* for closed_grad 'sampled', got None"),
    ({"closed_fraction": 0.0}, "closed_fraction: expected above 0 and at most 1, got 0.0"),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED_SETTINGS, ids=[m for _, m in REFUSED_SETTINGS]
)
def test_refused_settings(settings, message, device):
    with pytest.raises(ValueError, match=message):
        gated_linear_fn(**to(make_inputs(torch.float32), device), **settings)


REFUSED = [
    ({"x": torch.zeros(T, K, dtype=torch.float64)}, "x: expected dtype float32, bfloat16 or"),
    ({"x": torch.zeros(())}, "x: expected at least one dimension, got a scalar"),
    ({"x": torch.zeros(T, K + 1)}, rf"x: expected shape \({T}, {K}\), got \({T}, {K + 1}\)"),
    ({"w": torch.zeros(K)}, rf"w: expected two dimensions, got shape \({K},\)"),
    ({"w": torch.zeros(N, K).half()}, "w: expected dtype torch.float32, got torch.float16"),
    ({"bias": torch.zeros(N, 1)}, rf"bias: expected shape \({N},\), got \({N}, 1\)"),
    ({"bias": torch.zeros(N).half()}, "bias: expected dtype torch.float32, got torch.float16"),
    ({"z_in": torch.ones(K).half()}, "z_in: expected dtype torch.float32, got torch.float16"),
    ({"z_in": torch.ones(K - 1)}, rf"z_in: expected shape \({K},\), got \({K - 1},\)"),
    ({"z_out": torch.ones(N // 8)}, rf"z_out: expected shape \({N},\), got \({N // 8},\)"),
    ({"z_in": torch.ones(3), "group_in": 7}, "group_in: expected a divisor of 48, got 7"),
    ({"group_out": 0}, "group_out: expected a divisor of 40, got 0"),
    ({"lora_b": None}, "lora_b: expected a tensor beside the other LoRA factor, got None"),
    ({"lora_a": torch.zeros(RANK, N)}, rf"lora_a: expected shape \({RANK}, {K}\)"),
    ({"lora_b": torch.zeros(N, RANK + 1)}, rf"lora_b: expected shape \({N}, {RANK}\)"),
    ({"bias": torch.zeros(N, device="meta")}, r"bias: expected device .* \(that of x\), got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = to(make_inputs(torch.float32), device)
    for name, value in change.items():
        is_local = isinstance(value, torch.Tensor) and value.device.type != "meta"
        arguments[name] = value.to(device) if is_local else value
    with pytest.raises(ValueError, match=message):
        gated_linear_fn(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_head_gates_of_smollm2(dtype, device):
    shape = MODEL_SHAPES["smollm2-135m"]
    settings = {"group_in": shape.head_dim}
    inputs = make_inputs(dtype, t=17, n=shape.hidden, k=shape.hidden, z_out=None, **settings)
    check(inputs, device, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("unit", ["heads", "channels", "rows"])
def test_llama_3_8b(unit, dtype, device):
    shape = MODEL_SHAPES["llama-3-8b"]
    sizes, gates, settings = {
        "heads": ((shape.hidden, shape.hidden), ("fractional", None), {"group_in": shape.head_dim}),
        "channels": ((shape.hidden, shape.mlp), ("fractional", None), {}),
        "rows": ((shape.mlp, shape.hidden), (None, "fractional"), {}),
    }[unit]
    inputs = make_inputs(dtype, 1025, *sizes, rank=16, z_in=gates[0], z_out=gates[1], **settings)
    check(inputs, device, **settings)


@pytest.mark.gpu
def test_no_host_synchronisation(device):
    inputs, dy = to(make_inputs(torch.bfloat16), device), torch.randn(T, N, device=device)
    run(gated_linear_fn, inputs, dy)
    with no_host_sync():
        run(gated_linear_fn, inputs, dy)


@pytest.mark.gpu
def test_a_captured_step_draws_again_when_the_seed_changes(device):
    inputs, dy = to(make_inputs(torch.bfloat16), device), torch.randn(T, N, device=device)
    seed = torch.tensor(1, device=device)
    settings = {"form": "masked", "dropout": 0.3, "closed_grad": "sampled", "seed": seed}

    def step():
        seed.add_(1)
        return run(gated_linear_fn, inputs, dy, **settings)

    replayed = captured(step)
    expected = run(gated_linear_fn, inputs, dy, **settings)
    for name in expected:
        assert torch.equal(replayed[name], expected[name]), name
