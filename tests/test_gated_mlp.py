import itertools

import pytest
import torch
from glu import (
    PERSISTENT_TILES,
    RANK,
    SMALL_TILES,
    F,
    K,
    T,
    check,
    make_inputs,
    normal,
    packed,
    with_layout,
    with_nan_in_closed_channels,
    with_pairs,
    without,
)
from ops import DTYPES, GATES, captured, ids, no_host_sync, run, to

from gatepack.kernels import gated_mlp_fn, gated_mlp_ref
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64

ours = with_pairs(gated_mlp_fn)
slow = pytest.mark.slow


def check_mlp(inputs, device, **settings):
    return check(gated_mlp_fn, gated_mlp_ref, inputs, device, **settings)


def channel_major(inputs):
    """The inputs with w_d stored [F, K]."""
    return inputs | {"w_d": inputs["w_d"].t().contiguous().t()}


@pytest.mark.parametrize(
    ("dtype", "gates"),
    [(torch.float32, gates) for gates in GATES]
    + [(dtype, "fractional") for dtype in DTYPES[1:]]
    + [pytest.param(d, g, marks=slow) for d in DTYPES[1:] for g in GATES if g != "fractional"],
    ids=ids,
)
def test_gates(dtype, gates, device):
    check_mlp(make_inputs(dtype, z=gates), device)


@pytest.mark.parametrize(
    ("branches", "activation"),
    [
        ("aud", "gelu_tanh"),
        ("ud", "gelu"),
        *(pytest.param("aud", a, marks=slow) for a in ("gelu", "relu")),
        *(pytest.param("ud", a, marks=slow) for a in ("silu", "gelu_tanh", "relu")),
    ],
)
def test_activations(branches, activation, device):
    check_mlp(make_inputs(torch.bfloat16, branches=branches), device, activation=activation)


@pytest.mark.parametrize("t", [1, 16, pytest.param(33, marks=slow)])
def test_tokens(t, device):
    check_mlp(make_inputs(torch.bfloat16, t), device)


@pytest.mark.parametrize("tiles", [SMALL_TILES, PERSISTENT_TILES], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    "gates", ["fractional", None, *(pytest.param(g, marks=slow) for g in GATES[:-1])]
)
def test_many_small_tiles(gates, tiles, device):
    inputs = make_inputs(torch.bfloat16, 19, z=gates)
    check_mlp(channel_major(inputs), device, config=tiles)


@pytest.mark.parametrize(
    "present",
    [
        (False,) * 5,
        (True, False, True, False, False),
        *(pytest.param(p, marks=slow) for p in itertools.product([True, False], repeat=5)),
    ],
    ids=ids,
)
def test_optional_arguments(present, device):
    optional = (
        ("bias_a", "bias_u", "bias_d"), ("z",), ("a_of_a", "b_of_a"), ("a_of_u", "b_of_u"),
        ("a_of_d", "b_of_d"),
    )  # fmt: skip
    absent = itertools.chain(*itertools.compress(optional, [not p for p in present]))
    check_mlp(without(make_inputs(torch.float32), *absent), device)


@pytest.mark.parametrize("gates", ["fractional", pytest.param(None, marks=slow)])
@pytest.mark.parametrize("layout", ["channel_major", "sliced", "every_second"])
def test_strides(layout, gates, device):
    inputs = with_layout(make_inputs(torch.bfloat16, z=gates), layout)
    results = check_mlp(inputs, device, config=PERSISTENT_TILES)
    if layout == "channel_major":
        for name in ("w_a", "w_u", "w_d"):
            assert results[f"d{name}"].stride() == inputs[name].stride()


@pytest.mark.parametrize("shape", [(K,), (2, 3, K)], ids=ids)
def test_leading_dimensions(shape, device):
    inputs = to(make_inputs(torch.float32, rank=0) | {"x": normal(*shape)}, device)
    dy = normal(*shape, seed=5).to(device)
    results = run(ours, inputs, dy)
    rows = run(ours, inputs | {"x": inputs["x"].reshape(-1, K)}, dy.reshape(-1, K))
    for name, got in results.items():
        expected = rows[name].reshape(shape) if name in ("y", "dx") else rows[name]
        assert torch.equal(got, expected), name


def test_leading_dimensions_that_do_not_collapse(device):
    inputs = make_inputs(torch.float32, rank=0) | {"x": normal(3, 2, K).transpose(0, 1)}
    check_mlp(inputs, device, dy=normal(K).expand(2, 3, K))


@pytest.mark.parametrize("gates", ["fractional", None])
def test_ranks_and_scales_that_differ(gates, device):
    inputs = make_inputs(torch.bfloat16, z=gates)
    other = make_inputs(torch.bfloat16, rank=20)
    inputs |= {name: other[name] for name in ("a_of_u", "b_of_u", "a_of_d", "b_of_d")}
    check_mlp(inputs, device, scales={"a": 0.5, "u": 2.0, "d": 0.7})


@pytest.mark.parametrize("extra", [0, 3])
def test_capacity(extra, device):
    inputs = make_inputs(torch.float32)
    n_open = int((inputs["z"] != 0).sum())
    check_mlp(inputs, device, capacity=n_open + extra, config=SMALL_TILES)


@pytest.mark.parametrize("capacity", [0, 7])
def test_more_open_channels_than_capacity_give_nan(capacity, device):
    inputs = to(make_inputs(torch.float32, z="open", rank=0), device)
    results = run(ours, inputs, torch.ones(T, K, device=device), capacity=capacity)
    for name, got in results.items():
        assert got.isnan().all() or name == "dbias_d", name


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=slow)], ids=ids
)
def test_packed_weights(dtype, device):
    inputs = make_inputs(dtype)
    check_mlp(packed(inputs), device, packed=True)


def test_recomputed_equals_kept(device):
    inputs = to(make_inputs(torch.bfloat16), device)
    dy = torch.randn(T, K, device=device)
    kept, recomputed = (run(ours, inputs, dy, recompute=r) for r in (False, True))
    for name in kept:
        assert torch.equal(kept[name], recomputed[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_all_ones_is_a_plain_mlp(dtype, device):
    inputs = to(make_inputs(dtype, z="open", rank=0), device)
    linear = torch.nn.functional.linear

    def torch_mlp(x, w_a, w_u, w_d, bias_a, bias_u, bias_d):
        h = torch.nn.functional.silu(linear(x, w_a, bias_a)) * linear(x, w_u, bias_u)
        return linear(h, w_d, bias_d)

    plain = without(inputs, "z")
    truth = torch_mlp(**{name: t.double() for name, t in plain.items()})
    for given in (inputs, plain):
        assert_close_to_fp64("y", gated_mlp_fn(**given), torch_mlp(**plain), truth)


def test_closed_channels_are_never_read(device):
    inputs = to(make_inputs(torch.float32), device)
    dy = torch.randn(T, K, device=device)
    clean = run(ours, inputs, dy)
    dirty = run(ours, with_nan_in_closed_channels(inputs), dy)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


def test_a_nan_token_stays_in_its_row(device):
    inputs = to(make_inputs(torch.float32), device)
    clean = ours(**inputs)
    inputs["x"][2] = float("nan")
    y = ours(**inputs)
    assert y[2].isnan().all()
    assert torch.equal(y[:2], clean[:2]) and torch.equal(y[3:], clean[3:])


def test_deterministic(device):
    inputs, dy = to(make_inputs(torch.bfloat16, 33), device), torch.randn(33, K, device=device)
    first, second = (run(ours, inputs, dy) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("gates", ["fractional", None])
@pytest.mark.parametrize("sizes", [{"t": 0}, {"f": 0}, {"k": 0}, {"t": 0, "f": 0, "k": 0}], ids=ids)
def test_zero_sizes(sizes, gates, device):
    check_mlp(make_inputs(torch.float32, z=gates, **sizes), device)


def test_lora_of_rank_zero(device):
    inputs = make_inputs(torch.float32, rank=0)
    inputs["a_of_d"], inputs["b_of_d"] = torch.zeros(0, F), torch.zeros(K, 0)
    check_mlp(inputs, device)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("z", "w_d", "a_of_d", "b_of_u") else slow)
        for n in make_inputs(torch.float32)
    ],
)
def test_one_gradient_at_a_time(name, device):
    inputs, dy = to(make_inputs(torch.float32), device), torch.randn(T, K, device=device)
    everything = run(ours, inputs, dy)
    inputs[name].requires_grad_()
    (alone,) = torch.autograd.grad(ours(**inputs), [inputs[name]], dy)
    assert torch.equal(alone, everything[f"d{name}"])


@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_the_backward_needs_is_kept(recompute, device):
    inputs = to(make_inputs(torch.float32, rank=0), device)
    inputs["z"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(**inputs, capacity=F - 4, recompute=recompute)
    shapes = sorted(tuple(t.shape) for t in kept if t.dim() == 2 and t.shape[0] == T)
    assert shapes == ([(T, K)] if recompute else [(T, F - 4), (T, F - 4)])


REFUSED = [
    ({"x": torch.zeros(T, K, dtype=torch.float64)}, "x: expected dtype float32, bfloat16 or"),
    ({"w_u": torch.zeros(K)}, rf"w_u: expected two dimensions, got shape \({K},\)"),
    ({"w_d": torch.zeros(F, K)}, rf"w_d: expected shape \({K}, {F}\), got \({F}, {K}\)"),
    ({"w_d": torch.zeros(K, F).half()}, "w_d: expected dtype torch.float32, got torch.float16"),
    ({"bias_d": torch.zeros(F)}, rf"bias_d: expected shape \({K},\), got \({F},\)"),
    ({"lora_of_d": torch.zeros(3)}, r"lora_of_d: expected \(A, B, scale\) or None, got Tensor"),
    (
        {"lora_of_d": (torch.zeros(RANK, K), torch.zeros(K, RANK), 1.0)},
        rf"lora_of_d\[0\]: expected shape \({RANK}, {F}\), got \({RANK}, {K}\)",
    ),
    ({"w_a": None}, "bias_a: expected None where w_a is None, got a tensor"),
    ({"activation": "tanh"}, r"activation: expected one of \['silu', .*\], got 'tanh'"),
    ({"capacity": -1}, rf"capacity: expected between 0 and {F} \(channels\), got -1"),
    ({"capacity": 3, "packed": True}, f"capacity: expected None or {F} where no channel is"),
    ({"bias_d": torch.zeros(K, device="meta")}, r"bias_d: expected device .*, got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = to(make_inputs(torch.float32, rank=0), device)
    for name, value in change.items():
        is_local = isinstance(value, torch.Tensor) and value.device.type != "meta"
        arguments[name] = value.to(device) if is_local else value
    with pytest.raises(ValueError, match=message):
        gated_mlp_fn(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"capacity": 9216}], ids=str)
def test_llama_3_8b(settings, dtype, device):
    shape = MODEL_SHAPES["llama-3-8b"]
    inputs = channel_major(make_inputs(dtype, 1025, shape.mlp, shape.hidden, rank=16))
    check_mlp(inputs, device, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_packed_llama_3_8b(dtype, device):
    shape = MODEL_SHAPES["llama-3-8b"]
    inputs = make_inputs(dtype, 1025, shape.mlp, shape.hidden, rank=16)
    check_mlp(packed(inputs), device, packed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_two_matrices_of_roberta(dtype, device):
    shape = MODEL_SHAPES["roberta-base"]
    inputs = make_inputs(dtype, 1025, shape.mlp, shape.hidden, branches="ud")
    check_mlp(inputs, device, activation="gelu")


@pytest.mark.gpu
def test_no_host_synchronisation(device):
    inputs, dy = to(make_inputs(torch.bfloat16), device), torch.randn(T, K, device=device)
    run(ours, inputs, dy)
    with no_host_sync():
        run(ours, inputs, dy)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(device):
    inputs = to(make_inputs(torch.bfloat16, 300, 512, 256), device)
    dy = torch.randn(300, 256, device=device)
    expected = run(ours, inputs, dy)
    replayed = captured(lambda: run(ours, inputs, dy))
    for name in expected:
        assert torch.equal(expected[name], replayed[name]), name
