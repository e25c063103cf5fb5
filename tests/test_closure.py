"""remove_closed: the same training as with the units masked, in less memory, and resumable."""

import copy
import json

import pytest
import torch
from latencies import config
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.layers import layers_of
from gatepack.masks import encode_mask, physical_mask
from gatepack.methods import CloseAndRepair
from gatepack.modules import linear_shape

STEPS = 14


def gated(family="llama", lora=False, noise=0.1, dtype=torch.float64, sizes=None, **config):
    torch.manual_seed(0)
    model = tiny_model(family, dtype, **(sizes or {})).train()
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    wanted = {"target": 0.5, "width_multiple": 1, "equal_layers": False, "seed": 3, "noise": noise}
    gates = gp.attach(model, gp.GateConfig(**{**wanted, **config}))
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
    masks = gates.open_masks()
    other = "model.layers.1.mlp:channels"
    rest = gates.costs.without([other])
    assert rest.total == total and rest.kept_fraction(masks) == gates.kept_fraction()
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


def widths(model):
    """{(query heads, key/value heads, channels)} of the layers."""
    layers = layers_of(model)
    return {(x.queries, x.kv_heads, linear_shape(x.linear(x.family.down))[1]) for x in layers}


@pytest.mark.parametrize("reloads", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_equal_layers_end_equal_where_removals_were_not(reloads, uniform, tmp_path):
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    model, gates = gated(
        dtype=torch.float32, sizes={**sizes, "hidden_size": 64}, equal_layers=True,
        width_multiple=4, q_per_kv_uniform=uniform,
    )  # fmt: skip
    training, optimizer = start(model)
    step(model, training, optimizer, 0)
    gates.close("model.layers.0.mlp:channels", range(11))  # 29 are left, of 40
    gates.close("model.layers.1.mlp:channels", [7])
    gates.close("model.layers.2.self_attn:heads", range(2))  # a key/value head
    gates.close("model.layers.3.self_attn:heads", [0, 2, 4, 6])  # one query head of each
    gp.remove_closed(model, optimizer, training)
    assert len(widths(model)) == 4
    if reloads:
        gp.save_pretrained(model, tmp_path / "cut")
        model = gp.from_pretrained(tmp_path / "cut").train()
        training, optimizer = start(model)
    for i in range(1, STEPS + 1):
        step(model, training, optimizer, i)
    assert abs(training.finish() - 0.5) <= 0.005
    assert gp.pack(model).kept_fraction < 0.7  # what was removed before does not count in it
    ((queries, kv_heads, channels),) = widths(model)
    assert queries == kv_heads <= 3 and channels % 4 == 0 and channels <= 29


def test_what_removal_leaves_no_equal_shape_for():
    model, gates = gated(equal_layers=True, tp_divisor=2)
    gates.close("model.layers.0.mlp:channels", range(1, 40))
    training, optimizer = start(model)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="model: without the units that are closed, tp_divisor=2"):
        gp.remove_closed(model, optimizer, training)
    gates.reopen("model.layers.0.mlp:channels", range(1, 3))
    message = r"closed, target=0.5 cannot be met .* nearest reachable .* or reopen some of them"
    with pytest.raises(ValueError, match=message):
        gp.remove_closed(model, optimizer, training)
    assert before == {name: p.shape for name, p in model.named_parameters()}
    gates.freeze()  # rounded: nothing is planned any more
    gp.remove_closed(model, optimizer, training)
    assert gates["model.layers.0.mlp:channels"].size == 3
    with pytest.raises(ValueError, match="target=0.5 cannot be met within"):
        gates.check_target()


def test_units_that_an_earlier_pack_took_are_not_missed(tmp_path):
    """Gates of a packed model: equal, in multiples and with noise by the sizes that they began
    with."""
    model, gates = gated(dtype=torch.float32, noise=0.0)
    gates.close("model.layers.0.mlp:channels", range(9))
    gp.pack(model)
    config = gp.GateConfig(target=0.6, width_multiple=1, equal_layers=False, seed=3)
    gates = gp.attach(model.train(), config)
    gates.close("model.layers.0.mlp:channels", range(0, 31, 4))
    gates.close("model.layers.1.mlp:channels", range(0, 40, 4))
    gp.remove_closed(model)
    gp.save_pretrained(model, tmp_path / "cut")
    again = gp.gates_of(gp.from_pretrained(tmp_path / "cut").train())
    assert [gate.spec for gate in again.gates.values()] == [g.spec for g in gates.gates.values()]
    assert gates["model.layers.0.mlp:channels"].spec.whole == (31, 1)
    for _ in range(2):
        assert torch.equal(gates.draw().flat, again.draw().flat)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "attached"),
        ({"shared_size": 0}, "expected 37 units left, and blocks of 0, of 40, got 37"),
        (encode_mask(torch.arange(40) > 7), "expected 37 units left, and blocks of 1, of 40, got"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(record, words, tmp_path):
    model, gates = gated(dtype=torch.float32)
    name = "model.layers.0.mlp:channels"
    gates.close(name, range(3))
    gp.remove_closed(model)
    gp.save_pretrained(model, tmp_path / "cut")
    path = tmp_path / "cut" / "config.json"
    config = json.loads(path.read_text())
    if record is None:
        del config["gatepack"]["attached"]
    else:
        config["gatepack"]["attached"][name] |= record
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json.*{words}"):
        gp.from_pretrained(tmp_path / "cut")


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


def adafactors():
    from transformers.optimization import Adafactor

    fixed = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    return {
        "torch": lambda weights: torch.optim.Adafactor(weights, lr=1e-3),
        "transformers": lambda weights: Adafactor(weights, lr=1e-3, **fixed),
    }


@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_moments_of_rows_and_columns_are_cut(kind):
    model, gates = gated(dtype=torch.float32)
    training = gp.GateTraining(model, STEPS, gp.GateSchedule(freeze=1.0))
    weights = adafactors()[kind](training.weights())
    step(model, training, weights, 0)
    close_some(gates)
    stays = {name: mask.nonzero().squeeze(1) for name, mask in gates.split(~gates.closed).items()}[
        "model.layers.1.mlp:channels"
    ]
    before = dict(weights.state[model.model.layers[1].mlp.down_proj.weight])
    gp.remove_closed(model, weights, training)
    after = weights.state[model.model.layers[1].mlp.down_proj.weight]
    row, column = (n for n in before if "row" in n), (n for n in before if "col" in n)
    assert torch.equal(after[next(row)], before[(name := next(n for n in before if "row" in n))])
    column = next(column)
    assert torch.equal(after[column], before[column][..., stays]) and name in after
    assert torch.isfinite(torch.tensor(step(model, training, weights, 1)))


def test_moments_of_another_form_are_refused():
    model, gates = gated()
    training, weights = start(model)
    step(model, training, weights, 0)
    close_some(gates)
    down = model.model.layers[0].mlp.down_proj.weight
    weights.state[down]["absmax"] = torch.ones(7)
    message = r"optimizer: AdamW keeps 'absmax' \[7\] of a weight \[48, 40\], .* leave it out"
    with pytest.raises(ValueError, match=message):
        gp.remove_closed(model, weights, training)
    assert model.model.layers[0].mlp.down_proj.weight is down and down in weights.state


@pytest.mark.parametrize("lora", [False, True])
def test_a_recipe_goes_on_after_each_of_its_closings(lora):
    method = CloseAndRepair(
        gp.GateConfig(target=0.5, width_multiple=1, equal_layers=False, noise=0.0),
        close=(0.25, 0.5), bars=False,
    )  # fmt: skip
    some, losses, kept, weights = [token_ids(2, 7, seed=i) for i in range(4)], [], [], []
    for removes in (False, True):
        model, gates = gated(lora=lora, noise=0.0)
        gp.detach(model)
        closing = method.start(model, STEPS, some)
        optimizer = torch.optim.AdamW(closing.weights(), lr=1e-3)
        gates, found = gp.gates_of(model), []
        for i in range(STEPS):
            closes = closing.begin_step()
            if removes and closes:
                before = gates.logits.numel()
                gp.remove_closed(model, optimizer, closing)
                assert gates.logits.numel() < before and not gates.closed.any()
            found.append(step(model, closing, optimizer, i))
        losses.append(found)
        kept.append(closing.finish())
        weights.append(sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)
    assert kept[0] == pytest.approx(kept[1]) and abs(kept[0] - 0.5) <= 0.005
    assert weights[1] < 0.7 * weights[0]


def test_a_closing_to_come_keeps_what_it_needs():
    model = tiny_model("llama", torch.float64).train()
    shapes = gp.GateConfig(target=0.5, width_multiple=1, noise=0.0, tp_divisor=2)
    closing = CloseAndRepair(shapes, close=0.5, bars=False).start(model, 4, [token_ids()])
    gates = gp.gates_of(model)
    gates.close("model.layers.0.mlp:channels", range(1, 40))
    with pytest.raises(ValueError, match="model: without the units that are closed, tp_divisor=2"):
        gp.remove_closed(model, training=closing)


def test_a_teacher_needs_what_is_closed():
    model, gates = gated()
    distilling = gp.Distillation().start(model)
    close_some(gates)
    with pytest.raises(ValueError, match=r"model: its own dense weights teach it, .* stop\(\) the"):
        gp.remove_closed(model)
    distilling.stop()
    gp.remove_closed(model)
    gp.Distillation(teacher=tiny_model("llama", torch.float64)).start(model)
    close_some(gates)
    gp.remove_closed(model)
    with pytest.raises(ValueError, match="teacher: expected one, because .* is packed and the st"):
        distilling.resume()


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
    model = tiny_model("llama")
    gp.attach(model)
    with pytest.raises(ValueError, match="CloseAndRepair started, or None, got a SGD, which cann"):
        gp.remove_closed(model, training=torch.optim.SGD(model.parameters()))
