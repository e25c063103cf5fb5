"""What makes training cheaper or steadier beside gates: the last layers only, mixed precision,
checkpointing, early stopping, weight decay."""

import copy

import pytest
import torch
from tiny import set_gates, tiny_model, token_ids
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import gatepack as gp
from gatepack.training import FineTuning, TrainConfig, tune_last_layers

CONFIG = gp.GateConfig(noise=0.0, target=0.6, width_multiple=4)
IDS = token_ids(3, 8)


@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "gpt2", "opt"])
def test_only_the_last_layers_and_the_head_train(family):
    model = tiny_model(family, torch.float32).train()
    gates = gp.attach(model, CONFIG)
    trained = tune_last_layers(model, 1)
    assert gates.logits.requires_grad
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    names.remove("gatepack_gates.logits")
    assert len(trained) == len(names)
    assert any(".1." in name for name in names)
    assert not any(".0." in name or "embed" in name or "wte" in name for name in names)
    heads = {"bert": "classifier.weight", "roberta": "classifier.dense.weight"}
    assert family not in heads or heads[family] in names
    assert family != "llama" or {"model.norm.weight", "lm_head.weight"} <= set(names)
    training = gp.GateTraining(model, 4)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(training.weights(), lr=1e-2)
    labels = IDS if model.can_generate() else IDS.sum(1) % 2
    model(input_ids=IDS, labels=labels).loss.backward()
    training.step()
    optimizer.step()
    for name, tensor in model.named_parameters():
        assert (name in names) == (not torch.equal(tensor, before[name])) or name.endswith("logits")


def test_how_many_layers_there_are():
    with pytest.raises(ValueError, match="count: expected 0 to 2 layers, got 3"):
        tune_last_layers(tiny_model("llama"), 3)
    assert [p.shape for p in tune_last_layers(tiny_model("llama"), 0)] == [(48,), (97, 48)]


@pytest.mark.parametrize("units", [("heads", "channels"), ("rows", "columns")])
def test_autocast_trains_gates_and_weights_in_fp32(units):
    model = tiny_model("llama", torch.float32).train()
    gates = gp.attach(model, gp.GateConfig(units=units, noise=0.0, target=0.6))
    set_gates(gates, "mixed")
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    for name, grad in expected.items():
        found = dict(model.named_parameters())[name].grad
        assert found.dtype == torch.float32
        assert (found - grad).norm() <= 0.1 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_changes_no_gradient(lora):
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if lora:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            )
            torch.manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(std=0.2)
        gates = gp.attach(model, gp.GateConfig(noise=0.3, target=0.6, init_logit=0.2))
        gates.unfreeze()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert int(gates.draws) == 1
    assert len(grads[0]) == len(grads[1]) > 1
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


class Worse(TrainerCallback):
    """An evaluation that is better at step 2 than at every other."""

    def on_evaluate(self, args, state, control, metrics, **_):
        metrics["eval_loss"] = 1.0 if state.global_step == 2 else 2.0 + state.global_step


@pytest.mark.parametrize("best", [False, True])
def test_early_stopping_ends_at_the_target(best, tmp_path):
    model = tiny_model("llama", torch.float32)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=2, eval_strategy="steps",
        eval_steps=2, save_strategy="steps" if best else "no", save_steps=2,
        load_best_model_at_end=best, metric_for_best_model="loss", report_to=[], use_cpu=True,
        disable_tqdm=True, weight_decay=0.1, learning_rate=1e-3,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in token_ids(12, 6)]
    stop = EarlyStoppingCallback(early_stopping_patience=3)
    schedule = gp.GateSchedule(warmup=0.0, ramp=0.1, freeze=0.2)
    callbacks = [gp.GateCallback(CONFIG, schedule), Worse(), stop]
    run = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)
    run.train()
    assert 2 < run.state.global_step < 30
    gates = gp.gates_of(model)
    assert gates.frozen and abs(gates.kept_fraction() - 0.6) <= 0.005
    ids = token_ids()
    expected = model.eval()(input_ids=ids).logits
    gp.pack(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_weight_decay_shrinks_weights_and_leaves_gates_alone():
    windows = token_ids(8, 12)
    sizes, logits = [], []
    for decay in (0.0, 20.0):
        model = tiny_model("llama", torch.float32).train()
        gates = gp.attach(model, CONFIG)
        gates.freeze()
        settings = TrainConfig(
            steps=4, warmup_steps=0, batch_size=2, window=12, weight_decay=decay,
            learning_rate=1e-2,
        )  # fmt: skip
        FineTuning(model, windows, settings).run()
        sizes.append(float(model.model.layers[0].mlp.up_proj.weight.detach().norm()))
        logits.append(gates.logits.detach().clone())
    assert sizes[1] < 0.8 * sizes[0] and torch.equal(*logits)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        TrainConfig(weight_decay=-1)
