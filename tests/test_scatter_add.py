import pytest
import torch
import torch.nn.functional as F
from ops import DTYPES, GATES, captured, ids, make_gate, no_host_sync, run, to

from gatepack.kernels import Panel, open_set_ref, scatter_add_fn, scatter_add_ref
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty

SMALL = Panel(rows=4, columns=16, span=8, num_warps=1)


def make_inputs(dtype, t=9, d=37, capacity=None, gates="fractional", seed=0, lead=()):
    """CPU tensors of scatter_add_fn and their open set; capacity None: exactly the open columns."""
    random = torch.Generator().manual_seed(seed)
    z = make_gate(gates, d, seed)
    open_set = open_set_ref(z)
    capacity = int(open_set[-1]) if capacity is None else capacity
    inputs = {
        "residual": torch.randn(*lead, t, d, generator=random).to(dtype),
        "y": torch.randn(*lead, t, capacity, generator=random).to(dtype),
        "z": z,
    }
    return inputs, open_set


def check(inputs, open_set, device, config=SMALL, dout=None):
    """out and every gradient, from poisoned memory, against fp64 and torch's own error."""
    inputs, open_set = to(inputs, device), open_set.to(device)
    if dout is None:
        shape = inputs["residual"].shape
        dout = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    dout = dout.to(device, inputs["residual"].dtype)
    settings = {"open_set": open_set}
    wide = {name: t.double() for name, t in inputs.items()}
    truth = run(scatter_add_ref, wide, dout, **settings)
    theirs = run(scatter_add_ref, inputs, dout, **settings)
    with poisoned_empty():
        ours = run(scatter_add_fn, inputs, dout, config=config, **settings)
    assert_close_to_fp64("out", ours["y"], theirs["y"], truth["y"])
    for name in inputs:
        dtype = inputs["residual"].dtype
        name = f"d{name}"
        assert_close_to_fp64(name, ours[name], theirs[name], truth[name], factor=3, dtype=dtype)
    return ours


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_gates(dtype, gates, device):
    inputs, open_set = make_inputs(dtype, gates=gates)
    check(inputs, open_set, device)
    if gates in ("open", "mixed", "one"):
        del inputs["z"]
        check(inputs, open_set, device)


@pytest.mark.parametrize(("t", "d"), [(1, 1), (19, 16), (8, 100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sizes(dtype, t, d, device):
    check(*make_inputs(dtype, t, d), device)


@pytest.mark.parametrize("capacity", [0, 5, 30, 37, 48])
def test_capacities(capacity, device):
    """Less than the open columns, more than them, and more than all columns."""
    check(*make_inputs(torch.float32, capacity=capacity), device)
    inputs, open_set = make_inputs(torch.float32, capacity=capacity)
    del inputs["z"]
    check(inputs, open_set, device)


def test_default_config(device):
    check(*make_inputs(torch.bfloat16, 33, 96), device, config=None)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every_second"])
def test_strides(layout, device):
    inputs, open_set = make_inputs(torch.bfloat16)
    for name in ("residual", "y"):
        x = inputs[name]
        inputs[name] = {
            "transposed": x.t().contiguous().t(),
            "sliced": F.pad(x, (3, 5))[:, 3:-5],
            "every_second": x.repeat_interleave(2, dim=-1)[:, ::2],
        }[layout]
    inputs["z"] = inputs["z"].repeat_interleave(2)[::2]
    check(inputs, open_set, device, dout=torch.randn(37).expand(9, 37))


@pytest.mark.parametrize("lead", [(2,), (2, 3)], ids=ids)
def test_leading_dimensions(lead, device):
    results = check(*make_inputs(torch.float32, lead=lead), device)
    assert results["dresidual"].shape == results["y"].shape == (*lead, 9, 37)


def test_open_set_that_is_a_view(device):
    inputs, open_set = make_inputs(torch.float32)
    check(inputs, F.pad(open_set, (3, 4))[3:-4], device)


@pytest.mark.parametrize("sizes", [{"t": 0}, {"d": 0}, {"t": 0, "d": 0}], ids=ids)
def test_zero_sizes(sizes, device):
    check(*make_inputs(torch.float32, **sizes), device)
    check(*make_inputs(torch.float32, capacity=3, **sizes), device)


def test_closed_columns_keep_the_bits_of_the_residual(device):
    inputs, open_set = make_inputs(torch.bfloat16)
    inputs, closed = to(inputs, device), (inputs["z"] == 0).to(device)
    out = scatter_add_fn(**inputs, open_set=open_set.to(device))
    assert torch.equal(out[:, closed], inputs["residual"][:, closed])


def test_slots_past_the_count_have_no_effect(device):
    inputs, open_set = make_inputs(torch.float32, capacity=37)
    dout = torch.randn(9, 37)
    clean = check(inputs, open_set, device, dout=dout)
    inputs["y"][:, int(open_set[-1]) :] = float("nan")
    dirty = run(
        scatter_add_fn, to(inputs, device), dout.to(device), config=SMALL,
        open_set=open_set.to(device),
    )  # fmt: skip
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


def test_all_open_is_an_addition(device):
    inputs, open_set = make_inputs(torch.bfloat16, gates="open")
    inputs = to(inputs, device)
    out = scatter_add_fn(**inputs, open_set=open_set.to(device))
    assert torch.equal(out, inputs["residual"] + inputs["y"])


@pytest.mark.parametrize("name", ["residual", "y", "z"])
def test_one_gradient_at_a_time(name, device):
    inputs, open_set = make_inputs(torch.float32)
    inputs, settings = to(inputs, device), {"open_set": open_set.to(device)}
    dout = torch.randn(9, 37, device=device)
    everything = run(scatter_add_fn, inputs, dout, **settings)
    inputs[name].requires_grad_()
    (alone,) = torch.autograd.grad(scatter_add_fn(**inputs, **settings), [inputs[name]], dout)
    assert torch.equal(alone, everything[f"d{name}"])


def test_deterministic(device):
    inputs, open_set = make_inputs(torch.bfloat16, t=33)
    inputs, settings = to(inputs, device), {"open_set": open_set.to(device), "config": SMALL}
    dout = torch.randn(33, 37, device=device)
    first, second = (run(scatter_add_fn, inputs, dout, **settings) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_opcheck(device):
    inputs, open_set = make_inputs(torch.float32)
    residual, y, z = (t.to(device) for t in inputs.values())
    open_set = open_set.to(device)
    leaves = [t.clone().requires_grad_() for t in (residual, y, z)]
    arguments = (*leaves[:2], open_set, leaves[2], [])
    torch.library.opcheck(torch.ops.gatepack.scatter_add.default, arguments)
    arguments = (torch.randn_like(residual), y, open_set, z, y.shape[1], True, True, [])
    torch.library.opcheck(torch.ops.gatepack.scatter_add_backward.default, arguments)


def test_compiles_into_one_graph(device):
    inputs, open_set = make_inputs(torch.bfloat16)
    inputs, settings = to(inputs, device), {"open_set": open_set.to(device)}
    dout = torch.randn(9, 37, device=device)
    compiled = torch.compile(scatter_add_fn, fullgraph=True, backend="aot_eager")
    expected = run(scatter_add_fn, inputs, dout, **settings)
    got = run(compiled, inputs, dout, **settings)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_second_derivative_is_refused(device):
    inputs, open_set = make_inputs(torch.float32)
    inputs = to(inputs, device)
    y = inputs["y"].requires_grad_()
    out = scatter_add_fn(**inputs, open_set=open_set.to(device))
    (dy,) = torch.autograd.grad(out, y, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="scatter_add has no second derivative"):
        dy.sum().backward()


INT = torch.int32
REFUSED = [
    ({"residual": torch.zeros(3, 4).double()}, "residual: expected dtype float32, bfloat16 or"),
    ({"residual": torch.zeros(())}, "residual: expected at least one dimension, got a scalar"),
    ({"y": torch.zeros(())}, "y: expected at least one dimension, got a scalar"),
    ({"y": torch.zeros(4, 2)}, r"y: expected shape \(3, 2\), got \(4, 2\)"),
    ({"y": torch.zeros(3, 2).half()}, "y: expected dtype torch.float32, got torch.float16"),
    ({"open_set": torch.zeros(4, dtype=INT)}, r"open_set: expected shape \(5,\)"),
    ({"open_set": torch.zeros(5)}, r"open_set: expected dtype torch.int32, got torch.float32"),
    ({"z": torch.zeros(2)}, r"z: expected shape \(4,\), got \(2,\)"),
    ({"z": torch.zeros(4, device="meta")}, r"z: expected device .* \(that of residual\), got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = {
        "residual": torch.zeros(3, 4),
        "y": torch.zeros(3, 2),
        "open_set": torch.tensor([0, 2, 1, 3, 2], dtype=INT),
    } | change
    for name, value in arguments.items():
        if value.device.type != "meta":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        scatter_add_fn(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_llama_3_8b(dtype, device):
    inputs, open_set = make_inputs(dtype, 1025, MODEL_SHAPES["llama-3-8b"].hidden, capacity=2560)
    check(inputs, open_set, device, config=None)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture(device):
    inputs, open_set = make_inputs(torch.bfloat16, 64, 96)
    inputs, settings = to(inputs, device), {"open_set": open_set.to(device)}
    dout = torch.ones(64, 96, device=device)
    expected = run(scatter_add_fn, inputs, dout, **settings)
    with no_host_sync():
        run(scatter_add_fn, inputs, dout, **settings)
    got = captured(lambda: run(scatter_add_fn, inputs, dout, **settings))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
