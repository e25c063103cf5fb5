"""Gated models on the Triton path, under the interpreter: equal to the masked dense model."""

import copy

import pytest
import torch
from ops import no_host_sync, warm_up
from tiny import dense_gradients, mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack import mlp, modules
from gatepack.attention import attention
from gatepack.samples import Sample

pytest.importorskip("triton")

CONFIG = gp.GateConfig(noise=0.0, target=0.5, width_multiple=4)


@pytest.fixture(autouse=True)
def forced_triton(monkeypatch):
    monkeypatch.setenv("GATEPACK_BACKEND", "triton")


@pytest.fixture
def no_counting(monkeypatch):
    """Fails where an open set is asked for on the host: it would have to wait for the device."""

    def refuse(sample):
        raise AssertionError("an open set was counted on the host")

    monkeypatch.setattr(Sample, "_open", property(refuse))


@pytest.fixture
def op_calls(monkeypatch):
    """Counts the calls of the Triton ops, of a linear and of a whole MLP."""
    calls = []

    def count(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or real(*args))

    count(modules, "_triton")
    count(mlp, "_fused")
    return calls


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("pattern", ["open", "closed", "single", "mixed", "ragged"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_equals_masked_dense_model(model_type, pattern, op_calls):
    model = tiny_model(model_type, torch.float32, num_hidden_layers=1)
    reference = copy.deepcopy(model).double()
    gates = gp.attach(model, CONFIG)
    set_gates(gates, pattern)
    ids = token_ids(1, 5)
    values = gates.split(gates.deterministic_values().double())
    expected = mask_dense(reference, values)(ids).logits
    got = model.train()(ids).logits
    ops = 4 + 1 if model_type == "llama" else 4
    assert len(op_calls) == ops * len(gates) // 2
    assert relative(got, expected) < 1e-5
    upstream = torch.randn_like(got)
    (gate_grad,) = torch.autograd.grad(expected, gates.logits, upstream.double(), retain_graph=True)
    got.backward(upstream)
    assert relative(gates.logits.grad, gate_grad) < 1e-4 or not gate_grad.any()
    expected.backward(upstream.double())
    expected_grads = dense_gradients(reference)
    for name, grad in dense_gradients(model).items():
        error = (grad - expected_grads[name]).abs().max()
        assert error <= 1e-4 * expected_grads[name].abs().max() + 1e-8, name


def test_lora_is_part_of_the_op(op_calls):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]
    )
    model = peft.get_peft_model(tiny_model("llama", torch.float32, num_hidden_layers=1), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    reference = copy.deepcopy(model).double()
    gates = gp.attach(model, CONFIG)
    gates.unfreeze()
    set_gates(gates, "mixed")
    ids = token_ids(1, 5)
    values = gates.split(gates.deterministic_values().detach().double())
    expected = mask_dense(reference.get_base_model(), values)(ids).logits
    got = model.train()(ids).logits
    assert len(op_calls) == 4 + 1
    assert relative(got, expected) < 1e-5
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream.double())
    expected_grads = dense_gradients(reference)
    assert any("lora_A" in name for name in expected_grads)
    for name, grad in dense_gradients(model).items():
        error = (grad - expected_grads[name]).abs().max()
        assert error <= 1e-4 * expected_grads[name].abs().max() + 1e-8, name


def masked_pair(device, pattern="mixed", attention="sdpa", **overrides):
    """A gated llama, and its dense fp64 twin masked by hooks with the same gate values."""
    model = tiny_model("llama", torch.float32, num_hidden_layers=1, **overrides).to(device)
    reference = copy.deepcopy(model).double()
    gates = gp.attach(model, CONFIG)
    model.set_attn_implementation(attention)
    set_gates(gates, pattern)
    mask_dense(reference, gates.split(gates.deterministic_values().detach().double()))
    return model, reference, gates


@pytest.mark.parametrize(
    ("pattern", "padding"),
    [("open", "none"), ("single", "none"), ("closed", "none")]
    + [("ragged", padding) for padding in ("none", "left", "right")],
)
def test_attention_skips_closed_heads(padding, pattern, device, no_counting, monkeypatch):
    from gatepack import kernels

    calls = []
    real = kernels.gated_attention_fn
    monkeypatch.setattr(
        kernels, "gated_attention_fn", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    model, reference, gates = masked_pair(device, pattern, "gatepack")
    ids = token_ids(2, 7).to(device)
    attend = torch.ones_like(ids)
    if padding != "none":
        attend[1, slice(0, 3) if padding == "left" else slice(4, 7)] = 0
    expected = reference(ids, attention_mask=attend).logits
    got = model(ids, attention_mask=attend).logits
    assert len(calls) == 1
    running = next(gate for _, gate in gates.items() if gate.kind == "heads").running()
    assert torch.equal(calls[0][3], running)
    kept = attend.bool()
    assert relative(got[kept], expected[kept]) < 1e-5
    upstream = torch.randn_like(got) * attend[..., None]
    got.backward(upstream)
    expected.backward(upstream.double())
    expected_grads = dense_gradients(reference)
    for name, grad in dense_gradients(model).items():
        error = (grad - expected_grads[name]).abs().max()
        assert error <= 1e-4 * expected_grads[name].abs().max() + 1e-8, name


def test_attention_against_a_cache(device):
    model, reference, _ = masked_pair(device, "mixed", "gatepack")
    ids = token_ids(1, 6).to(device)
    expected = reference.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_attention_refuses_what_it_would_ignore(device):
    model, _, _ = masked_pair(device, "mixed", "gatepack", attention_dropout=0.1)
    ids = token_ids(1, 6).to(device)
    with pytest.raises(ValueError, match="dropout: expected 0 .* got 0.1"):
        model.train()(ids)
    with pytest.raises(ValueError, match="use a dynamic cache"):
        model.eval().generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[B, Skv\]"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6, device=device))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    with pytest.raises(ValueError, match="without sliding windows or packed sequences"):
        model(ids, position_ids=packed, use_cache=False)
    q, kv = torch.randn(1, 6, 4, 8, device=device), torch.randn(1, 2, 4, 8, device=device)
    module = model.model.layers[0].self_attn
    for name in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"{name}: expected None with attn_implementation"):
            attention(module, q, kv, kv, None, **{name: 50.0})
    assert attention(module, q, kv, kv, None, softcap=None)[0].shape == (1, 4, 6, 8)


def test_a_training_step_never_counts_on_the_host(device, no_counting):
    model, _, gates = masked_pair(device, "mixed", "gatepack")
    gates.config = gp.GateConfig(noise=0.1, target=0.5, width_multiple=4)
    gates.estimator = type(gates.estimator)(sigma=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    values = []
    for step in range(3):
        out = model.train()(token_ids(1, 5).to(device), labels=token_ids(1, 5).to(device))
        (out.loss + gates.penalty()).backward()
        values.append(gates.sample().flat.detach().clone())
        optimizer.step()
        gates.step()
        assert int(gates.draws) == step + 1 and gates.controller.steps == step + 1
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    gates.draws.fill_(0)
    model(token_ids(1, 5).to(device))
    assert int(gates.draws) == 1


def lora_pair(device, adapters=("default",), **lora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    names = ["q_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names, **lora)
    model = tiny_model("llama", torch.float32, num_hidden_layers=1).to(device)
    model = peft.get_peft_model(model, config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    reference = copy.deepcopy(model)
    gates = gp.attach(model, CONFIG)
    gates.unfreeze()
    set_gates(gates, "mixed")
    values = gates.split(gates.deterministic_values().detach())
    mask_dense(reference.get_base_model(), values)
    return model, reference, gates


@pytest.mark.parametrize(
    ("adapters", "lora"),
    [(("default", "second"), {}), (("default",), {"use_dora": True})],
    ids=["two adapters", "dora"],
)
def test_adapters_beside_the_op(adapters, lora, device, no_counting):
    model, reference, gates = lora_pair(device, adapters, **lora)
    ids = token_ids(1, 5).to(device)
    got, expected = model(ids).logits, reference(ids).logits
    assert relative(got, expected) < 1e-5
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream)
    for name, grad in dense_gradients(reference).items():
        error = (dense_gradients(model)[name] - grad).abs().max()
        assert error <= 1e-4 * grad.abs().max() + 1e-8, name


def test_dropout_of_an_adapter_runs(device, no_counting):
    model, reference, _ = lora_pair(device, lora_dropout=0.5)
    ids = token_ids(1, 5).to(device)
    assert relative(model.eval()(ids).logits, reference.eval()(ids).logits) < 1e-5
    first, second = model.train()(ids).logits, model(ids).logits
    assert not torch.equal(first, second)


def test_autocast(device, no_counting):
    model, reference, _ = lora_pair(device)
    ids = token_ids(1, 5).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        got, theirs = model(ids).logits, reference(ids).logits
    truth = reference.double()(ids).logits
    assert got.dtype == theirs.dtype
    assert (got - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.gpu
def test_a_training_step_captures_into_a_graph(device):
    model, _, gates = masked_pair(device, "mixed", "gatepack", num_hidden_layers=2)
    gates.estimator = type(gates.estimator)(sigma=0.1)
    gates.config = gp.GateConfig(noise=0.1, target=0.5, width_multiple=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)
    ids = token_ids(2, 16).to(device)
    model.train()

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = model(ids, labels=ids).loss + gates.penalty()
        loss.backward()
        optimizer.step()
        gates.step()
        return loss.detach()

    warm_up(step, 3)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer_start = copy.deepcopy(optimizer.state_dict())
    with no_host_sync():
        eager = [step() for _ in range(3)]
    after = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(start)
    optimizer.load_state_dict(optimizer_start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(loss.clone())
    assert torch.equal(torch.stack(eager), torch.stack(replayed))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, after[name]), name
