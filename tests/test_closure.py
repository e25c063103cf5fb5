"""remove_closed: the same training as with the units masked, in less memory, and resumable."""

import copy

import pytest
import torch
from latencies import config
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.masks import physical_mask

STEPS = 14


def gated(family="llama", lora=False, noise=0.1, dtype=torch.float64):
    torch.manual_seed(0)
    model = tiny_model(family, dtype).train()
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    wanted = {"target": 0.5, "width_multiple": 1, "equal_layers": False, "seed": 3, "noise": noise}
    gates = gp.attach(model, gp.GateConfig(**wanted))
    gates.unfreeze()
    return model, gates


def close_some(gates):
    for name, gate in gates.items():
        if gate.kind == "channels":
            gates.close(name, range(3, gate.size, 3))
        elif gate.size > 2:
            first = gate.spec.shared_size  # one key/value head with its query heads
            gates.close(name, range(first) if first > 1 else [1, 4])


def step(model, training, optimizer, number):
    ids = token_ids(3, 7, seed=number)
    labels = ids if hasattr(model, "lm_head") or model.can_generate() else ids.sum(1) % 2
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    training.step()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def start(model, optimizer=torch.optim.AdamW):
    training = gp.GateTraining(model, STEPS, gp.GateSchedule(freeze=1.0))
    kwargs = {"momentum": 0.9} if optimizer is torch.optim.SGD else {"amsgrad": True}
    return training, optimizer(training.weights(), lr=1e-3, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
@pytest.mark.parametrize("lora", [False, True])
def test_losses_are_those_of_masking_the_same_units(family, lora):
    if lora and family != "llama":
        pytest.skip("LoRA is cut alike in every family")
    losses, sizes = [], []
    for removes in (False, True):
        model, gates = gated(family, lora)
        training, optimizer = start(model)
        found = [step(model, training, optimizer, i) for i in range(4)]
        close_some(gates)
        if removes:
            report = gp.remove_closed(model, optimizer, training)
            assert report.block_params[1] < report.block_params[0]
        found += [step(model, training, optimizer, i) for i in range(4, STEPS)]
        losses.append(found)
        state = [v for s in optimizer.state.values() for v in s.values()]
        sizes.append(sum(t.numel() for t in state if isinstance(t, torch.Tensor)))
        kept = gates.kept_fraction()
        assert abs(kept - 0.5) <= 0.005
        sizes.append(sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert sizes[2] < sizes[0] and sizes[3] < sizes[1]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_moments_are_the_kept_part(optimizer):
    model, gates = gated()
    training, weights = start(model, optimizer)
    for i in range(3):
        step(model, training, weights, i)
    close_some(gates)
    down = model.model.layers[1].mlp.down_proj.weight
    before = {k: v.clone() for k, v in weights.state[down].items() if torch.is_tensor(v)}
    stays = (~gates.split(gates.closed)["model.layers.1.mlp:channels"]).nonzero().squeeze(1)
    gp.remove_closed(model, [weights], training)
    new = model.model.layers[1].mlp.down_proj.weight
    assert new.shape == (48, len(stays)) and down not in weights.state
    held = {id(p) for group in weights.param_groups for p in group["params"]}
    assert held == {id(p) for p in training.weights()}
    for key, value in before.items():
        expected = value[:, stays] if value.dim() == 2 else value
        assert torch.equal(weights.state[new][key], expected), key


def test_a_second_removal_and_pack():
    model, gates = gated(noise=0.0)
    total = gates.costs.total
    for part in (slice(0, 5), slice(0, 4)):
        name = "model.layers.0.mlp:channels"
        gates.close(name, range(gates[name].size)[part])
        gp.remove_closed(model)
    assert gates[name].size == 31 and gates.costs.total == total
    assert gates.kept_fraction() == pytest.approx(1 - 9 * 3 * 48 / total)
    logits = model.eval()(input_ids=token_ids()).logits
    report = gp.pack(model)
    torch.testing.assert_close(model(input_ids=token_ids()).logits, logits)
    assert report.rows[1][3] == 31 and "total" not in model.config.gatepack
    kept = gp.unpack(model)
    assert kept[name].tolist() == [False] * 9 + [True] * 31


def test_resumes_from_a_checkpoint_with_units_removed(tmp_path):
    def cut(folder):
        model, gates = gated(dtype=torch.float32)
        training, optimizer = start(model)
        for i in range(4):
            step(model, training, optimizer, i)
        close_some(gates)
        gp.remove_closed(model, optimizer, training)
        for i in range(4, 7):
            step(model, training, optimizer, i)
        if folder is not None:
            gp.save_pretrained(model, folder)
        return model, training, optimizer

    model, training, optimizer = cut(tmp_path / "cut")
    again = gp.from_pretrained(tmp_path / "cut").train()
    resumed, second = start(again)
    resumed.load_state_dict(copy.deepcopy(training.state_dict()))
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(7, STEPS):
        assert step(model, training, optimizer, i) == step(again, resumed, second, i)
    assert gp.gates_of(again).kept_fraction() == gp.gates_of(model).kept_fraction()
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_latency_budget_stays_that_of_the_dense_model(tmp_path):
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, config(equal_layers=False, width_multiple=1, target=0.8))
    close_some(gates)
    padded = {
        name: physical_mask(gates[name].kind, gates[name].spec.shared_size, mask)
        for name, mask in gates.open_masks().items()
    }
    before = gates.costs.kept_fraction(padded)
    gp.remove_closed(model)
    assert gates.kept_fraction() == pytest.approx(before)
    flat = torch.ones_like(gates.logits)
    assert float(gates.costs.expected(flat)) == pytest.approx(before, rel=1e-5)
    gp.save_pretrained(model, tmp_path / "m")
    again = gp.gates_of(gp.from_pretrained(tmp_path / "m"))
    assert again.kept_fraction() == pytest.approx(before)


def test_a_training_that_was_not_told_says_how():
    model, gates = gated()
    training, _ = start(model)
    close_some(gates)
    gp.remove_closed(model)
    with pytest.raises(ValueError, match=r"name it in gatepack.remove_closed\(model, opt"):
        training.step()


def test_refuses():
    model = tiny_model("llama")
    gp.attach(model, gp.GateConfig(units=("rows", "columns"), target=0.6))
    with pytest.raises(ValueError, match="model: expected gates on heads and channels"):
        gp.remove_closed(model)
    with pytest.raises(ValueError, match="model has no gates"):
        gp.remove_closed(tiny_model("llama"))
