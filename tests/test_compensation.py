"""Closing with repair: exact where what is closed is redundant, better than no repair elsewhere."""

import copy

import pytest
import torch
from tiny import set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.compensation import close_and_compensate

CONFIG = gp.GateConfig(noise=0.0, target=0.7, width_multiple=4)


def keep_all_but(gates, closed: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    masks = {name: torch.ones(gate.size, dtype=torch.bool) for name, gate in gates.items()}
    for name, units in closed.items():
        masks[name][units] = False
    return masks


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
def test_redundant_channels_are_repaired_exactly(model_type):
    model = tiny_model(model_type).eval()
    ids = token_ids(batch=8, length=16)
    gates = gp.attach(model, CONFIG)
    names = [name for name in gates if name.endswith(":channels")]
    with torch.no_grad():
        for parent, child, site in gates.attachment.sites:
            if site.rows_gate is not None and site.rows_gate.kind == "channels":
                linear = parent._modules[child]
                channels_first = linear.weight.t() if model_type == "gpt2" else linear.weight
                channels_first[7] = channels_first[3]
                if linear.bias is not None:
                    linear.bias[7] = linear.bias[3]
    expected = model(ids).logits
    close_and_compensate(
        model, keep_all_but(gates, {name: [7] for name in names}), [ids], damping=1e-10
    )
    assert gates.open_fraction(names[0]) == 39 / 40
    got = model(ids).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_repair_beats_plain_closing_on_fresh_text():
    model = tiny_model("llama").eval()
    fresh = token_ids(batch=16, length=16, seed=9)
    expected = model(fresh).logits
    plain = copy.deepcopy(model)
    closed = {}
    gates = gp.attach(model, CONFIG)
    for name, gate in gates.items():
        closed[name] = [0] if gate.kind == "heads" else list(range(0, 40, 3))
    calibration = [token_ids(batch=16, length=16, seed=seed) for seed in range(4)]
    close_and_compensate(model, keep_all_but(gates, closed), calibration)
    plain_gates = gp.attach(plain, CONFIG)
    plain_gates.set_open(keep_all_but(plain_gates, closed))
    assert plain_gates.kept_fraction() == gates.kept_fraction() < 1

    def error(pruned):
        return (pruned(fresh).logits - expected).pow(2).mean().item()

    assert error(model) < 0.7 * error(plain)


def test_repaired_model_packs_to_the_same_logits():
    model = tiny_model("qwen2").eval()
    ids = token_ids(batch=4, length=12)
    gates = gp.attach(model, CONFIG)
    closed = {name: [1] if gate.kind == "heads" else [2, 5, 30] for name, gate in gates.items()}
    close_and_compensate(model, keep_all_but(gates, closed), [ids])
    expected = model(ids).logits
    gp.pack(model)
    assert (model(ids).logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_post_norm_models_are_refused_untouched():
    model = tiny_model("bert")
    gates = gp.attach(model, CONFIG)
    set_gates(gates, "open")
    with pytest.raises(ValueError, match="without compensation"):
        close_and_compensate(model, keep_all_but(gates, {}), [token_ids()])
    assert gates.open_fraction() == 1
