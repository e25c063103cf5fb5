"""Closing with repair: exact where what is closed is redundant, better than no repair elsewhere."""

import copy

import pytest
import torch
from tiny import for_family, padded, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.compensation import (
    _BIAS_FIELDS,
    DAMPINGS,
    _least_squares,
    _repair,
    add_removed_means,
    close_and_compensate,
)
from gatepack.families import FAMILIES
from gatepack.importance import gated_inputs
from gatepack.layers import layers_of
from gatepack.samples import lane_indices

CONFIG = gp.GateConfig(noise=0.0, target=0.7, width_multiple=4)


def keep_all_but(gates, closed: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    masks = {name: torch.ones(gate.size, dtype=torch.bool) for name, gate in gates.items()}
    for name, units in closed.items():
        masks[name][units] = False
    return masks


def first_head_and_third_channels(gates) -> dict[str, list[int]]:
    return {
        name: [0] if gate.kind == "heads" else list(range(0, 40, 3)) for name, gate in gates.items()
    }


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_redundant_channels_are_repaired_exactly(model_type):
    model = tiny_model(model_type).eval()
    ids = token_ids(batch=8, length=16)
    gates = gp.attach(model, for_family(model_type, CONFIG))
    names = [name for name in gates if name.endswith(":channels")]
    with torch.no_grad():
        for parent, child, site in gates.attachment.sites:
            if site.rows_gate is not None and site.rows_gate.kind == "channels":
                linear = parent._modules[child]
                channels_first = linear.weight.t() if model_type == "gpt2" else linear.weight
                for block in site.row_blocks:
                    first, second = block.offset + 3, block.offset + 7
                    channels_first[second] = channels_first[first]
                    if linear.bias is not None:
                        linear.bias[second] = linear.bias[first]
    expected = model(ids).logits
    close_and_compensate(
        model, keep_all_but(gates, {name: [7] for name in names}), [ids], damping=1e-10
    )
    assert gates.open_fraction(names[0]) == 39 / 40
    got = model(ids).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_repair_is_the_same_on_either_path(monkeypatch):
    pytest.importorskip("triton")
    ids = token_ids(batch=2, length=16)
    logits = {}
    for path in ("folded", "triton"):
        monkeypatch.setenv("GATEPACK_BACKEND", path)
        model = tiny_model("llama", torch.float32, num_hidden_layers=1).eval()
        gates = gp.attach(model, CONFIG)
        names = {name: [0, 4] for name, gate in gates.items()}
        close_and_compensate(model, keep_all_but(gates, names), [ids], damping=0.01)
        monkeypatch.setenv("GATEPACK_BACKEND", "folded")
        logits[path] = model(ids).logits
    torch.testing.assert_close(logits["triton"], logits["folded"], rtol=1e-3, atol=1e-3)


# A plain sum; parallel sublayers; a scaled stream; what is added normalised; the sum normalised.
@pytest.mark.parametrize("model_type", ["llama", "phi", "granite", "gemma2", "bert"])
def test_repair_beats_plain_closing_on_fresh_text(model_type):
    model = tiny_model(model_type).eval()
    fresh = token_ids(batch=16, length=16, seed=9)
    expected = model(fresh).logits
    plain = copy.deepcopy(model)
    gates = gp.attach(model, CONFIG)
    closed = first_head_and_third_channels(gates)
    calibration = [token_ids(batch=16, length=16, seed=seed) for seed in range(4)]
    close_and_compensate(model, keep_all_but(gates, closed), calibration)
    plain_gates = gp.attach(plain, CONFIG)
    plain_gates.set_open(keep_all_but(plain_gates, closed))
    assert plain_gates.kept_fraction() == gates.kept_fraction() < 1

    def error(pruned):
        return (pruned(fresh).logits - expected).pow(2).mean().item()

    assert error(model) < 0.7 * error(plain)


def test_least_squares_are_fp32_under_autocast():
    inputs, residuals = (
        list(torch.randn(3, 5, lanes, generator=torch.Generator().manual_seed(lanes)).split(1))
        for lanes in (40, 48)
    )
    changes = []
    for enabled in (False, True):
        model = tiny_model("llama", torch.float32)
        gates = gp.attach(model, CONFIG)
        name = "model.layers.0.mlp:channels"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            linear = model.model.layers[0].mlp.down_proj
            changes.append(_repair(linear, gates, name, inputs, residuals, [None] * 3, 0.1))
    assert torch.equal(*changes)


@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_damping_is_what_fits_the_batches_left_out_best(count, noise):
    """Against a literal transcription in fp64: chosen on the last quarter, applied to all."""
    torch.manual_seed(0)
    inputs = [torch.randn(15, 12) for _ in range(count)]
    weight = torch.randn(12, 4)
    residuals = [x @ weight + noise * torch.randn(15, 4) for x in inputs]
    xs, rs = ([t.double() for t in each] for each in (inputs, residuals))

    def solution(damping, xs, rs):
        x, r = torch.cat(xs), torch.cat(rs)
        gram = x.t() @ x
        return torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(12)) @ x.t() @ r

    used = count * 3 // 4
    left = [
        (torch.cat(rs[used:]) - torch.cat(xs[used:]) @ solution(each, xs[:used], rs[:used]))
        .square()
        .sum()
        for each in DAMPINGS
    ]
    best = DAMPINGS[int(torch.stack(left).argmin())]
    assert (best == DAMPINGS[0]) == (noise == 0)
    found = _least_squares(inputs, residuals, None).double()
    torch.testing.assert_close(found, solution(best, xs, rs), rtol=1e-4, atol=1e-5)


def test_chosen_damping_beats_hardly_any_on_fresh_text():
    fresh = token_ids(batch=16, length=16, seed=9)
    dense = tiny_model("llama").eval()
    expected = dense(fresh).logits
    errors = {}
    for damping in (None, 1e-4):
        model = copy.deepcopy(dense)
        gates = gp.attach(model, CONFIG)
        closed = first_head_and_third_channels(gates)
        few = [token_ids(batch=1, length=16, seed=seed) for seed in range(4)]
        close_and_compensate(model, keep_all_but(gates, closed), few, damping)
        errors[damping] = (model(fresh).logits - expected).square().mean().item()
    assert errors[None] < 0.9 * errors[1e-4], errors


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    ids = [token_ids(2, 16, seed=seed) for seed in range(4)]
    weights = []
    for inputs in (ids, [padded(each, 8, side) for each in ids]):
        model = tiny_model("llama")
        gates = gp.attach(model, CONFIG)
        masks = keep_all_but(gates, first_head_and_third_channels(gates))
        close_and_compensate(model, masks, inputs, damping=0.1)
        weights.append([p.detach() for p in model.parameters()])
    for got, expected in zip(*weights, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_refuses_gates_that_are_not_1_and_no_batch():
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, CONFIG)
    masks = keep_all_but(gates, {})
    with pytest.raises(ValueError, match="at least one batch of token ids, got none"):
        close_and_compensate(model, masks, [])
    for pattern in ("single", "mixed"):
        set_gates(gates, pattern)
        with pytest.raises(ValueError, match=r"or none: put new gates on, with gatepack\.detach"):
            close_and_compensate(model, masks, [token_ids()])
        gp.detach(model)
        gates = gp.attach(model, CONFIG)
        close_and_compensate(model, masks, [token_ids()])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "bert"])
def test_what_was_closed_stays_so_and_the_rest_is_repaired_as_if_it_had_been_removed(model_type):
    model = tiny_model(model_type).eval()
    batches = [token_ids(batch=8, length=16, seed=seed) for seed in range(2)]
    gates = gp.attach(model, CONFIG)
    first = {
        name: list(range(gate.spec.shared_size)) if gate.kind == "heads" else [0, 5, 9]
        for name, gate in gates.items()
    }
    gates.set_open(keep_all_but(gates, first))
    removed = copy.deepcopy(model)
    gp.pack(removed)
    left = gp.attach(removed, CONFIG)
    channels = {name: [3, 7] for name in gates if name.endswith(":channels")}
    close_and_compensate(model, keep_all_but(gates, channels), batches)
    shifted = {name: [2, 5] for name in channels}  # of those that are left
    close_and_compensate(removed, keep_all_but(left, shifted), batches)
    for name, mask in gates.open_masks().items():
        assert not mask[first[name]].any() and not mask[channels.get(name, [])].any()
    torch.testing.assert_close(model(batches[0]).logits, removed(batches[0]).logits)


def test_submodules_keep_their_modes():
    model = tiny_model("llama", torch.float32).train()
    gates = gp.attach(model, CONFIG)
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    close_and_compensate(model, keep_all_but(gates, {}), [token_ids()])
    assert [module.training for module in model.modules()] == before


def test_repaired_model_packs_to_the_same_logits():
    model = tiny_model("qwen2").eval()
    ids = token_ids(batch=4, length=12)
    gates = gp.attach(model, CONFIG)
    closed = {name: [1] if gate.kind == "heads" else [2, 5, 30] for name, gate in gates.items()}
    close_and_compensate(model, keep_all_but(gates, closed), [ids])
    expected = model(ids).logits
    gp.pack(model)
    assert (model(ids).logits - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "model_type", ["llama", "granite", "nemotron", "seed_oss", "ernie4_5", "gpt2", "opt", "bert"]
)
def test_removed_means_are_exact_for_constant_units(model_type, tmp_path):
    model = tiny_model(model_type, torch.float32).eval()
    ids = token_ids(batch=4, length=12)
    gates = gp.attach(model, CONFIG)
    closed = {name: [1] if gate.kind == "heads" else [0, 5] for name, gate in gates.items()}
    masks = keep_all_but(gates, closed)
    expected, means = constant_units(model, gates, masks, ids)
    add_removed_means(gates, masks, means)
    gates.set_open(masks)
    with torch.no_grad():
        gated = model(ids).logits
    torch.testing.assert_close(gated, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if model_type == "llama":
        assert model.config.attention_bias and model.config.mlp_bias
        assert not model.model.layers[1].self_attn.q_proj.bias.any()
    gp.pack(model)
    packed = model(ids).logits
    torch.testing.assert_close(packed, gated, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    gp.save_pretrained(model, tmp_path)
    assert torch.equal(gp.from_pretrained(tmp_path).eval()(ids).logits, packed)


@pytest.mark.parametrize("model_type", sorted(_BIAS_FIELDS))
def test_config_fields_give_the_linears_that_they_are_said_to(model_type):
    fields = _BIAS_FIELDS[model_type]

    def biased(**overrides):
        layer = layers_of(tiny_model(model_type, **overrides))[0]
        paths = layer.family.linears
        return {p.rpartition(".")[2] for p in paths if layer.linear(p).bias is not None}

    for field, linears in fields.items():
        others = dict.fromkeys(fields, False)
        given = biased(**{**others, field: True}) - biased(**others)
        layer = layers_of(tiny_model(model_type))[0]
        assert given == {p.rpartition(".")[2] for p in layer.family.linears} & set(linears)


def constant_units(model, gates, masks, ids):
    """Logits and mean inputs of a model in which the units that masks leave out are constant."""
    handles, seen = [], {}
    for gate, linear in gated_inputs(gates):
        lanes = lane_indices((~masks[gate.name]).nonzero().squeeze(1), gate.lanes)

        def hold(module, args, name=gate.name, lanes=lanes):
            x = args[0].clone()
            x[..., lanes] = 0.3
            seen[name] = x.reshape(-1, x.shape[-1]).mean(0).double()
            return (x,)

        handles.append(linear.register_forward_pre_hook(hold))
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def test_removed_means_need_room_for_a_bias():
    model = tiny_model("mistral", torch.float32)
    gates = gp.attach(model, CONFIG)
    means = {name: torch.zeros(gate.size * gate.lanes) for name, gate in gates.items()}
    with pytest.raises(ValueError, match="MistralForCausalLM has no bias"):
        add_removed_means(gates, keep_all_but(gates, {}), means)
    assert model.model.layers[0].mlp.down_proj.bias is None


def test_nothing_closed_adds_no_bias():
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, CONFIG)
    means = {name: torch.ones(gate.size * gate.lanes) for name, gate in gates.items()}
    add_removed_means(gates, keep_all_but(gates, {}), means)
    assert not model.config.attention_bias and not model.config.mlp_bias
    assert model.model.layers[0].mlp.down_proj.bias is None


def test_a_repair_that_is_not_finite_is_refused():
    model, ids = tiny_model("llama"), token_ids()
    gates = gp.attach(model, CONFIG)
    masks = keep_all_but(gates, first_head_and_third_channels(gates))
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[ids[0, 0]] = torch.inf
    with pytest.raises(FloatingPointError, match=r"of what model\.layers\.0.* feeds is not finite"):
        close_and_compensate(model, masks, [ids])
    assert all(
        bool(layer.linear("mlp.down_proj").weight.isfinite().all()) for layer in layers_of(model)
    )


@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2"])
def test_autocast_repairs_weights_that_train_as_those_that_do_not(model_type):
    """Its copies of weights that train must not outlive their repair."""
    batches = [token_ids(4, 16, seed=seed) for seed in range(6)]
    found = []
    for trains in (False, True):
        model = tiny_model(model_type, torch.float32).requires_grad_(trains)
        gates = gp.attach(model, for_family(model_type, CONFIG))
        closed = first_head_and_third_channels(gates)
        first = list(gates)[:2]  # the last layer stays whole, so that its weights are used as such
        masks = keep_all_but(gates, {name: closed[name] for name in first})
        with torch.autocast("cpu", torch.bfloat16):
            close_and_compensate(model, masks, batches)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
