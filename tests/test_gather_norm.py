import pytest
import torch
import torch.nn.functional as F
from ops import DTYPES, GATES, captured, ids, make_gate, no_host_sync

from gatepack.kernels import Panel, gather_norm_fn, gather_norm_ref, open_set_ref
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64, poisoned_empty

T, D = 5, 37
SMALL = Panel(rows=4, columns=32, span=4, num_warps=1)
KINDS = ["rms", "layer"]


def make_inputs(dtype, t=T, d=D, gates=("fractional",) * 3, spare=0, affine=True, seed=0):
    """({"x", "weight", "bias", "z_0", ..}, settings) on the CPU; gates names a kind of gate for
    each consumer. Capacities are the counts plus `spare`."""
    random = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(t, d, generator=random).to(dtype)}
    if affine:
        inputs["weight"] = (1 + 0.3 * torch.randn(d, generator=random)).to(dtype)
        inputs["bias"] = torch.randn(d, generator=random).to(dtype)
    zs = [make_gate(kind, d, seed + m) for m, kind in enumerate(gates)]
    open_sets = [open_set_ref(z) for z in zs]
    capacities = [max(0, int(open_set[-1]) + spare) for open_set in open_sets]
    inputs |= {f"z_{m}": z for m, z in enumerate(zs)}
    return inputs, {"open_sets": open_sets, "capacities": capacities}


def on(device, inputs, settings):
    inputs = {name: t.to(device) for name, t in inputs.items()}
    return inputs, settings | {"open_sets": [o.to(device) for o in settings["open_sets"]]}


def upstream(inputs, settings, device, seed=7):
    random = torch.Generator().manual_seed(seed)
    x = inputs["x"]
    shapes = [(*x.shape[:-1], capacity) for capacity in settings["capacities"]]
    return [torch.randn(*shape, generator=random).to(device, x.dtype) for shape in shapes]


def run(fn, inputs, dys, **settings):
    """Every y_m and every gradient of fn, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    count = len(settings["open_sets"])
    gates = [leaves.get(f"z_{m}") for m in range(count)]
    vectors = {name: leaves.get(name) for name in ("weight", "bias")}
    ys = fn(leaves["x"], **vectors, gates=gates, **settings)
    dys = [dy.to(y) for dy, y in zip(dys, ys, strict=True)]
    grads = torch.autograd.grad(ys, leaves.values(), dys)
    results = {f"y_{m}": y.detach() for m, y in enumerate(ys)}
    return results | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check(inputs, settings, device, config=SMALL, dys=None, **more):
    """Every y_m and gradient, from poisoned memory, against fp64 and torch's own error."""
    inputs, settings = on(device, inputs, settings | more)
    dys = upstream(inputs, settings, device) if dys is None else dys
    wide = {name: t.double() for name, t in inputs.items()}
    truth = run(gather_norm_ref, wide, dys, **settings)
    theirs = run(gather_norm_ref, inputs, dys, **settings)
    with poisoned_empty():
        ours = run(gather_norm_fn, inputs, dys, config=config, **settings)
    for name, got in ours.items():
        factor = 2 if name.startswith("y") else 3
        dtype = inputs["x"].dtype
        assert_close_to_fp64(name, got, theirs[name], truth[name], factor, dtype=dtype)
    return ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_dtypes(dtype, kind, device):
    check(*make_inputs(dtype), device, kind=kind)


@pytest.mark.parametrize("gates", GATES)
def test_gates(gates, device):
    results = check(*make_inputs(torch.bfloat16, gates=(gates, "mixed")), device)
    closed = make_gate(gates, D, 0) == 0
    assert (results["dz_0"][closed] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("t", "d"), [(1, 1), (9, 16), (3, 70)])
def test_sizes(t, d, kind, device):
    check(*make_inputs(torch.float32, t, d), device, kind=kind)


@pytest.mark.parametrize(("count", "gated"), [(1, True), (2, False), (3, False)])
def test_consumers(count, gated, device):
    inputs, settings = make_inputs(torch.bfloat16, gates=("mixed",) * count)
    if not gated:
        inputs = {name: t for name, t in inputs.items() if not name.startswith("z")}
    check(inputs, settings, device)


def test_a_gate_for_one_of_the_consumers(device):
    inputs, settings = make_inputs(torch.float32, gates=("mixed", "fractional"))
    del inputs["z_0"]
    check(inputs, settings, device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",)], ids=str)
def test_optional_vectors(missing, kind, device):
    inputs, settings = make_inputs(torch.float32, gates=("fractional",))
    for name in missing:
        del inputs[name]
    check(inputs, settings, device, kind=kind)


@pytest.mark.parametrize("spare", [-100, -3, 5, 40])
def test_capacities(spare, device):
    """None, less than the open columns, more than them, and more than all columns."""
    check(*make_inputs(torch.float32, gates=("mixed", "one"), spare=spare), device)


def test_default_config(device):
    check(*make_inputs(torch.bfloat16, 11, 96), device, config=None)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every_second"])
def test_strides(layout, device):
    inputs, settings = make_inputs(torch.bfloat16, gates=("fractional", "mixed"))
    x = inputs["x"]
    inputs["x"] = {
        "transposed": x.t().contiguous().t(),
        "sliced": F.pad(x, (3, 5))[:, 3:-5],
        "every_second": x.repeat_interleave(2, dim=-1)[:, ::2],
    }[layout]
    for name in ("weight", "z_0"):
        inputs[name] = inputs[name].repeat_interleave(2)[::2]
    dys = [torch.randn(c).to(device).expand(T, c) for c in settings["capacities"]]
    check(inputs, settings, device, dys=dys)


@pytest.mark.parametrize("shape", [(D,), (2, 3, D)], ids=ids)
def test_leading_dimensions(shape, device):
    inputs, settings = make_inputs(torch.float32, gates=("mixed",))
    inputs["x"] = torch.randn(*shape)
    assert check(inputs, settings, device)["dx"].shape == shape


@pytest.mark.parametrize("sizes", [{"t": 0}, {"t": 0, "d": 0}], ids=ids)
def test_zero_sizes(sizes, device):
    check(*make_inputs(torch.float32, spare=2, **sizes), device)


def test_no_columns_at_all(device):
    """torch's layer_norm refuses this; y is all padding."""
    inputs, settings = on(device, *make_inputs(torch.float32, d=0, spare=2))
    with poisoned_empty():
        ours = run(gather_norm_fn, inputs, upstream(inputs, settings, device), **settings)
    assert ours["y_0"].shape == (T, 2) and (ours["y_0"] == 0).all()
    assert ours["dx"].shape == (T, 0) and ours["dz_0"].shape == (0,)


def test_all_open_is_rms_norm_of_transformers(device):
    norms = pytest.importorskip("transformers.models.llama.modeling_llama")
    inputs, settings = on(device, *make_inputs(torch.bfloat16, gates=("open",)))
    norm = norms.LlamaRMSNorm(D, eps=1e-5).to(device, torch.bfloat16)
    norm.weight.data.copy_(inputs["weight"])
    (y,) = gather_norm_fn(inputs["x"], inputs["weight"], eps=1e-5, **settings)
    truth = norm.double()(inputs["x"].double())
    assert_close_to_fp64("y", y, norm.bfloat16()(inputs["x"]), truth)


def test_all_open_is_layer_norm(device):
    inputs, settings = on(device, *make_inputs(torch.float32, gates=("open",)))
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    (y,) = gather_norm_fn(x, weight, bias, kind="layer", eps=1e-5, **settings)
    torch.testing.assert_close(y, F.layer_norm(x, (D,), weight, bias, 1e-5))


def test_a_large_mean_does_not_cancel_the_layer_norm(device):
    inputs, settings = make_inputs(torch.float32, gates=("mixed",))
    inputs["x"] += 1000
    check(inputs, settings, device, kind="layer")


def test_nan_beyond_the_count_and_in_closed_vectors_has_no_effect(device):
    inputs, settings = make_inputs(torch.float32, spare=4, gates=("fractional",))
    dys = upstream(inputs, settings, "cpu")
    clean = check(inputs, settings, device, dys=[dy.to(device) for dy in dys])
    closed = inputs["z_0"] == 0
    inputs["weight"][closed] = inputs["bias"][closed] = float("nan")
    dys[0][:, int(settings["open_sets"][0][-1]) :] = float("nan")
    inputs, settings = on(device, inputs, settings)
    dirty = run(gather_norm_fn, inputs, [dy.to(device) for dy in dys], config=SMALL, **settings)
    closed = closed.to(device)
    for name in ("y_0", "dweight", "dbias"):
        assert torch.equal(clean[name], dirty[name]), name
    assert torch.equal(clean["dz_0"][~closed], dirty["dz_0"][~closed])


def test_a_nan_token_stays_in_its_row(device):
    inputs, settings = on(device, *make_inputs(torch.float32, spare=2))
    inputs["x"][2] = float("nan")
    y = gather_norm_fn(inputs["x"], **settings)[0]
    assert y[2, :-2].isnan().all() and not y[:2].isnan().any() and (y[:, -2:] == 0).all()


@pytest.mark.parametrize("name", ["x", "weight", "bias", "z_0", "z_2"])
def test_one_gradient_at_a_time(name, device):
    inputs, settings = on(device, *make_inputs(torch.float32))
    dys = upstream(inputs, settings, device)
    everything = run(gather_norm_fn, inputs, dys, **settings)
    inputs[name].requires_grad_()
    gates = [inputs[f"z_{m}"] for m in range(3)]
    vectors = [inputs[name] for name in ("x", "weight", "bias")]
    ys = gather_norm_fn(*vectors, gates=gates, **settings)
    (alone,) = torch.autograd.grad(ys, [inputs[name]], dys)
    assert torch.equal(alone, everything[f"d{name}"])


def test_outputs_that_are_not_used(device):
    inputs, settings = on(device, *make_inputs(torch.float32))
    dys = upstream(inputs, settings, device)
    zeros = [torch.zeros_like(dys[0]), dys[1], torch.zeros_like(dys[2])]
    expected = run(gather_norm_fn, inputs, zeros, **settings)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    gates = [leaves[f"z_{m}"] for m in range(3)]
    ys = gather_norm_fn(leaves["x"], leaves["weight"], leaves["bias"], gates=gates, **settings)
    grads = torch.autograd.grad(ys[1], leaves.values(), dys[1], allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        if name in ("z_0", "z_2"):
            assert grad is None
        else:
            assert torch.equal(grad, expected[f"d{name}"]), name


def test_deterministic(device):
    inputs, settings = on(device, *make_inputs(torch.bfloat16, t=9))
    dys = upstream(inputs, settings, device)
    first, second = (run(gather_norm_fn, inputs, dys, config=SMALL, **settings) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_opcheck(device):
    inputs, settings = on(device, *make_inputs(torch.float32, gates=("mixed", "fractional")))
    x, weight, bias, *gates = inputs.values()
    open_sets, capacities = settings["open_sets"], settings["capacities"]
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    gate_leaves = [z.clone().requires_grad_() for z in gates]
    forward = torch.ops.gatepack.gather_norm.default
    arguments = (*leaves, open_sets, gate_leaves, capacities, "rms", 1e-6, None)
    torch.library.opcheck(forward, arguments)
    ys, mean, rstd = forward(x, weight, bias, open_sets, gates, capacities, "rms", 1e-6, None)
    arguments = ([torch.randn_like(y) for y in ys], x, weight, bias, mean, rstd, open_sets, gates)
    arguments += ("rms", True, True, True, [True, True], None)
    torch.library.opcheck(torch.ops.gatepack.gather_norm_backward.default, arguments)


def test_compiles_into_one_graph(device):
    inputs, settings = on(device, *make_inputs(torch.bfloat16))
    dys = upstream(inputs, settings, device)
    compiled = torch.compile(gather_norm_fn, fullgraph=True, backend="aot_eager")
    expected = run(gather_norm_fn, inputs, dys, config=SMALL, **settings)
    got = run(compiled, inputs, dys, config=SMALL, **settings)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_second_derivative_is_refused(device):
    inputs, settings = on(device, *make_inputs(torch.float32, gates=("mixed",)))
    x = inputs["x"].requires_grad_()
    (y,) = gather_norm_fn(x, **settings)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="gather_norm has no second derivative"):
        dx.sum().backward()


OPEN = torch.tensor([0, 2, 1, 3, 2], dtype=torch.int32)
REFUSED = [
    ({"x": torch.zeros(3, 4).double()}, "x: expected dtype float32, bfloat16 or float16, got"),
    ({"x": torch.zeros(())}, "x: expected at least one dimension, got a scalar"),
    ({"weight": torch.zeros(3)}, r"weight: expected shape \(4,\), got \(3,\)"),
    ({"bias": torch.zeros(4).half()}, "bias: expected dtype torch.float32, got torch.float16"),
    ({"open_sets": []}, "open_sets: expected 1 to 3 of them, got 0"),
    ({"open_sets": [OPEN] * 4, "capacities": [2] * 4}, "open_sets: expected 1 to 3 .* got 4"),
    ({"open_sets": [OPEN.long()]}, r"open_sets\[0\]: expected dtype torch.int32, got"),
    ({"capacities": [2, 2]}, "capacities: expected 1 of them, as open_sets, got 2"),
    ({"capacities": [-1]}, r"capacities\[0\]: expected at least 0, got -1"),
    ({"gates": [None, None]}, "gates: expected 1 of them, as open_sets, got 2"),
    ({"gates": [torch.ones(3)]}, r"gates\[0\]: expected shape \(4,\), got"),
    ({"gates": [torch.ones(4, device="meta")]}, r"gates\[0\]: expected device .* got meta"),
    ({"kind": "batch"}, "kind: expected one of .*, got 'batch'"),
    ({"eps": -1.0}, "eps: expected a number >= 0, got -1.0"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change, message, device):
    def place(value):
        if isinstance(value, list):
            return [place(item) for item in value]
        is_local = isinstance(value, torch.Tensor) and value.device.type != "meta"
        return value.to(device) if is_local else value

    arguments = {"x": torch.zeros(3, 4), "open_sets": [OPEN], "capacities": [2]} | change
    with pytest.raises(ValueError, match=message):
        gather_norm_fn(**{name: place(value) for name, value in arguments.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_llama_3_8b(dtype, kind, device):
    inputs, settings = make_inputs(dtype, 1025, MODEL_SHAPES["llama-3-8b"].hidden)
    check(inputs, settings, device, config=None, kind=kind)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture(device):
    inputs, settings = on(device, *make_inputs(torch.bfloat16, 64, 96))
    dys = upstream(inputs, settings, device)
    expected = run(gather_norm_fn, inputs, dys, **settings)
    with no_host_sync():
        run(gather_norm_fn, inputs, dys, **settings)
    got = captured(lambda: run(gather_norm_fn, inputs, dys, **settings))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
