import pytest
import torch
import torch.nn.functional as F
from ops import DTYPES, captured, ids, no_host_sync, run

from gatepack.kernels import Panel, column_dot_fn, column_dot_ref
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty

SMALL = Panel(rows=4, columns=16, span=8, num_warps=1)


def make_inputs(dtype, *shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=random).to(dtype) for name in ("a", "b")}


def check(inputs, device, config=SMALL):
    """y, da and db, from poisoned memory, against fp64 and torch's own error."""
    inputs = {name: t.to(device) for name, t in inputs.items()}
    a, b = inputs["a"], inputs["b"]
    dy = torch.randn(a.shape[-1], generator=torch.Generator().manual_seed(7)).to(device)
    truth = run(column_dot_ref, {name: t.double() for name, t in inputs.items()}, dy)
    theirs = run(column_dot_ref, inputs, dy)
    with poisoned_empty():
        ours = run(column_dot_fn, inputs, dy, config=config)
    terms = column_dot_ref(a.double().abs(), b.double().abs())
    terms = terms.amax().item() if terms.numel() else 0.0
    assert_close_to_fp64("y", ours["y"], theirs["y"], truth["y"], terms=terms)
    for name in ("da", "db"):
        assert_close_to_fp64(name, ours[name], theirs[name], truth[name], factor=3)
    return ours


@pytest.mark.parametrize("n", [1, 16, 37])
@pytest.mark.parametrize("t", [1, 8, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sizes(dtype, t, n, device):
    check(make_inputs(dtype, t, n), device)


def test_default_config(device):
    check(make_inputs(torch.bfloat16, 33, 96), device, config=None)


def test_two_dtypes(device):
    inputs = make_inputs(torch.float32, 9, 20)
    inputs["b"] = inputs["b"].bfloat16()
    check(inputs, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "every_second", "expanded"])
def test_strides(layout, dtype, device):
    inputs = make_inputs(dtype, 9, 20)
    a = inputs["a"]
    inputs["a"] = {
        "transposed": a.t().contiguous().t(),
        "sliced": F.pad(a, (3, 5))[:, 3:-5],
        "every_second": a.repeat_interleave(2, dim=-1)[:, ::2],
        "expanded": a[:1].expand(9, 20),
    }[layout]
    check(inputs, device)


@pytest.mark.parametrize("shape", [(20,), (2, 3, 20)], ids=ids)
def test_leading_dimensions(shape, device):
    assert check(make_inputs(torch.float32, *shape), device)["da"].shape == shape


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3)], ids=ids)
def test_zero_sizes(shape, device):
    assert (check(make_inputs(torch.float32, *shape), device)["y"] == 0).all()


def test_nan_stays_in_its_column(device):
    inputs = make_inputs(torch.float32, 9, 20)
    inputs["a"][2, 3] = float("nan")
    y = column_dot_fn(inputs["a"].to(device), inputs["b"].to(device))
    assert y[3].isnan() and y.isnan().sum() == 1


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_gradient_at_a_time(name, device):
    inputs = {name: t.to(device) for name, t in make_inputs(torch.float32, 9, 20).items()}
    dy = torch.randn(20, device=device)
    everything = run(column_dot_fn, inputs, dy)
    inputs[name].requires_grad_()
    (alone,) = torch.autograd.grad(column_dot_fn(**inputs), [inputs[name]], dy)
    assert torch.equal(alone, everything[f"d{name}"])


def test_deterministic(device):
    inputs = {name: t.to(device) for name, t in make_inputs(torch.bfloat16, 33, 20).items()}
    first, second = (run(column_dot_fn, inputs, torch.ones(20), config=SMALL) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_opcheck(device):
    a, b = (t.to(device) for t in make_inputs(torch.float32, 9, 20).values())
    arguments = (a.clone().requires_grad_(), b.clone().requires_grad_(), [])
    torch.library.opcheck(torch.ops.gatepack.column_dot.default, arguments)
    arguments = (torch.randn(20, device=device), a, b, True, True, [])
    torch.library.opcheck(torch.ops.gatepack.column_dot_backward.default, arguments)


def test_compiles_into_one_graph(device):
    inputs = {name: t.to(device) for name, t in make_inputs(torch.bfloat16, 9, 20).items()}
    compiled = torch.compile(column_dot_fn, fullgraph=True, backend="aot_eager")
    expected = run(column_dot_fn, inputs, torch.ones(20))
    got = run(compiled, inputs, torch.ones(20))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_second_derivative_is_refused(device):
    a = torch.randn(3, 4, device=device, requires_grad=True)
    y = column_dot_fn(a, torch.ones_like(a))
    (da,) = torch.autograd.grad(y, a, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="column_dot has no second derivative"):
        da.sum().backward()


REFUSED = [
    ({"a": torch.zeros(3, 4).double()}, "a: expected dtype float32, bfloat16 or float16, got"),
    ({"b": torch.zeros(3, 4).int()}, "b: expected dtype float32, bfloat16 or float16, got"),
    ({"a": torch.zeros(()), "b": torch.zeros(())}, "a: expected at least one dimension"),
    ({"b": torch.zeros(4)}, r"b: expected shape \(3, 4\), got \(4,\)"),
    ({"b": torch.zeros(3, 4, device="meta")}, r"b: expected device .* \(that of a\), got meta"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    arguments = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)} | change
    for name, value in arguments.items():
        if value.device.type != "meta":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        column_dot_fn(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_llama_3_8b(dtype, device):
    check(make_inputs(dtype, 1025, MODEL_SHAPES["llama-3-8b"].mlp), device, config=None)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture(device):
    inputs = {name: t.to(device) for name, t in make_inputs(torch.bfloat16, 64, 96).items()}
    dy = torch.ones(96, device=device)
    expected = run(column_dot_fn, inputs, dy)
    with no_host_sync():
        run(column_dot_fn, inputs, dy)
    got = captured(lambda: run(column_dot_fn, inputs, dy))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
