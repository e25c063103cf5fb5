"""The real lm-eval, on a task of a few documents of one's own."""

import json

import pytest
import torch
from letters import letter_tokenizer
from tiny import set_gates, tiny_model

import gatepack as gp
from gatepack.evaluation import EvalConfig, evaluate
from gatepack.scoring import Question, score_questions

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

QUESTIONS = [Question("ab:", ("yes", "no"), 0), Question("cde:", ("maybe", "so", "not"), 2)]
QUESTIONS += [Question(f"{i} + {i} =", (str(2 * i), str(i)), 0) for i in range(4)]
TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 3.0
"""


@pytest.fixture
def task(tmp_path):
    rows = [{"prompt": q.prompt, "choices": q.choices, "answer": q.answer} for q in QUESTIONS]
    file, path = tmp_path / "letters.jsonl", tmp_path / "letters.yaml"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path.write_text(TASK.format(file=file, cache=tmp_path / "cache"), encoding="utf-8")
    return str(path)


def config(*tasks, **fields):
    return EvalConfig(tasks=tasks, latency=False, length=16, windows=1, **fields)


def entry(model, *arguments, **fields):
    report = evaluate(model, letter_tokenizer(), config(*arguments, **fields))
    (found,) = (each for each in report["entries"] if each["kind"] == "task")
    return found


def test_a_task_scores_as_the_same_questions_do_before_and_after_packing(task):
    model = tiny_model("llama", torch.float32).eval()
    gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.6, width_multiple=4))
    set_gates(gates, "mixed")
    asked = QUESTIONS[:5]
    scores = score_questions(model, letter_tokenizer(), asked)
    expected = {
        "acc,none": scores.hits().double().mean().item(),
        "acc_norm,none": scores.hits(per_byte=True).double().mean().item(),
    }
    assert all(0 < accuracy < 1 for accuracy in expected.values())
    found = entry(model, task, questions=len(asked))
    assert found["name"] == "letters"
    assert found["inputs"] == {"version": 3.0, "n_shot": 0, "samples": len(asked)}
    assert found["metrics"] == pytest.approx(expected)
    assert found["higher_is_better"] == dict.fromkeys(expected, True)
    assert set(found["stderr"]) == {"acc_stderr,none", "acc_norm_stderr,none"}
    gp.pack(model)
    assert entry(model, task, questions=len(asked)) == found


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="lm-eval does not have the task .*no_such_task"):
        entry(tiny_model("llama", torch.float32), "no_such_task")
