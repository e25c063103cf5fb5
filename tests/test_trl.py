"""TRL's SFTTrainer on raw text: accumulation, evaluation and resume, by every kind of method."""

import math

import pytest
import torch
from letters import ids_of, letter_tokenizer
from tiny import tiny_model
from trainers import METHODS, STEPS, callback_of, cut_off_and_resumed, logged

import gatepack as gp

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEXTS = [("abc de fgh " * 3)[start : start + 14] for start in range(7)] * 4


def sft(name, folder, kind, callbacks):
    tokenizer = letter_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    arguments = trl.SFTConfig(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=2, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, bf16=False, seed=5, learning_rate=1e-3,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=tiny_model("llama", torch.float32), args=arguments, train_dataset=rows,
        eval_dataset=rows.select(range(4)), processing_class=tokenizer,
        callbacks=[callback_of(name, kind), *callbacks],
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_exact(name, tmp_path):
    def make(*arguments):
        return sft(name, *arguments)

    whole, resumed = cut_off_and_resumed(make, tmp_path)
    first = whole.train_dataset[0]["input_ids"]
    assert list(first) == [*ids_of(TEXTS[0]), whole.processing_class.eos_token_id]

    target = METHODS[name][1]
    assert abs(gp.gates_of(whole.model).kept_fraction() - target) <= 0.005
    kept = logged(whole, "gates/kept_fraction")
    assert abs(kept[STEPS] - target) <= 0.005

    losses, scored = logged(whole, "loss"), logged(whole, "eval_loss")
    assert list(losses) == [*range(1, STEPS + 1)] and list(scored) == [2, 4, 6, 8]
    assert all(map(math.isfinite, [*losses.values(), *scored.values()]))
    assert logged(resumed, "loss") == losses and logged(resumed, "eval_loss") == scored

    assert whole.evaluate()["eval_loss"] == pytest.approx(scored[STEPS], rel=1e-5)
