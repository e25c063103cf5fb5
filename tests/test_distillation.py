"""Distillation: the loss, the teacher that shares its weights with the student, any loop."""

import copy

import pytest
import torch
from tiny import set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.distillation import distance, divergence

IDS = token_ids(3, 7)
CONFIG = gp.GateConfig(target=0.6, width_multiple=4, noise=0.1, seed=3)


def literal(student, teacher, temperature):
    """The formula, token by token."""
    p = torch.softmax(teacher / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    tokens = (p * (p.log() - q.log())).sum(-1)
    return temperature**2 * tokens.mean()


def with_lora(model, std=0.5):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=std)
    return model


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("at_once", [1, 10**9])
def test_divergence_and_its_gradient(temperature, at_once, monkeypatch):
    monkeypatch.setattr("gatepack.distillation.LOGITS_AT_ONCE", at_once)
    student = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 11, dtype=torch.float64)
    ours = divergence(student, teacher, temperature)
    expected = literal(student, teacher, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(3.0 * ours, student)
    (wanted,) = torch.autograd.grad(3.0 * expected, student)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_tokens_that_do_not_count():
    student, teacher = torch.randn(2, 2, 5, 11, dtype=torch.float64)
    tokens = torch.tensor([[True, False, True, True, False], [False, True, True, False, False]])
    ours = divergence(student, teacher, 2.0, tokens)
    torch.testing.assert_close(ours, literal(student[tokens], teacher[tokens], 2.0))
    apart = (student - teacher).square().sum(-1) / teacher.square().sum(-1)
    expected = apart[tokens].mean()
    torch.testing.assert_close(distance(student, teacher, tokens), expected)


def test_half_precision_keeps_small_gradients():
    student = torch.zeros(4000, 50, dtype=torch.float16, requires_grad=True)
    teacher = torch.full((4000, 50), 0.01, dtype=torch.float16)
    teacher[:, 0] = 0.0
    (65536.0 * divergence(student, teacher, 1.0)).backward()
    exact = 65536.0 * (1 / 50 - torch.softmax(teacher.double(), -1)) / 4000
    assert student.grad.dtype == torch.float16
    assert (student.grad.double() - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("units", [("heads", "channels"), ("rows", "columns")])
@pytest.mark.parametrize("match", ["layers", "mlps"])
def test_the_loss_is_against_the_dense_model(units, match):
    dense = tiny_model("llama")
    model = with_lora(copy.deepcopy(dense))
    gates = gp.attach(model, gp.GateConfig(units=units, noise=0.0, target=0.6))
    gates.unfreeze()
    set_gates(gates, "mixed")
    model.train()
    method = gp.Distillation(temperature=3.0, weight=0.7, hidden_weight=0.4, match=match)
    plain = model(input_ids=IDS, labels=IDS)
    distilling = method.start(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    output = model(input_ids=IDS, labels=IDS)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    torch.testing.assert_close(output.logits, plain.logits)
    assert model.training and all(module.training for module in model.modules())

    seen = {}
    for which, root in (("dense", dense), ("gated", model.get_base_model())):
        for i, layer in enumerate(root.model.layers):
            part = layer if match == "layers" else layer.mlp
            part.register_forward_hook(
                lambda m, a, out, key=(which, i): seen.__setitem__(
                    key, out[0] if isinstance(out, tuple) else out
                )
            )
    teacher = dense(input_ids=IDS).logits
    distilling.stop()
    student = model(input_ids=IDS, labels=IDS)
    hidden = sum(distance(seen["gated", i], seen["dense", i]) for i in range(2)) / 2
    expected = student.loss + 0.7 * literal(student.logits, teacher, 3.0) + 0.4 * hidden
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(student.loss, plain.loss)  # after stop() the loss is its own again


def test_adapters_that_come_after_the_gates_learn_from_the_first_forward_on():
    model = tiny_model("llama")
    gates = gp.attach(model, gp.GateConfig(noise=0.0))
    set_gates(gates, "mixed")
    gates.freeze()
    model = with_lora(model)
    gp.Distillation().start(model, keep=[])
    model.train()
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in found if "lora_B" in name} == {
        name for name, _ in model.named_parameters() if "lora_B" in name
    }


def test_gradients_reach_the_gates_and_lora_only_through_the_student():
    model = with_lora(tiny_model("llama"))
    gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.6))
    gates.unfreeze()
    with torch.no_grad():
        gates.logits.fill_(0.1)
    gp.Distillation(task_weight=0.0).start(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert gates.logits.grad.abs().min() > 0
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.grad.abs().max() > 0 for p in trained)
    assert gates.draws == 0


def test_a_model_as_it_is_has_nothing_to_learn():
    model = tiny_model("llama").train()
    gp.attach(model, gp.GateConfig(noise=0.0, target=0.6))
    distilling = gp.Distillation(hidden_weight=1.0).start(model)
    plain = model.eval()(input_ids=IDS, labels=IDS).loss
    trained = model.train()(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(trained, plain, check_dtype=False)
    assert all(abs(value) < 1e-12 for value in distilling.metrics().values())


def test_what_trains_is_kept_for_the_teacher():
    model = tiny_model("llama").train()
    gp.attach(model, gp.GateConfig(noise=0.0, target=0.6))
    teacher = model.eval()(input_ids=IDS).logits.detach()
    distilling = gp.Distillation(task_weight=0.0).start(model)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    changed = copy.deepcopy(model.state_dict())
    output = model.train()(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(output.loss, literal(output.logits, teacher, 2.0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, changed[name]), name
    assert distilling.metrics()["distillation/kl"] > 0


def test_repaired_weights_are_kept_when_asked():
    model = tiny_model("llama").requires_grad_(False)
    ids = [id(p) for p in model.parameters()]
    down = model.model.layers[0].mlp.down_proj.weight
    teacher = model(input_ids=IDS).logits
    distilling = gp.Distillation().start(model, keep=[down])
    assert len(distilling._kept) == 1
    with torch.no_grad():
        down.zero_()
    model.lm_head.weight.requires_grad_(True)
    output = model.train()(input_ids=IDS)  # no labels: the loss is the distillation alone
    torch.testing.assert_close(output.loss, literal(output.logits, teacher, 2.0))
    assert ids == [id(p) for p in model.parameters()] and down.abs().max() == 0


def test_another_model_as_teacher_and_padding():
    teacher = tiny_model("llama", seed=5)
    model = tiny_model("llama").train()
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    known = teacher(input_ids=IDS, attention_mask=mask).logits
    gp.Distillation(teacher=teacher, task_weight=0.0).start(model)
    output = model(input_ids=IDS, attention_mask=mask, labels=IDS)
    kept = mask.bool()
    torch.testing.assert_close(output.loss, literal(output.logits[kept], known[kept], 2.0))
    output.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_packed_student_learns_from_a_teacher_only():
    model = tiny_model("llama")
    gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.6, width_multiple=4))
    gates.snap()
    gp.pack(model)
    with pytest.raises(ValueError, match=r"teacher: expected one, because .* is packed"):
        gp.Distillation().start(model)
    method = gp.Distillation(hidden_weight=1.0, teacher=tiny_model("llama"))
    method.start(model)
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite() and model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_atp_is_all_decided_open_in_the_teacher():
    pytest.importorskip("peft")
    dense = tiny_model("llama", torch.float32)
    model = copy.deepcopy(dense)
    method = gp.methods.ATP(target=0.5, lora_rank=2, lora_dropout=0.0)
    training = method.start(model, 4, [IDS])
    training.decisions.set(torch.arange(len(training.decisions.hard)) % 2 == 0)
    gp.Distillation(task_weight=0.0).start(model)
    output = model.train()(input_ids=IDS, labels=IDS)
    expected = literal(output.logits, dense(input_ids=IDS).logits, 2.0)
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        gates = gp.attach(model, CONFIG)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        gp.Distillation(hidden_weight=0.5, match="mlps").start(model)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.2)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gates.draws == 1
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


@pytest.mark.parametrize("own", [True, False])
def test_the_newest_distillation_counts_alone(own):
    model = tiny_model("llama").train()
    gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.6))
    set_gates(gates, "mixed")
    teacher = None if own else tiny_model("llama", seed=5)
    method = gp.Distillation(hidden_weight=1.0, teacher=teacher)
    earlier = method.start(model)
    once = model(input_ids=IDS, labels=IDS).loss
    newer = method.start(model)
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, once)
    assert earlier.metrics() == {} and newer.metrics()["distillation/kl"] > 0
    earlier.resume()
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, once)
    assert earlier.metrics()["distillation/kl"] > 0 and newer.metrics() == {}


def test_a_distillation_goes_on_with_the_teacher_of_before():
    model = tiny_model("llama").train()
    dense = copy.deepcopy(model)
    distilling = gp.Distillation(task_weight=0.0).start(model)
    distilling.stop()
    assert not model._forward_hooks and distilling.metrics() == {}
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    distilling.resume()
    distilling.resume()
    output = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(output.loss, literal(output.logits, dense(IDS).logits, 2.0))


def test_peft_that_calls_no_hooks_is_refused(monkeypatch):
    model = with_lora(tiny_model("llama", torch.float32))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.0")
    with pytest.raises(ValueError, match="PEFT 0.20.0 calls .*: pip install"):
        gp.Distillation().start(model)
    gp.Distillation().start(model.get_base_model())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.21.2")
    gp.Distillation().start(model)


def test_refuses():
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        gp.Distillation(temperature=0)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 'a'"):
        gp.Distillation(temperature="a")
    with pytest.raises(ValueError, match="hidden_weight: expected a number >= 0, got 'a'"):
        gp.Distillation(hidden_weight="a")
    with pytest.raises(ValueError, match="teacher: expected a loaded model, or None .*, got 3"):
        gp.Distillation(teacher=3)
    with pytest.raises(ValueError, match="weight and hidden_weight: expected one of them above 0"):
        gp.Distillation(weight=0.0)
    with pytest.raises(ValueError, match=r"match: expected one of .*, got 'attention'"):
        gp.Distillation(match="attention")
    model = tiny_model("llama")
    deeper = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="teacher: expected as many layers of the same width"):
        gp.Distillation(hidden_weight=1.0, teacher=deeper).start(model)
    gp.Distillation().start(model)
    with pytest.raises(ValueError, match="expected an output with logits to distil, got a tuple"):
        model.train()(input_ids=IDS, return_dict=False)
    merged = with_lora(tiny_model("llama"))
    merged.merge_adapter()
    gp.Distillation().start(merged)
    with pytest.raises(ValueError, match="model has merged adapters"):
        merged.train()(input_ids=IDS)


def test_in_a_trainer_whatever_the_accumulation(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = token_ids(16, 6)
    first = []
    for accumulation in (1, 2):
        model = tiny_model("llama", torch.float32)
        callback = gp.GateCallback(
            gp.GateConfig(target=0.6, width_multiple=4, noise=0.0),
            distillation=gp.Distillation(hidden_weight=0.1),
        )
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-3, seed=1,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        # The first steps compare a model with itself: rounding may leave a little less than 0.
        assert all(entry["distillation/kl"] >= -1e-6 for entry in logs)
        assert all("gates/kept_fraction" in entry for entry in logs)
        assert abs(gp.gates_of(model).kept_fraction() - 0.6) <= 0.005
        first.append(logs[1]["loss"])
        gp.pack(model)  # the Trainer is done with the teacher
        model.train()(input_ids=rows[:2], labels=rows[:2]).loss.backward()
    assert first[0] == pytest.approx(first[1], rel=1e-2)


def test_a_second_training_of_a_trainer_distils_from_the_same_teacher(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model("llama", torch.float32)
    dense = copy.deepcopy(model)
    callback = gp.GateCallback(CONFIG, distillation=gp.Distillation(task_weight=0.0))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in token_ids(16, 6)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    logged = []
    for _ in range(2):
        trainer.train()
        logged.append([e["distillation/kl"] for e in trainer.state.log_history if "loss" in e])
        assert callback.distilling.metrics() == {}
    assert len(set(logged[1])) == 4 and logged[1][0] > logged[0][0]
    callback.distilling.resume()
    output = model.train()(input_ids=IDS, labels=IDS)
    expected = literal(output.logits, dense(input_ids=IDS).logits, 2.0)
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
