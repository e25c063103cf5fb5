"""FineGates in a Trainer: what trains, evaluation, and runs that go on, also beside LoRA."""

import functools

import pytest
import torch
from interrupted import NoFinish, StopAt, same
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

import gatepack as gp
from gatepack.callback import BESIDE, FILE
from gatepack.files import read_safetensors, write_safetensors
from gatepack.methods import FineGates

METHOD = FineGates(
    budget=0.7, learning_rate=0.05, freeze=0.75, weighting="kurtosis", kurtosis_every=2
)


def with_lora(family, **fields):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = "all-linear" if family == "opt" else ["query", "value"]
    lora = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.1, **fields)
    return peft.get_peft_model(tiny_model(family, torch.float32), lora)


MODELS = {
    "opt": functools.partial(tiny_model, "opt", torch.float32),
    "roberta": functools.partial(tiny_model, "roberta", torch.float32),
    "opt-lora": functools.partial(with_lora, "opt"),
    "roberta-lora": functools.partial(with_lora, "roberta"),
    "roberta-lora-head": functools.partial(with_lora, "roberta", task_type="SEQ_CLS"),
}


def trainer(folder, model, callback, callbacks=(), **arguments):
    generates = gp.layers.hf_model(model).can_generate()
    rows = [
        {"input_ids": row, "labels": row if generates else row.sum() % 2}
        for row in token_ids(24, 6)
    ]
    settings = {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 2, "seed": 5,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(**settings | arguments),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[callback, *callbacks],
    )


@pytest.mark.parametrize("cut", [3, 7])
@pytest.mark.parametrize("name", MODELS)
def test_resumes_bit_for_bit(name, cut, tmp_path):
    make = MODELS[name]
    whole = trainer(tmp_path / "whole", make(), gp.GateCallback(METHOD))
    whole.train()
    trainer(tmp_path / "cut", make(), NoFinish(METHOD), [StopAt(cut)]).train()
    second = trainer(tmp_path / "cut", make(), gp.GateCallback(METHOD))
    second.train(resume_from_checkpoint=True)
    same(second.model.state_dict(), whole.model.state_dict())
    masks = gp.gates_of(whole.model).open_masks()
    assert not all(mask.all() for mask in masks.values())


@pytest.mark.parametrize("trains", ["head_and_biases", "biases", "gates"])
def test_a_checkpoint_has_what_trains_beside_lora_once(trains, tmp_path):
    """Biases, and a head that modules_to_save does not name; PEFT's checkpoint has the rest."""
    kept = {}
    for name in ("roberta-lora", "roberta-lora-head", "roberta"):
        folder = tmp_path / name
        method = FineGates(trains=trains)
        trainer(folder, MODELS[name](), NoFinish(method), [StopAt(1)]).train()
        state, _ = read_safetensors(folder / "checkpoint-1" / FILE)
        kept[name] = {key.removeprefix(BESIDE) for key in state if key.startswith(BESIDE)}
    head = {key for key in kept["roberta-lora"] if ".classifier." in key}
    assert len(head) == (4 if trains == "head_and_biases" else 0)
    assert kept["roberta-lora-head"] == kept["roberta-lora"] - head
    assert len(kept["roberta-lora-head"]) == (0 if trains == "gates" else 12)
    assert all(key.endswith(".bias") for key in kept["roberta-lora-head"])
    assert not kept["roberta"]


def test_biases_that_peft_stores_are_left_to_it(tmp_path):
    make = functools.partial(with_lora, "opt", bias="all")
    whole = trainer(tmp_path / "whole", make(), gp.GateCallback(METHOD))
    whole.train()
    trainer(tmp_path / "cut", make(), NoFinish(METHOD), [StopAt(3)]).train()
    state, _ = read_safetensors(tmp_path / "cut" / "checkpoint-3" / FILE)
    assert not any(key.startswith(BESIDE) for key in state)
    second = trainer(tmp_path / "cut", make(), gp.GateCallback(METHOD))
    second.train(resume_from_checkpoint=True)
    same(second.model.state_dict(), whole.model.state_dict())


def test_a_checkpoint_without_what_trained_is_refused(tmp_path):
    trainer(tmp_path, MODELS["opt-lora"](), NoFinish(METHOD), [StopAt(3)]).train()
    file = tmp_path / "checkpoint-3" / FILE
    state, metadata = read_safetensors(file)
    lacking = {key: t for key, t in state.items() if not key.startswith(BESIDE)}
    write_safetensors(file, lacking, metadata)
    second = trainer(tmp_path, MODELS["opt-lora"](), gp.GateCallback(METHOD))
    with pytest.raises(ValueError, match=rf"{FILE}: {BESIDE}.*bias must be \[48\], got None"):
        second.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["opt", "opt-lora", "roberta-lora"])
def test_the_best_model_is_complete(name, tmp_path):
    states = {}

    class Recorded(TrainerCallback):
        def on_save(self, args, state, control, model, **_):
            kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            states[state.global_step] = kept

    run = trainer(
        tmp_path, MODELS[name](), gp.GateCallback(METHOD), [Recorded()], save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="chosen", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"chosen": float(run.state.global_step == 6)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("-6")
    same(run.model.state_dict(), states[6])
    changed = [key for key, tensor in states[8].items() if not torch.equal(tensor, states[6][key])]
    assert any(key.endswith("bias") for key in changed)


def test_what_trained_beside_lora_is_saved_with_the_model(tmp_path):
    run = trainer(tmp_path, MODELS["opt-lora"](), gp.GateCallback(METHOD), learning_rate=1e-2)
    first = tiny_model("opt", torch.float32).model.decoder.layers[0].fc1.bias
    run.train()
    ids = token_ids(2, 6)
    expected = run.model.eval()(ids).logits.detach()
    merged = run.model.merge_and_unload()
    assert not torch.equal(merged.model.decoder.layers[0].fc1.bias, first)
    gp.pack(merged)
    gp.save_pretrained(merged, tmp_path / "packed")
    found = gp.from_pretrained(tmp_path / "packed")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_head_that_peft_trains_a_copy_of_stays(tmp_path):
    model = MODELS["roberta-lora-head"]()
    FineGates().prepare(model)
    head = [(n, p.requires_grad) for n, p in model.named_parameters() if ".classifier." in n]
    assert len(head) == 8 and all(trains == ("modules_to_save" in n) for n, trains in head)


def test_in_a_trainer(tmp_path):
    method = FineGates(budget=0.7, learning_rate=0.05, freeze=0.75)
    run = trainer(tmp_path, MODELS["opt"](), gp.GateCallback(method))
    model = run.model
    run.train()
    assert abs(gp.gates_of(model).kept_fraction() - 0.7) <= 0.005
    assert any("gates/soft_keep" in entry for entry in run.state.log_history)
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len(held) == 12  # the biases of the gated linears, no norms and no logits
    assert abs(gp.pack(model).kept_fraction - 0.7) <= 0.005


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gates_alone_in_a_trainer(name, tmp_path):
    model = tiny_model(name, torch.float32)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    callback = gp.GateCallback(FineGates.post_train(budget=0.8, linears="blocks"))
    run = trainer(tmp_path, model, callback, weight_decay=0.5, learning_rate=0.5, max_steps=4)
    run.train()
    gates = gp.gates_of(model)
    assert abs(gates.kept_fraction() - 0.8) <= 0.005
    assert callback.training.weights() == [] and gates.frozen
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert not any(p is gates.logits for p in held)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    run.train()
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_evaluation_in_mid_training_has_no_noise(tmp_path):
    method = FineGates(noise=0.3, init_std=0.5, learning_rate=0.05)
    model, seen = MODELS["roberta"](), []

    class Twice(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                gates = gp.gates_of(model)
                draws = int(gates.draws)
                assert gates.noisy
                seen.extend(run.evaluate()["eval_loss"] for _ in range(2))
                assert int(gates.draws) == draws and not gates.frozen
                values = gates.deterministic_values().detach()
                assert 0 < int(((values > 0) & (values < 1)).sum())
                seen.append(noiseless(values))

    def noiseless(values):
        """The loss of a model whose linears are multiplied by the values of their gates."""
        plain = tiny_model("roberta", torch.float32).eval()
        state = {k: t for k, t in model.state_dict().items() if k in plain.state_dict()}
        plain.load_state_dict(state)
        parts = gp.gates_of(model).split(values)
        with torch.no_grad():
            for name in {gate.rpartition(":")[0] for gate in parts}:
                linear = plain.get_submodule(name)
                linear.weight *= parts[f"{name}:rows"][:, None] * parts[f"{name}:columns"]
                linear.bias *= parts[f"{name}:rows"]
            rows = run.eval_dataset
            ids = torch.stack([row["input_ids"] for row in rows])
            return float(plain(ids, labels=torch.stack([row["labels"] for row in rows])).loss)

    run = trainer(tmp_path, model, gp.GateCallback(method), [Twice()])
    run.train()
    first, second, expected = seen
    assert first == second == pytest.approx(expected, rel=1e-5)
