import pytest
import torch
import torch.nn.functional as F
from attention import (
    KV_HEADS,
    SMALL_TILES,
    D,
    H,
    S,
    check,
    make_inputs,
    make_varlen,
    mostly_slow,
    padding,
    upstream,
)
from ops import DTYPES, GATES, captured, ids, no_host_sync, run, to

from gatepack.kernels import AttentionTile, GatedAttentionConfig, gated_attention_fn
from gatepack.testing import MODEL_SHAPES, assert_close_to_fp64


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", mostly_slow(DTYPES), ids=ids)
def test_gates(dtype, gates, device):
    check(make_inputs(dtype, heads=4, kv_heads=2, z=gates), device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=ids)
def test_low_precision(dtype, device):
    check(make_inputs(dtype, 35, z=torch.tensor([0.3, 0.8])), device)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (16, 16), (1, 33), (21, 7), (7, 40)])
def test_queries_and_keys(queries, keys, causal, device):
    inputs = make_inputs(torch.float32, queries, keys, heads=1)
    check(inputs, device, causal=causal, cancels=True)


@pytest.mark.parametrize("dtype", mostly_slow([torch.bfloat16, torch.float32]), ids=ids)
@pytest.mark.parametrize(("lanes", "v_lanes"), [(1, 1), (40, 40), (16, 24), (80, 8)])
def test_head_dims(lanes, v_lanes, dtype, device):
    check(make_inputs(dtype, lanes=lanes, v_lanes=v_lanes, heads=1), device)


@pytest.mark.parametrize(
    ("kv_heads", "z"),
    [
        (2, [0.3, 0.0, 1.0, 0.0, 0.0, 0.0]),  # a whole group closed
        (2, [0.0, 0.0, 0.7, 0.5, 0.9, 1.0]),
        (1, [0.0, 0.4, 0.0, 1.0, 0.0, 0.2]),
        (6, [1.0, 0.0, 0.1, 0.0, 0.6, 1.0]),
        (3, None),
    ],
    ids=["2", "2 ragged", "1", "6", "no gate"],
)
def test_groups_of_query_heads(kv_heads, z, device):
    gate = torch.ones(6) if z is None else torch.tensor(z)
    inputs = make_inputs(torch.float32, 5, heads=6, kv_heads=kv_heads, z=gate)
    ours = check(inputs, device, cancels=True)
    closed_groups = (gate == 0).view(kv_heads, -1).all(1)
    assert (ours["dk"][..., closed_groups, :] == 0).all()
    assert (ours["dv"][..., closed_groups, :] == 0).all()
    if z is None:
        del inputs["z"]
        ungated = run(gated_attention_fn, to(inputs, device), upstream(inputs), config=SMALL_TILES)
        for name, got in ungated.items():
            assert torch.equal(got, ours[name]), name


@pytest.mark.parametrize("dtype", mostly_slow([torch.bfloat16, torch.float32]), ids=ids)
@pytest.mark.parametrize("layout", ["heads_first", "sliced", "every_second", "one_projection"])
def test_strides(layout, dtype, device):
    inputs = make_inputs(dtype, 5, batch=2, kv_heads=2, z=torch.tensor([0.5, 1.0]))
    do = upstream(inputs)

    def change(x):
        if layout == "heads_first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return F.pad(x, (3, 5))[..., 3:-5]
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    names = ("q", "k", "v")
    if layout == "one_projection":
        inputs |= zip(names, torch.cat([inputs[n] for n in names], 2).split(2, 2), strict=True)
    else:
        inputs |= {name: change(inputs[name]) for name in names}
        do = change(do)
    results = check(inputs, device, do=do)
    if layout == "heads_first":
        assert results["dq"].stride() == inputs["q"].stride()


def test_expanded_inputs(device):
    inputs = make_inputs(torch.float32, 5, batch=2, kv_heads=2)
    inputs["k"] = inputs["k"][:1, :, :1].expand(2, 5, 2, D)
    check(inputs, device, do=upstream(inputs)[:1, :1, :1].expand(2, 5, H, D), cancels=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_all_open_is_the_attention_of_torch(dtype, device):
    inputs = to(make_inputs(dtype, kv_heads=H, z="open"), device)
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    got = gated_attention_fn(**inputs, config=SMALL_TILES)
    assert torch.equal(got, gated_attention_fn(**inputs | {"z": None}, config=SMALL_TILES))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert_close_to_fp64("o", got, theirs, truth.transpose(1, 2))


def test_scale(device):
    check(make_inputs(torch.float32), device, scale=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_large_scores(dtype, device):
    inputs = make_inputs(dtype)
    inputs["q"] = inputs["q"] * 100
    check(inputs, device, cancels=True, large_scores=True)


def test_tiny_gates_keep_their_gradient_in_fp16(device):
    inputs = make_inputs(torch.float16)
    inputs["z"] = inputs["z"] * 1e-6
    check(inputs, device)


def test_tiny_frozen_gates_keep_the_other_gradients_in_fp16(device):
    inputs = to(make_inputs(torch.float16), device)
    do, z = 100 * upstream(inputs).to(device), 1e-6 * inputs.pop("z")
    expected = run(gated_attention_fn, inputs | {"z": z}, do, config=SMALL_TILES)
    frozen = run(gated_attention_fn, inputs, do, z=z, config=SMALL_TILES)
    for name, got in frozen.items():
        assert torch.equal(got, expected[name]), name
    for name in ("q", "k"):
        alone = {name: inputs[name]}
        others = {n: t for n, t in inputs.items() if n != name} | {"z": z}
        (got,) = list(run(gated_attention_fn, alone, do, config=SMALL_TILES, **others).values())[1:]
        assert torch.equal(got, expected[f"d{name}"]), name


def test_default_tiles(device):
    check(make_inputs(torch.bfloat16, 40, 40), device, config=None)


@pytest.mark.parametrize(
    "tiles",
    [((16, 32, 1, 1), (32, 16, 1, 1), (16, 64, 1, 1)), ((64, 16, 1, 1),) * 3],
    ids=["wide", "tall"],
)
def test_tiles(tiles, device):
    config = GatedAttentionConfig(*(AttentionTile(*tile) for tile in tiles))
    check(make_inputs(torch.float32, 40, 45, heads=1), device, config=config)


def test_closed_heads_are_never_read(device):
    z = torch.tensor([0.5, 0.0, 0.0, 0.0])
    inputs = make_inputs(torch.float32, heads=4, kv_heads=2, z=z)
    do = upstream(inputs)
    clean = run(gated_attention_fn, to(inputs, device), do.to(device), config=SMALL_TILES)
    inputs["q"][:, :, 1:] = float("nan")
    inputs["k"][:, :, 1:] = float("nan")
    inputs["v"][:, :, 1:] = float("nan")
    do[:, :, 1:] = float("nan")
    dirty = run(gated_attention_fn, to(inputs, device), do.to(device), config=SMALL_TILES)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


def test_a_nan_query_stays_in_its_row_and_head(device):
    inputs = to(make_inputs(torch.float32, z="open"), device)
    inputs["q"][0, 2, 1] = float("nan")
    is_nan = gated_attention_fn(**inputs, config=SMALL_TILES).isnan()
    assert is_nan[0, 2, 1].all() and is_nan.sum() == D


def test_a_nan_gate_reaches_the_output(device):
    inputs = to(make_inputs(torch.float32, z=torch.tensor([0.0, float("nan")])), device)
    is_nan = gated_attention_fn(**inputs, config=SMALL_TILES).isnan()
    assert is_nan[:, :, 1].all() and is_nan.sum() == S * D


def test_deterministic(device):
    inputs = to(make_inputs(torch.bfloat16), device)
    first, second = (run(gated_attention_fn, inputs, upstream(inputs)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 0, "keys": 5},
        {"keys": 0},
        {"batch": 0},
        {"heads": 0},
        {"heads": 0, "kv_heads": 0},
    ],
    ids=ids,
)
def test_zero_sizes(sizes, device):
    check(make_inputs(torch.float32, **sizes), device)


@pytest.mark.parametrize("name", ["q", "k", "v", "z"])
def test_one_gradient_at_a_time(name, device):
    inputs = to(make_inputs(torch.float32, queries=5), device)
    do = upstream(inputs).to(device)
    everything = run(gated_attention_fn, inputs, do)
    inputs[name].requires_grad_()
    (alone,) = torch.autograd.grad(gated_attention_fn(**inputs), [inputs[name]], do)
    assert torch.equal(alone, everything[f"d{name}"])


@pytest.mark.parametrize("kind", mostly_slow(["varlen", "dense", "keep_h", "key_mask"]))
def test_opcheck(kind, device):
    dtype = torch.float16 if kind == "keep_h" else torch.float32
    inputs, cuts = to(make_inputs(dtype, queries=3), device), (None,) * 4
    mask = padding("right", 1, 5)[:, :3].to(device) if kind == "key_mask" else None
    if kind == "varlen":
        inputs, cuts = make_varlen(dtype, (1, 2), (1, 2), device)
        inputs, cuts = to(inputs, device), tuple(cuts.values())
    q, k, v, z = inputs.values()
    settings, keep_h = (True, None, None), kind == "keep_h"
    leaves = [t.clone().requires_grad_() for t in (q, k, v, z)]
    forward, backward = (
        getattr(torch.ops.gatepack, name).default
        for name in ("gated_attention", "gated_attention_backward")
    )
    torch.library.opcheck(forward, (*leaves, mask, *cuts, *settings, keep_h, []))
    o, h, lse, opened = forward(q, k, v, z, mask, *cuts, *settings, keep_h, [])
    saved = (torch.randn_like(o), q, k, v, h if keep_h else o, lse, opened, z, mask, *cuts)
    torch.library.opcheck(backward, (*saved, *settings, not keep_h, [True] * 4, []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
def test_compiles_into_one_graph(dtype, device):
    inputs = to(make_inputs(dtype, queries=5), device)
    do = upstream(inputs).to(device)
    compiled = torch.compile(gated_attention_fn, fullgraph=True, backend="aot_eager")
    expected = run(gated_attention_fn, inputs, do, config=SMALL_TILES)
    got = run(compiled, inputs, do, config=SMALL_TILES)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_second_derivative_is_refused(device):
    inputs = to(make_inputs(torch.float32, queries=2), device)
    q = inputs["q"].requires_grad_()
    o = gated_attention_fn(**inputs)
    (dq,) = torch.autograd.grad(o, q, torch.ones_like(o).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="gated_attention has no second derivative"):
        dq.sum().backward()


CU = torch.tensor([0, S], dtype=torch.int32)
REFUSED = [
    ({"q": torch.zeros(1, S, H, D).double()}, "q: expected dtype float32, bfloat16 or float16"),
    ({"q": torch.zeros(S, H, D)}, r"q: expected 4 dimensions as q \[B, S, H, D\], got 3"),
    ({"k": torch.zeros(S, KV_HEADS, D)}, r"k: expected 4 dimensions as q \[B, S, H, D\], got 3"),
    ({"q": torch.zeros(1, S, H, 0)}, "q: expected a head_dim of 1 to 256, got 0"),
    ({"v": torch.zeros(1, S, KV_HEADS, 257)}, "v: expected a head_dim of 1 to 256, got 257"),
    ({"k": torch.zeros(1, S, 3, D)}, "k: expected a number of heads that divides 2, got 3"),
    ({"k": torch.zeros(1, S, 0, D)}, "k: expected a number of heads that divides 2, got 0"),
    ({"k": torch.zeros(1, S, KV_HEADS, D + 1)}, rf"k: expected shape \(1, {S}, 1, {D}\), got"),
    ({"v": torch.zeros(1, S + 1, KV_HEADS, D)}, rf"v: expected shape \(1, {S}, 1, {D}\), got"),
    ({"v": torch.zeros(1, S, KV_HEADS, D).half()}, "v: expected dtype torch.float32, got"),
    ({"z": torch.ones(H + 1)}, r"z: expected shape \(2,\), got \(3,\)"),
    ({"z": torch.ones(H).half()}, "z: expected dtype torch.float32, got torch.float16"),
    ({"z": torch.ones(H, device="meta")}, r"z: expected device .* \(that of q\), got meta"),
    ({"key_mask": torch.ones(1, S + 1).bool()}, rf"key_mask: expected shape \(1, {S}\), got"),
    ({"key_mask": torch.ones(1, S)}, "key_mask: expected dtype torch.bool, got torch.float32"),
    ({"cu_seqlens_k": CU}, "cu_seqlens_q: expected a tensor beside the other cu_seqlens, got None"),
    ({"max_seqlen_q": 3}, "max_seqlen_q: expected None without cu_seqlens, got 3"),
    ({"scale": 0.0}, "scale: expected a positive number, got 0.0"),
    ({"scale": -1.0}, "scale: expected a positive number, got -1.0"),
    ({"window": 0}, "window: expected at least 1, got 0"),
    ({"window": 3, "causal": False}, "window: expected None without causal, got 3"),
]
REFUSED_VARLEN = [
    ({"q": torch.zeros(1, S, H, D)}, r"q: expected 3 dimensions as q \[T, H, D\] with cu_seqlens"),
    ({"cu_seqlens_k": None}, "cu_seqlens_k: expected a tensor beside the other cu_seqlens, got"),
    ({"cu_seqlens_q": CU[:, None]}, r"cu_seqlens_q: expected shape \(B \+ 1,\), got \(2, 1\)"),
    ({"cu_seqlens_q": CU.long()}, "cu_seqlens_q: expected dtype torch.int32, got torch.int64"),
    ({"cu_seqlens_k": CU[:1]}, r"cu_seqlens_k: expected shape \(2,\), got \(1,\)"),
    ({"key_mask": torch.ones(1, S).bool()}, "key_mask: expected None beside cu_seqlens, got a"),
    ({"max_seqlen_k": None}, "max_seqlen_k: expected the longest length, got None"),
]


@pytest.mark.parametrize(
    ("varlen", "change", "message"),
    [(False, *case) for case in REFUSED] + [(True, *case) for case in REFUSED_VARLEN],
    ids=[message for _, message in REFUSED + REFUSED_VARLEN],
)
def test_refusals(varlen, change, message, device):
    arguments, cuts = make_inputs(torch.float32), {}
    if varlen:
        arguments, cuts = make_varlen(torch.float32, (S,), (S,), device)
    arguments = to(arguments, device) | cuts
    for name, value in change.items():
        is_local = isinstance(value, torch.Tensor) and value.device.type != "meta"
        arguments[name] = value.to(device) if is_local else value
    with pytest.raises(ValueError, match=message):
        gated_attention_fn(**arguments)


def test_config_refusals():
    with pytest.raises(ValueError, match="block_q: expected a power of two >= 16, got 24"):
        AttentionTile(24, 16, 4, 1)
    with pytest.raises(ValueError, match="block_k: expected a power of two >= 16, got 8"):
        AttentionTile(16, 8, 4, 1)
    with pytest.raises(ValueError, match="num_warps: expected 1, 2, 4, 8 or 16, got 3"):
        AttentionTile(16, 16, 3, 1)
    with pytest.raises(ValueError, match="num_stages: expected at least 1, got 0"):
        AttentionTile(16, 16, 4, 0)
    with pytest.raises(ValueError, match="config: expected 12 integers .*, got 2"):
        GatedAttentionConfig.from_ints([16, 16])
    assert GatedAttentionConfig.from_ints(SMALL_TILES.to_ints()) == SMALL_TILES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_heads_of_smollm2(dtype, device):
    shape = MODEL_SHAPES["smollm2-135m"]
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "lanes": shape.head_dim}
    check(make_inputs(dtype, 65, **heads), device, config=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("mask", ["causal", "full", "left", "window"])
@pytest.mark.parametrize("model", ["llama-3-8b", "smollm2-135m", "minilm-l6"])
def test_models(model, mask, dtype, device):
    shape = MODEL_SHAPES[model]
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "lanes": shape.head_dim}
    settings = {
        "causal": {},
        "full": {"causal": False},
        "left": {"key_mask": padding("left", 2, 1025).to(device)},
        "window": {"window": 300},
    }[mask]
    check(make_inputs(dtype, 1025, batch=2, **heads), device, config=None, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("lanes", [80, 96, 256])
def test_other_head_dims(lanes, device):
    check(make_inputs(torch.bfloat16, 300, lanes=lanes), device, config=None)


@pytest.mark.gpu
def test_no_host_synchronisation(device):
    inputs = to(make_inputs(torch.bfloat16, 100), device)
    mask, do = padding("left", 1, 100).to(device), upstream(inputs).to(device)
    run(gated_attention_fn, inputs, do, key_mask=mask)
    with no_host_sync():
        run(gated_attention_fn, inputs, do, key_mask=mask)


@pytest.mark.gpu
def test_captured_into_a_graph(device):
    inputs = to(make_inputs(torch.bfloat16, 100), device)
    do = upstream(inputs).to(device)
    expected = run(gated_attention_fn, inputs, do)
    got = captured(lambda: run(gated_attention_fn, inputs, do))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
