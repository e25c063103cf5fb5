"""What a CPU does with few tokens: products with weights where they lie, or the path "dense"."""

import copy
from functools import partial

import pytest
import torch
from tiny import dense_gradients, mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack import _ext, functional, in_place, paths
from gatepack.functional import gate_lanes

pytestmark = pytest.mark.usefixtures("free_calls")
CPU = torch.device("cpu")


def gated(pattern="mixed", model_type="llama", dtype=torch.float64, **config):
    model = tiny_model(model_type, dtype)
    settings = {"noise": 0.0, "target": 0.5, "width_multiple": 4, **config}
    gates = gp.attach(model, gp.GateConfig(**settings))
    set_gates(gates, pattern)
    return model, gates


def paths_of(gates) -> dict[str, str]:
    return {name: gate.path for name, gate in gates.items()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_both_sides_of_the_threshold_equal_the_masked_model(model_type):
    model, gates = gated(model_type=model_type)
    masked = mask_dense(tiny_model(model_type), gates.split(gates.deterministic_values().double()))
    name, gate = next(item for item in gates.items() if item[1].kind == "channels")
    limit = int(paths.few_tokens(gates.width, CPU, gates.open_fraction(name)))
    model.train(), masked.train()
    for tokens, path in ((limit, "dense"), (limit + 1, "folded")):
        ids = token_ids(1, tokens)
        got, expected = model(ids).logits, masked(ids).logits
        assert gate.path == path
        assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
        upstream = torch.randn_like(got)
        (wanted,) = torch.autograd.grad(expected, gates.logits, upstream, retain_graph=True)
        (found,) = torch.autograd.grad(got, gates.logits, upstream)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_every_gate_has_its_own_path():
    model, gates = gated("open")
    gates.close("model.layers.1.mlp:channels", range(30))
    model(token_ids())
    chosen = paths_of(gates)
    assert chosen.pop("model.layers.1.mlp:channels") == "folded"
    assert set(chosen.values()) == {"dense"} and len(chosen) == 3


def test_closed_gates_get_no_gradient():
    model, gates = gated("mixed")
    model(token_ids(1, 2)).logits.sum().backward()
    assert set(paths_of(gates).values()) == {"dense"}
    closed = gates.deterministic_values() == 0
    assert closed.any() and not gates.value_grads()[closed].any()
    assert gates.value_grads()[~closed].any()


@pytest.fixture(params=["dense", "folded"])
def few_path(request, monkeypatch):
    """The path of few tokens in fp32: with gatepack._C that multiplies in place, or without."""
    if request.param == "dense":
        monkeypatch.setattr(in_place, "few_tokens", dict)
    elif _ext.backend().name == "torch":
        pytest.skip("gatepack._C could not be built")
    return request.param


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gatepack" in name or "lora" in name)
    return model


def test_weights_of_closed_units_may_hold_anything(few_path):
    """NaN in what a closed channel computes goes nowhere."""
    model, gates = gated("open", dtype=torch.float32)
    frozen(model)
    gates.close("model.layers.0.mlp:channels", [3])
    expected = model(token_ids(1, 3)).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = float("nan")
    got = model(token_ids(1, 3)).logits
    assert gates["model.layers.0.mlp:channels"].path == few_path
    assert torch.equal(got, expected)


def test_a_hook_on_the_down_projection_sees_its_input_without_gates():
    model, gates = gated("mixed")
    mlp, seen = model.model.layers[0].mlp, []
    expected = model(token_ids(1, 2)).logits
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert torch.allclose(model(token_ids(1, 2)).logits, expected)
    closed = gates.split(gates.deterministic_values())["model.layers.0.mlp:channels"] == 0
    assert seen[0].shape[-1] == 40 and seen[0][..., closed].all()


@pytest.mark.parametrize("pattern", ["single", "ragged"])
def test_a_cache_keeps_the_heads_that_filled_it(pattern):
    """Many tokens pack the heads, and so do the single ones that go on from their keys."""
    model, gates = gated(pattern)
    model.eval()
    ids = token_ids(1, 250)
    with torch.no_grad():
        whole = model(ids).logits
        for prompt, heads in ((240, "folded"), (3, "dense")):
            output = model(ids[:, :prompt], use_cache=True)
            assert gates["model.layers.0.self_attn:heads"].path == heads
            for i in range(prompt, prompt + 3):
                output = model(ids[:, i : i + 1], past_key_values=output.past_key_values)
                assert gates["model.layers.0.self_attn:heads"].path == heads
                assert gates["model.layers.0.mlp:channels"].path == "dense"
                torch.testing.assert_close(output.logits[:, 0], whole[:, i])


def test_backward_may_pack_again(monkeypatch, folded):
    """The same bits, and no packed weight among what is saved for backward."""
    found, saved = [], []
    for again in (False, True):
        monkeypatch.setattr(functional, "packs_again", lambda *_, again=again: again)
        model, gates = gated("mixed", dtype=torch.float32)
        weights, kept = {p.data_ptr() for p in model.parameters()}, []
        with torch.autograd.graph.saved_tensors_hooks(partial(_remember, kept), lambda t: t):
            logits = model(token_ids(1, 11)).logits
        matrices = (t for t in kept if t.dim() == 2 and t.data_ptr() not in weights)
        saved.append([t.shape for t in matrices if t.shape[0] not in (1, 11)])
        logits.square().sum().backward()
        found.append((logits.detach(), gates.logits.grad, *dense_gradients(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(saved[0]) >= 8 and saved[1] == []


def _remember(kept: list, tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor)
    return tensor


@pytest.mark.parametrize("tokens", [(3, 5), (), (0,)], ids=str)
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gate_lanes(dtype, lanes, tokens):
    x, z = torch.randn(*tokens, 6 * lanes).to(dtype).requires_grad_(), torch.rand(6)
    z[2] = 0
    z.requires_grad_()
    y = gate_lanes(x, z, lanes)
    upstream = torch.randn_like(y)
    dx, dz = torch.autograd.grad(y, (x, z), upstream)
    wide = z.detach().double().repeat_interleave(lanes)
    products = (upstream.double() * x.double()).reshape(-1, 6 * lanes)
    unit = products.sum(0).reshape(6, lanes).sum(1)
    unit[2] = 0
    torch.testing.assert_close(y.double(), (x.double() * wide).to(dtype).double())
    torch.testing.assert_close(dx.double(), (upstream.double() * wide).to(dtype).double())
    torch.testing.assert_close(dz.double(), unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["mixed", "open", "ragged", "single", "closed"])
@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2"])
def test_in_place_equals_the_masked_model(model_type, pattern):
    if _ext.backend().name == "torch":
        pytest.skip("gatepack._C could not be built")
    model, gates = gated(pattern, model_type, torch.float32)
    frozen(model)
    values = gates.split(gates.deterministic_values())
    masked = mask_dense(tiny_model(model_type, torch.float32), values)
    model.train(), masked.train()
    ids = token_ids(2, 3)
    got, expected = model(ids).logits, masked(ids).logits
    if model_type != "gpt2":  # whose weights lie the other way
        assert set(paths_of(gates).values()) == {"folded"}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(got)
    (wanted,) = torch.autograd.grad(expected, gates.logits, upstream)
    (found,) = torch.autograd.grad(got, gates.logits, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("pattern", ["mixed", "open"])
def test_an_mlp_in_place_is_its_linears(pattern, monkeypatch):
    if _ext.backend().name == "torch":
        pytest.skip("gatepack._C could not be built")
    model, gates = gated(pattern, dtype=torch.float32)
    mlp, results = frozen(model).model.layers[0].mlp, []
    whole = in_place.open_mlp
    ran = []
    monkeypatch.setattr("gatepack.mlp.open_mlp", lambda *a: ran.append(1) or whole(*a))
    x = torch.randn(2, 3, 48).requires_grad_()
    upstream = torch.randn(2, 3, 48)
    for _ in range(2):
        gates.draw()
        y = mlp(x)
        results.append((y, *torch.autograd.grad(y, (x, gates.logits), upstream)))
        mlp.up_proj.register_forward_hook(lambda *_: None)
    assert len(ran) == 1
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_adapters_see_gated_inputs(few_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj", "o_proj"], init_lora_weights=False)
    plain = peft.get_peft_model(tiny_model("llama", torch.float32), config)
    model = copy.deepcopy(plain)
    gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.5, width_multiple=4))
    gates.unfreeze()
    set_gates(gates, "mixed")
    values = gates.split(gates.deterministic_values())
    masked = mask_dense(plain.get_base_model(), values)
    got, expected = model(token_ids(1, 2)).logits, masked(token_ids(1, 2)).logits
    assert set(paths_of(gates).values()) == {few_path}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
