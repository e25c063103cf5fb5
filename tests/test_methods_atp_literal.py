"""ATP's linears and whole steps of its generator against literal fp64 transcriptions."""

import copy
import math

import pytest
import torch
from atp_training import FAST, generator_batches, started
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.methods import ATP, atp
from gatepack.methods.masked_lora import merge_adapters, unmask_linears
from gatepack.modules import base_linear, operands_of, weight_matrix

pytest.importorskip("peft")

# Every order in which the linears of a layer hold their rows.
LAYOUTS = ["llama", "glm", "phi3", "gpt_neox", "gpt2", "bert", "modernbert"]

HEADS, KV_HEADS, HEAD_DIM, CHANNELS, WIDTH = 6, 2, 8, 40, 48
LENGTHS = (HEAD_DIM, HEAD_DIM, CHANNELS)
RATE, TARGET, TEMPERATURE, OFFSET = 1e-2, 0.6, 0.4, 3.0


@pytest.mark.parametrize("family", LAYOUTS)
def test_kept_fraction_counts_what_packing_keeps(family):
    model, training = started(family, torch.float32, final="sample")
    expected = float(training.decisions.layout.kept_fraction(training.decisions.hard.double()))
    assert training.finish() == pytest.approx(expected)
    assert gp.pack(model).kept_fraction == pytest.approx(expected)


def literal_linear(module, place, x, m, tunes: bool):
    """Both published formulas for one linear, row by row; m [rows] or [columns]."""
    operands = operands_of(module)
    (adapter,) = operands.adapters
    if place.columns is not None and not tunes and place.power:
        x = x * m**place.power
    rows = []
    for n in range(len(operands.w)):
        frozen = (x * operands.w[n]).sum(-1)
        frozen = frozen if operands.bias is None else frozen + operands.bias[n]
        low = sum((x * adapter.a[r]).sum(-1) * adapter.b[n, r] for r in range(len(adapter.a)))
        if place.rows is None:
            rows.append(frozen + low)
        elif tunes:
            rows.append(m[n] * frozen + low)
        else:
            rows.append(m[n] * (frozen + low) if place.masks_output else frozen + low)
    return torch.stack(rows, -1)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("tunes", [True, False])
def test_linears_are_the_published_formulas(family, tunes):
    model, training = started(family)
    model.train(tunes)
    decisions = training.decisions
    for place in decisions.layout.places[: len(decisions.layout.places) // 2]:
        module = model.get_submodule(place.name)
        x = torch.randn(5, weight_matrix(base_linear(module)).shape[1], dtype=torch.float64)
        x.requires_grad_()
        factors = [(a.a, a.b) for a in operands_of(module).adapters][0]
        m = decisions.hard[decisions.index[place.name]].double()
        expected = literal_linear(module, place, x, m, tunes)
        ours = module(x)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        upstream = torch.randn_like(ours)
        found = torch.autograd.grad(ours, (x, *factors), upstream)
        for a, b in zip(found, torch.autograd.grad(expected, (x, *factors), upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("fractional", [True, False])
def test_soft_decisions_have_the_gradient_of_the_evaluation_formula(family, fractional):
    """That of 0 and 1 counts channels once: their square, which is the same, is flat at 0."""
    model, training = started(family)
    decisions = training.decisions
    allowed = torch.tensor([0.0, 0.3, 1.0] if fractional else [0.0, 1.0], dtype=torch.float64)
    values = allowed[torch.randint(len(allowed), decisions.hard.shape)].requires_grad_()
    ids = token_ids()
    model.eval()
    with decisions.softened(values, fractional):
        ours = model(ids).logits
    if not fractional:
        decisions.set(values.detach() == 1)
        torch.testing.assert_close(ours, model(ids).logits, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(ours)
    (found,) = torch.autograd.grad(ours, values, upstream)
    unmask_linears(model, decisions)
    merge_adapters(model, decisions)
    literal = values.detach().clone().requires_grad_()
    for place in decisions.layout.places:
        module, index = model.get_submodule(place.name), decisions.index[place.name]
        if place.masks_output:
            module.register_forward_hook(lambda m, args, y, i=index: y * literal[i])
        elif place.columns is not None and place.power:

            def before(m, args, i=index, power=place.power if fractional else 1):
                return (args[0] * literal[i] ** power,)

            module.register_forward_pre_hook(before)
    theirs = model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (expected,) = torch.autograd.grad(theirs, literal, upstream)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.fixture
def fp64():
    """The generator and its noise in fp64, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def encoder_layer(x, p):
    """A norm after each residual sum; 4 heads of 16; ReLU. x [layers, 64]"""
    q, k, v = (x @ p["self_attn.in_proj_weight"].t() + p["self_attn.in_proj_bias"]).chunk(3, -1)
    heads = []
    for h in range(4):
        lanes = slice(16 * h, 16 * h + 16)
        scores = q[:, lanes] @ k[:, lanes].t() / math.sqrt(16)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[:, lanes])
    out = torch.cat(heads, -1) @ p["self_attn.out_proj.weight"].t() + p["self_attn.out_proj.bias"]
    x = layer_norm(x + out, p["norm1.weight"], p["norm1.bias"])
    inner = (x @ p["linear1.weight"].t() + p["linear1.bias"]).clamp(min=0)
    inner = inner @ p["linear2.weight"].t() + p["linear2.bias"]
    return layer_norm(x + inner, p["norm2.weight"], p["norm2.bias"])


def literal_logits(parameters, slots):
    """Flat logits: of each layer those of keys, of values, of channels."""
    x = slots
    for block in range(2):
        start = f"encoder.layers.{block}."
        own = {n.removeprefix(start): p for n, p in parameters.items() if n.startswith(start)}
        x = encoder_layer(x, own)
    x = layer_norm(x, parameters["norm.weight"], parameters["norm.bias"])
    logits = [parameters[f"outputs.{v}"][layer] @ x[layer] for layer in range(2) for v in range(3)]
    return torch.cat(logits)


def literal_loss(model, decisions, ids, channel_power):
    """The loss of a plain model under decisions on k, q (before RoPE), v and h = silu(g) * u."""
    handles = []
    for layer, own in zip(model.model.layers, decisions.chunk(2), strict=True):
        keys, values, channels = own.split(LENGTHS)
        for name, vector in (
            ("q_proj", keys.repeat(HEADS)),
            ("k_proj", keys.repeat(KV_HEADS)),
            ("v_proj", values.repeat(KV_HEADS)),
        ):
            module = layer.self_attn.get_submodule(name)
            handles.append(module.register_forward_hook(lambda m, args, y, z=vector: y * z))
        handles.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda m, args, z=channels: (args[0] * z**channel_power,)
            )
        )
    loss = model(input_ids=ids, labels=ids).loss
    for handle in handles:
        handle.remove()
    return loss


def kept_weights(decisions):
    kept = 0.0
    for own in decisions.chunk(2):
        keys, values, channels = own.split(LENGTHS)
        kept = kept + WIDTH * (HEADS * keys.sum() + KV_HEADS * keys.sum())
        kept = kept + WIDTH * (KV_HEADS * values.sum() + HEADS * values.sum())
        kept = kept + 3 * WIDTH * channels.sum()
    return kept / (2 * WIDTH * (2 * HEADS * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM + 3 * CHANNELS))


class LiteralAdamW:
    """Decoupled decay of 0.01, betas 0.9 and 0.999, epsilon 1e-8."""

    def __init__(self, parameters):
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.steps = 0

    def step(self, parameters, grads):
        self.steps += 1
        for name, grad in grads.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * grad
            self.second[name] = 0.999 * self.second[name] + 0.001 * grad**2
            first = self.first[name] / (1 - 0.9**self.steps)
            second = self.second[name] / (1 - 0.999**self.steps)
            value = parameters[name].detach() * (1 - RATE * 0.01)
            value = value - RATE * first / (second.sqrt() + 1e-8)
            parameters[name] = value.requires_grad_()


def literal_step(plain, parameters, slots, optimizer, uniform, ids, hard_loss):
    """One step in place; gives the norm of the gradient and the fraction that m keeps."""
    logits = literal_logits(parameters, slots)
    noise = -torch.log(-torch.log(uniform + 1e-10) + 1e-10)
    soft = 1 / (1 + torch.exp(-(logits + noise + OFFSET) / TEMPERATURE))
    hard = (soft.detach() >= 0.5).to(soft) + soft - soft.detach()
    kept = kept_weights(hard)
    budget = torch.log(torch.clamp(kept, min=TARGET) / torch.clamp(kept, max=TARGET))
    loss = literal_loss(plain, hard if hard_loss else soft, ids, 1 if hard_loss else 2)
    grads = torch.autograd.grad(loss + 5.0 * budget, list(parameters.values()))
    norm = torch.sqrt(sum((grad**2).sum() for grad in grads))
    grads = [grad * min(1.0, 3.0 / (float(norm) + 1e-6)) for grad in grads]
    optimizer.step(parameters, dict(zip(parameters, grads, strict=True)))
    return float(norm), float(kept.detach())


@pytest.mark.parametrize("hard_loss", [False, True])
@pytest.mark.parametrize("opened", [0.0, -3.0], ids=["all kept", "some kept"])
def test_generator_steps_are_the_published_ones(hard_loss, opened, fp64, monkeypatch):
    """Two steps, from logits around 0, with which all is kept, and around -3."""
    fields = {**FAST, "generator_dropout": 0.0, "lora_dropout": 0.1, "regulariser": "none"}
    model = tiny_model("llama").train()
    training = ATP(**fields, hard_loss=hard_loss, tie_pairs=False).start(
        model, 12, generator_batches()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        training.generator.norm.bias.fill_(0.1)
        for matrix in training.generator.outputs:
            matrix.add_(opened / 6.4)  # * 64 * 0.1
    parameters = {
        name: p.detach().clone().requires_grad_()
        for name, p in training.generator.named_parameters()
    }
    uniforms, real = [], atp.gumbel_sigmoid
    monkeypatch.setattr(atp, "gumbel_sigmoid", lambda *a: uniforms.append(a[1]) or real(*a))
    plain = copy.deepcopy(model)
    decisions = plain.model.layers[0].mlp.up_proj.atp_decisions
    unmask_linears(plain, decisions)
    merge_adapters(plain, decisions)
    plain.eval().requires_grad_(False)
    slots, adam = training.generator.slots.clone(), LiteralAdamW(parameters)
    norms, kept = [], []
    for step in (1, 2):
        training.step()
        ids = generator_batches()[step % 2]
        found = literal_step(plain, parameters, slots, adam, uniforms[-2], ids, hard_loss)
        norms.append(found[0])
        kept.append(found[1])
    assert uniforms[-2].dtype == torch.float64
    assert (max(norms) > 3.0, kept[0] < 1.0) == (opened < 0, opened < 0)
    for name, parameter in training.generator.named_parameters():
        state = training.optimizer.state[parameter]
        pairs = [
            (state["exp_avg"], adam.first[name]),
            (state["exp_avg_sq"], adam.second[name]),
            (parameter, parameters[name]),
        ]
        for ours, literal in pairs:  # the cross entropy of transformers is in fp32
            scale = float(literal.detach().abs().max())
            torch.testing.assert_close(
                ours, literal, rtol=1e-6, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
