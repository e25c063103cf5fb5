import itertools

import pytest
import torch
from glu import (
    PERSISTENT_TILES,
    RANK,
    SCALES,
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

from gatepack.kernels import gated_swiglu_fn, gated_swiglu_ref
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64

ours = with_pairs(gated_swiglu_fn)


def inputs_of(dtype, *sizes, **settings):
    return make_inputs(dtype, *sizes, **{"branches": "au"} | settings)


def check_swiglu(inputs, device, **settings):
    return check(gated_swiglu_fn, gated_swiglu_ref, inputs, device, **settings)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_gates(dtype, gates, device):
    check_swiglu(inputs_of(dtype, z=gates), device)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("branches", ["au", "u"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_activations(dtype, branches, activation, device):
    check_swiglu(inputs_of(dtype, branches=branches), device, activation=activation)


@pytest.mark.parametrize("t", [1, 16, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_tokens(dtype, t, device):
    check_swiglu(inputs_of(dtype, t), device)


@pytest.mark.parametrize("tiles", [SMALL_TILES, PERSISTENT_TILES], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("gates", [*GATES, None])
def test_many_small_tiles(gates, tiles, device):
    check_swiglu(inputs_of(torch.bfloat16, 19, z=gates), device, config=tiles)


@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=4)), ids=ids)
def test_optional_arguments(present, device):
    optional = (("bias_a", "bias_u"), ("z",), ("a_of_a", "b_of_a"), ("a_of_u", "b_of_u"))
    absent = [
        name for keep, names in zip(present, optional, strict=True) if not keep for name in names
    ]
    check_swiglu(without(inputs_of(torch.float32), *absent), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("layout", ["channel_major", "sliced", "every_second"])
def test_strides(layout, dtype, device):
    inputs = with_layout(inputs_of(dtype), layout)
    results = check_swiglu(inputs, device, config=PERSISTENT_TILES)
    if layout == "channel_major":
        assert results["dw_a"].stride() == inputs["w_a"].stride()


@pytest.mark.parametrize("shape", [(K,), (2, 3, K)], ids=ids)
def test_leading_dimensions(shape, device):
    inputs = inputs_of(torch.float32) | {"x": normal(*shape)}
    assert check_swiglu(inputs, device)["y"].shape == (*shape[:-1], F)


def test_leading_dimensions_that_do_not_collapse(device):
    inputs = inputs_of(torch.float32) | {"x": normal(3, 2, K).transpose(0, 1)}
    check_swiglu(inputs, device, dy=normal(F).expand(2, 3, F))


@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("scales", [SCALES, {"a": 0.5, "u": 2.0}], ids=["same", "different"])
def test_ranks(rank, scales, device):
    check_swiglu(inputs_of(torch.bfloat16, rank=rank), device, scales=scales)


@pytest.mark.parametrize("recompute", [False, True])
def test_capacity(recompute, device):
    inputs = inputs_of(torch.float32)
    n_open = int((inputs["z"] != 0).sum())
    for capacity in (n_open, n_open + 3):
        results = check_swiglu(
            inputs, device, capacity=capacity, recompute=recompute, config=SMALL_TILES
        )
        assert results["y"].shape == (T, capacity)


@pytest.mark.parametrize("capacity", [0, 7])
def test_more_open_channels_than_capacity_give_nan(capacity, device):
    inputs = to(inputs_of(torch.float32, z="open"), device)
    results = run(ours, inputs, torch.ones(T, capacity, device=device), capacity=capacity)
    for name, got in results.items():
        if name not in ("db_of_a", "db_of_u"):
            assert got.isnan().all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_packed_weights(dtype, device):
    inputs = inputs_of(dtype)
    small = packed(inputs)
    n_open = len(small["z"])
    # With the same tiles, as those of another size may add up in another order.
    results = check_swiglu(small, device, packed=True, config=SMALL_TILES)
    gathered = ours(**to(inputs, device), capacity=n_open, config=SMALL_TILES)
    assert torch.equal(results["y"], gathered)


@pytest.mark.parametrize("branches", ["au", "u"])
def test_recomputed_equals_kept(branches, device):
    inputs = to(inputs_of(torch.bfloat16, branches=branches), device)
    dy = torch.randn(T, F, device=device)
    kept, recomputed = (run(ours, inputs, dy, recompute=r) for r in (False, True))
    for name in kept:
        assert torch.equal(kept[name], recomputed[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_all_ones_is_plain_swiglu(dtype, device):
    inputs = to(inputs_of(dtype, z="open", rank=0), device)
    h = gated_swiglu_fn(**inputs)
    assert torch.equal(h, gated_swiglu_fn(**without(inputs, "z")))

    def torch_swiglu(x, w_a, w_u, bias_a, bias_u):
        linear = torch.nn.functional.linear
        return torch.nn.functional.silu(linear(x, w_a, bias_a)) * linear(x, w_u, bias_u)

    plain = without(inputs, "z")
    truth = torch_swiglu(**{name: t.double() for name, t in plain.items()})
    assert_close_to_fp64("h", h, torch_swiglu(**plain), truth)


def test_closed_channels_are_never_read(device):
    inputs = to(inputs_of(torch.float32), device)
    dy = torch.randn(T, F, device=device)
    clean = run(ours, inputs, dy)
    dy[:, int((inputs["z"] != 0).sum()) :] = float("nan")
    dirty = run(ours, with_nan_in_closed_channels(inputs), dy)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


def test_a_nan_token_stays_in_its_row(device):
    inputs = to(inputs_of(torch.float32), device)
    inputs["x"][2] = float("nan")
    h = ours(**inputs)
    n_open = int((inputs["z"] != 0).sum())
    assert h[2, :n_open].isnan().all() and not h[:2].isnan().any() and not h[3:].isnan().any()
    assert (h[:, n_open:] == 0).all()


def test_deterministic(device):
    inputs, dy = to(inputs_of(torch.bfloat16, 33), device), torch.randn(33, F, device=device)
    first, second = (run(ours, inputs, dy) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "sizes", [{"t": 0}, {"f": 0}, {"k": 0}, {"rank": 0}, {"t": 0, "f": 0, "k": 0}], ids=ids
)
def test_zero_sizes(sizes, device):
    check_swiglu(inputs_of(torch.float32, **sizes), device)


def test_lora_of_rank_zero(device):
    inputs = inputs_of(torch.float32, rank=0)
    inputs["a_of_a"], inputs["b_of_a"] = torch.zeros(0, K), torch.zeros(F, 0)
    check_swiglu(inputs, device)


@pytest.mark.parametrize("name", inputs_of(torch.float32))
def test_one_gradient_at_a_time(name, device):
    inputs, dy = to(inputs_of(torch.float32), device), torch.randn(T, F, device=device)
    everything = run(ours, inputs, dy)
    inputs[name].requires_grad_()
    (alone,) = torch.autograd.grad(ours(**inputs), [inputs[name]], dy)
    assert torch.equal(alone, everything[f"d{name}"])


@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_the_backward_needs_is_kept(recompute, device):
    inputs = to(inputs_of(torch.float32, rank=0), device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(**inputs | {"z": inputs["z"].requires_grad_()}, capacity=F, recompute=recompute)
    shapes = sorted(tuple(t.shape) for t in kept if t.dim() == 2 and t.shape[0] == T)
    assert shapes == ([(T, K)] if recompute else [(T, F), (T, F)])


FACTORS = torch.zeros(RANK, K), torch.zeros(F, RANK)
REFUSED = [
    ({"x": torch.zeros(T, K, dtype=torch.float64)}, "x: expected dtype float32, bfloat16 or"),
    ({"x": torch.zeros(())}, "x: expected at least one dimension, got a scalar"),
    ({"x": torch.zeros(T, K + 1)}, rf"x: expected shape \({T}, {K}\), got \({T}, {K + 1}\)"),
    ({"w_u": torch.zeros(K)}, rf"w_u: expected two dimensions, got shape \({K},\)"),
    ({"w_a": torch.zeros(K, F)}, rf"w_a: expected shape \({F}, {K}\), got \({K}, {F}\)"),
    ({"w_a": torch.zeros(F, K).half()}, "w_a: expected dtype torch.float32, got torch.float16"),
    ({"bias_u": torch.zeros(F, 1)}, rf"bias_u: expected shape \({F},\), got \({F}, 1\)"),
    ({"z": torch.ones(F).half()}, "z: expected dtype torch.float32, got torch.float16"),
    ({"z": torch.ones(F - 1)}, rf"z: expected shape \({F},\), got \({F - 1},\)"),
    ({"lora_of_a": FACTORS}, r"lora_of_a: expected \(A, B, scale\) or None, got tuple"),
    ({"lora_of_u": (FACTORS[1], FACTORS[1], 1.0)}, r"lora_of_u\[0\]: expected shape"),
    ({"lora_of_u": (FACTORS[0], None, 1.0)}, r"lora_of_u: expected \(A, B, scale\) or None, got a"),
    ({"lora_of_u": (FACTORS[0], FACTORS[0], 1.0)}, r"lora_of_u\[1\]: expected shape"),
    ({"w_a": None}, "bias_a: expected None where w_a is None, got a tensor"),
    ({"activation": "tanh"}, r"activation: expected one of \['silu', .*\], got 'tanh'"),
    ({"capacity": F + 1}, rf"capacity: expected between 0 and {F} \(channels\), got {F + 1}"),
    ({"capacity": 3, "packed": True}, f"capacity: expected None or {F} where no channel is"),
    ({"capacity": 3, "z": None}, f"capacity: expected None or {F} where no channel is"),
    ({"bias_a": torch.zeros(F, device="meta")}, r"bias_a: expected device .*, got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = to(inputs_of(torch.float32, rank=0), device)
    for name, value in change.items():
        is_local = isinstance(value, torch.Tensor) and value.device.type != "meta"
        arguments[name] = value.to(device) if is_local else value
    with pytest.raises(ValueError, match=message):
        gated_swiglu_fn(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"capacity": 9216}], ids=str)
def test_llama_3_8b(settings, dtype, device):
    shape = MODEL_SHAPES["llama-3-8b"]
    inputs = inputs_of(dtype, 1025, shape.mlp, shape.hidden, rank=16)
    check_swiglu(inputs, device, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_two_matrices_of_roberta(dtype, device):
    shape = MODEL_SHAPES["roberta-base"]
    inputs = inputs_of(dtype, 1025, shape.mlp, shape.hidden, branches="u")
    check_swiglu(inputs, device, activation="gelu")


@pytest.mark.gpu
def test_no_host_synchronisation(device):
    inputs, dy = to(inputs_of(torch.bfloat16), device), torch.randn(T, F, device=device)
    run(ours, inputs, dy)
    with no_host_sync():
        run(ours, inputs, dy)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(device):
    inputs, dy = to(inputs_of(torch.bfloat16, 300, 512, 256), device), None
    dy = torch.randn(300, 512, device=device)
    expected = run(ours, inputs, dy)
    replayed = captured(lambda: run(ours, inputs, dy))
    for name in expected:
        assert torch.equal(expected[name], replayed[name]), name
