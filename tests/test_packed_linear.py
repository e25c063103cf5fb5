import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ops import DTYPES, captured, ids, no_host_sync, run, to

from gatepack.kernels import (
    PackedLinearConfig,
    choose_config,
    packed_linear_fn,
    packed_linear_ref,
)
from gatepack.kernels.packed_linear import LANES
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty

T, N, K, R, C = 5, 40, 48, 24, 32
FLOATING = ("x", "w", "bias", "accumulate")
SMALL = PackedLinearConfig(16, 16, 16, splits=1, num_warps=1, num_stages=1)
SMALL_VECTOR = PackedLinearConfig(1, 4, 16, splits=1, num_warps=1, num_stages=1)


def kept_lanes(kind, size, count, random):
    """int32 [count] ascending lanes of `size`, or None; first and last: a long gap on one side."""
    if kind is None:
        return None
    if kind == "first":
        return torch.arange(count, dtype=torch.int32)
    if kind == "last":
        return torch.arange(size - count, size, dtype=torch.int32)
    return torch.randperm(size, generator=random)[:count].sort().values.to(torch.int32)


def make_inputs(dtype, t=T, n=N, k=K, r=R, c=C, rows="mixed", cols="mixed", seed=0):
    """CPU tensors for packed_linear_fn, and its settings; rows None: N = r, cols None: K = c."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    inputs = {"x": normal(t, c if cols is None else k), "w": normal(r, c) / max(c, 1) ** 0.5}
    inputs |= {"bias": normal(r), "accumulate": normal(t, r if rows is None else n)}
    settings = {"rows": kept_lanes(rows, n, r, random), "cols": kept_lanes(cols, k, c, random)}
    settings["out_features"] = None if rows is None else n
    return inputs, settings


def on(settings, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


def upstream(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)


def check(inputs, settings, device, config=None):
    """Forward and every gradient, from poisoned memory, against fp64 and torch's own error."""
    inputs, settings = to(inputs, device), on(settings, device)
    dy = upstream(packed_linear_ref(**inputs, **settings))
    truth = run(packed_linear_ref, {k: t.double() for k, t in inputs.items()}, dy, **settings)
    theirs = run(packed_linear_ref, inputs, dy, **settings)
    with poisoned_empty():
        ours = run(packed_linear_fn, inputs, dy, config=config, **settings)
    for name, got in ours.items():
        assert_close_to_fp64(name, got, theirs[name], truth[name], 2 if name == "y" else 3)
    return ours


@pytest.mark.parametrize("t", [1, 2, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_tokens(dtype, t, device):
    check(*make_inputs(dtype, t=t), device)


@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("rows", [None, "mixed", "first", "last"])
@pytest.mark.parametrize("cols", [None, "mixed"])
def test_lanes(rows, cols, t, device):
    check(*make_inputs(torch.float32, t=t, rows=rows, cols=cols), device)


@pytest.mark.parametrize("c", [31, 34, 36, 40])
def test_row_lengths_that_allow_shorter_loads(c, device):
    check(*make_inputs(torch.bfloat16, t=1, c=c), device)


@pytest.mark.parametrize("present", [(), ("bias",), ("accumulate",)], ids=ids)
@pytest.mark.parametrize("rows", [None, "mixed"])
def test_optional_arguments(rows, present, device):
    inputs, settings = make_inputs(torch.float32, rows=rows)
    inputs = {k: v for k, v in inputs.items() if k in ("x", "w", *present)}
    check(inputs, settings, device)


@pytest.mark.parametrize("t", [1, 19])
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_many_small_tiles_and_splits(dtype, splits, t, device):
    config = dataclasses.replace(SMALL_VECTOR if t == 1 else SMALL, splits=splits)
    check(*make_inputs(dtype, t=t, r=37, c=43), device, config)


@pytest.mark.parametrize("t", [1, 2])
def test_gap_longer_than_one_step(t, device):
    inputs, settings = make_inputs(torch.float32, t=t, n=3 * LANES + 5, r=3)
    settings["rows"] = torch.tensor([4, 2 * LANES + 9, 3 * LANES])
    check(inputs, settings, device)


@pytest.mark.parametrize("t", [1, 5])
def test_lanes_without_a_row_hold_the_residual_or_zero(t, device):
    inputs, settings = make_inputs(torch.bfloat16, t=t)
    inputs, settings = to(inputs, device), on(settings, device)
    empty = torch.ones(N, dtype=torch.bool, device=device)
    empty[settings["rows"].long()] = False
    inputs["accumulate"][:, 0] = float("nan")
    residual = inputs["accumulate"].clone()
    y = packed_linear_fn(**inputs, **settings)
    torch.testing.assert_close(y[:, empty], residual[:, empty], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(inputs["accumulate"], residual, rtol=0, atol=0, equal_nan=True)
    del inputs["accumulate"]
    assert (packed_linear_fn(**inputs, **settings)[:, empty] == 0).all()


@pytest.mark.parametrize("t", [1, 5])
def test_only_kept_lanes_of_x_are_read(t, device):
    inputs, settings = make_inputs(torch.float32, t=t)
    inputs, settings = to(inputs, device), on(settings, device)
    clean = packed_linear_fn(**inputs, **settings)
    dropped = torch.ones(K, dtype=torch.bool, device=device)
    dropped[settings["cols"].long()] = False
    inputs["x"][:, dropped] = float("nan")
    assert torch.equal(packed_linear_fn(**inputs, **settings), clean)


@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("layout", ["channel_major", "sliced", "every_second"])
def test_strides(layout, t, device):
    inputs, settings = make_inputs(torch.float32, t=t)
    for name in FLOATING:
        tensor = inputs[name]
        if layout == "every_second":
            inputs[name] = tensor.repeat_interleave(2, dim=-1)[..., ::2]
        elif tensor.dim() == 2 and layout == "channel_major":
            inputs[name] = tensor.t().contiguous().t()
        elif tensor.dim() == 2:
            inputs[name] = F.pad(tensor, (3, 5))[:, 3:-5]
    if layout == "every_second":
        settings |= {k: settings[k].repeat_interleave(2)[::2] for k in ("rows", "cols")}
    check(inputs, settings, device)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=ids)
@pytest.mark.parametrize("lead", [(), (2, 3)], ids=ids)
def test_leading_dimensions(lead, index, device):
    inputs, settings = make_inputs(torch.float32)
    inputs["x"], inputs["accumulate"] = torch.randn(*lead, K), torch.randn(*lead, N)
    settings |= {k: settings[k].to(index) for k in ("rows", "cols")}
    assert check(inputs, settings, device)["y"].shape == (*lead, N)


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_without_lanes_is_linear(dtype, t, device):
    inputs, _ = make_inputs(dtype, t=t, rows=None, cols=None)
    x, w, bias, _ = to(inputs, device).values()
    y = packed_linear_fn(x, w, bias)
    everything = torch.arange(R, device=device)
    assert torch.equal(y, packed_linear_fn(x, w, bias, rows=everything, out_features=R))
    truth = F.linear(x.double(), w.double(), bias.double())
    assert_close_to_fp64("y", y, F.linear(x, w, bias), truth)


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, splits=2)], ids=["1", "2"])
def test_deterministic(config, device):
    inputs, settings = make_inputs(torch.bfloat16, t=33)
    inputs, settings = to(inputs, device), on(settings, device)
    first, second = (packed_linear_fn(**inputs, **settings, config=config) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("sizes", [{"t": 0}, {"r": 0}, {"c": 0}, {"r": 0, "n": 0}], ids=ids)
@pytest.mark.parametrize("residual", [True, False])
def test_zero_sizes(residual, sizes, device):
    inputs, settings = make_inputs(torch.float32, **sizes)
    if not residual:
        del inputs["accumulate"]
    check(inputs, settings, device)


@pytest.mark.parametrize("name", FLOATING)
def test_one_gradient_at_a_time(name, device):
    inputs, settings = make_inputs(torch.float32)
    inputs, settings = to(inputs, device), on(settings, device)
    dy = torch.randn(T, N, device=device)
    everything = run(packed_linear_fn, inputs, dy, **settings)
    inputs[name].requires_grad_()
    (alone,) = torch.autograd.grad(packed_linear_fn(**inputs, **settings), [inputs[name]], dy)
    assert torch.equal(alone, everything[f"d{name}"])


@pytest.mark.parametrize("lanes", [None, "mixed"])
def test_opcheck_forward(lanes, device):
    inputs, settings = make_inputs(torch.float32, rows=lanes, cols=lanes)
    x, w, bias, accumulate = (t.requires_grad_() for t in to(inputs, device).values())
    rows, cols, n = on(settings, device).values()
    rows_cols_n = rows, cols, accumulate, n
    operator = torch.ops.gatepack.packed_linear.default
    torch.library.opcheck(operator, (x, w, bias, *rows_cols_n, []))


def test_opcheck_backward(device):
    inputs, settings = make_inputs(torch.float32)
    x, w, *_ = to(inputs, device).values()
    rows, cols, _ = on(settings, device).values()
    arguments = (torch.randn(T, N, device=device), x, w, rows, cols, K, [True] * 3)
    torch.library.opcheck(torch.ops.gatepack.packed_linear_backward.default, arguments)


def test_compiles_into_one_graph(device):
    inputs, settings = make_inputs(torch.float32)
    inputs, settings = to(inputs, device), on(settings, device)
    dy = torch.randn(T, N, device=device)
    compiled = torch.compile(packed_linear_fn, fullgraph=True, backend="aot_eager")
    expected = run(packed_linear_fn, inputs, dy, config=SMALL, **settings)
    got = run(compiled, inputs, dy, config=SMALL, **settings)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_second_derivative_is_refused(device):
    x, w = torch.randn(T, C, device=device, requires_grad=True), torch.randn(R, C, device=device)
    y = packed_linear_fn(x, w)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="packed_linear has no second derivative"):
        dx.sum().backward()


REFUSED = [
    ({"x": torch.zeros(T, K, dtype=torch.float64)}, "x: expected dtype float32, bfloat16 or"),
    ({"x": torch.zeros(())}, "x: expected at least one dimension, got a scalar"),
    ({"x": torch.zeros(T, C - 1)}, f"cols: expected at most {C - 1} lanes .* got {C}"),
    ({"cols": None}, rf"x: expected shape \({T}, {C}\), got \({T}, {K}\)"),
    ({"w": torch.zeros(C)}, rf"w: expected two dimensions, got shape \({C},\)"),
    ({"w": torch.zeros(R, C).half()}, "w: expected dtype torch.float32, got torch.float16"),
    ({"bias": torch.zeros(R + 1)}, rf"bias: expected shape \({R},\), got \({R + 1},\)"),
    ({"rows": torch.arange(R - 1)}, rf"rows: expected shape \({R},\), got \({R - 1},\)"),
    ({"rows": torch.zeros(R)}, "rows: expected dtype torch.int32 or torch.int64, got torch.float"),
    ({"cols": torch.arange(C - 1)}, rf"cols: expected shape \({C},\), got \({C - 1},\)"),
    ({"out_features": None}, f"out_features: expected at least {R} with rows, got None"),
    ({"out_features": R - 1}, f"out_features: expected at least {R} with rows, got {R - 1}"),
    ({"rows": None}, f"out_features: expected None or {R} without rows, got {N}"),
    ({"accumulate": torch.zeros(T, R)}, rf"accumulate: expected shape \({T}, {N}\)"),
    ({"bias": torch.zeros(R, device="meta")}, r"bias: expected device .* \(that of x\), got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    inputs, settings = make_inputs(torch.float32)
    arguments = to(inputs, device) | on(settings, device)
    for name, value in change.items():
        is_local = isinstance(value, torch.Tensor) and value.device.type != "meta"
        arguments[name] = value.to(device) if is_local else value
    with pytest.raises(ValueError, match=message):
        packed_linear_fn(**arguments)


@pytest.mark.parametrize(
    ("field", "value"), [("block_t", 3), ("block_r", 8), ("num_warps", 3), ("splits", 0)]
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .* got {value}"):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "cpu"])
@pytest.mark.parametrize("t", [0, 1, 2, 16, 1024])
@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (576, 920), (2432, 8576), (128256, 4096)])
def test_every_choice_is_a_valid_config(shape, t, arch):
    config = choose_config("packed_linear", (t, *shape), torch.bfloat16, arch)
    assert (config.block_t == 1) == (t == 1)
    assert config.splits <= max(1, shape[1] // config.block_c)


@pytest.mark.slow
@pytest.mark.parametrize("t", [1, 3])
def test_down_proj_of_smollm2(t, device):
    shape = MODEL_SHAPES["smollm2-135m"]
    check(*make_inputs(torch.bfloat16, t, shape.hidden, shape.mlp, 384, 920), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("t", [1, 2, 16, 100])
@pytest.mark.parametrize(
    ("model", "r", "c"),
    [("smollm2-135m", 576, 920), ("llama-3-8b", 2432, 8576), ("llama-3-8b", 640, 14335)],
)
def test_model_shapes(model, r, c, t, dtype, device):
    shape = MODEL_SHAPES[model]
    check(*make_inputs(dtype, t, shape.hidden, shape.mlp, r, c), device)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 16])
def test_decode_is_captured_and_never_waits_for_the_host(t, device):
    shape = MODEL_SHAPES["llama-3-8b"]
    inputs, settings = make_inputs(torch.bfloat16, t, shape.hidden, shape.mlp, 2432, 8576)
    inputs, settings = to(inputs, device), on(settings, device)
    expected = packed_linear_fn(**inputs, **settings)
    with no_host_sync():
        packed_linear_fn(**inputs, **settings)
    assert torch.equal(captured(lambda: packed_linear_fn(**inputs, **settings)), expected)
