"""evaluate: what a report holds, next to the parts computed alone; tasks through a stand-in."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import sys
import types

import pytest
import torch
import transformers
from letters import letter_tokenizer
from tiny import VOCAB, tiny_model

import gatepack as gp
from gatepack import evaluation
from gatepack.data import load_documents, split_documents
from gatepack.evaluation import EvalConfig, evaluate, run
from gatepack.inspection import identify
from gatepack.regression import FORMAT_VERSION, Bounds, compare
from gatepack.scoring import load_questions, score_questions, wilson_interval
from gatepack.texts import TextScore, score_text

WINDOWS = {"length": 16, "windows": 6}
FAST = {**WINDOWS, "latency": False}
TIMED = {**WINDOWS, "prompt_tokens": 8, "new_tokens": 2, "repeats": 1}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", torch.float32).eval()


@pytest.fixture
def files(tmp_path):
    found = {}
    for name, text in (
        ("a.txt", "Gates open and close while a model trains. " * 4),
        ("b.txt", "What stays open is packed."),
        ("c.txt", "ZYXWVUTSRQPONMLKJIHGFEDCBA"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        found[name] = tmp_path / name
    questions = [
        {"question": f"Is {i} odd?", "choices": ["yes", "no"], "answer": 1 - i % 2}
        for i in range(7)
    ]
    found["q.jsonl"] = tmp_path / "q.jsonl"
    lines = [json.dumps(question) for question in questions]
    found["q.jsonl"].write_text("\n".join(lines), encoding="utf-8")
    return found


def by_name(report):
    return {(entry["kind"], entry["name"]): entry for entry in report["entries"]}


def test_entries_are_the_parts_scored_alone(model, files):
    config = EvalConfig(
        texts=(files["a.txt"], files["b.txt"]),
        ood=(files["c.txt"],),
        choices=(files["q.jsonl"],),
        **FAST,
    )
    tokenizer = letter_tokenizer()
    report = evaluate(model, tokenizer, config, name="tiny")
    entries = by_name(report)
    assert list(entries) == [
        ("text", "a.txt"),
        ("text", "b.txt"),
        ("text", "pooled"),
        ("ood", "c.txt"),
        ("choices", "q.jsonl"),
    ]
    scores = {
        name: score_text(model, tokenizer, load_documents(files[name]), **WINDOWS)
        for name in ("a.txt", "b.txt", "c.txt")
    }
    scores["pooled"] = TextScore.joined([scores["a.txt"], scores["b.txt"]])
    for (kind, name), entry in entries.items():
        if kind in ("text", "ood"):
            assert entry["metrics"] == scores[name].metrics()
            assert entry["inputs"] == {"sha256": scores[name].sha256, "length": 16, "stride": 8}
            assert entry["tokens"] == len(scores[name].scores.nats)
            assert entry["bytes"] == scores[name].bytes
            assert 0 <= entry["token_accuracy"] <= 1
    inside = entries["text", "pooled"]["metrics"]["perplexity"]
    outside = entries["ood", "c.txt"]
    assert outside["ratio_to_text"] == outside["metrics"]["perplexity"] / inside
    asked = score_questions(model, tokenizer, load_questions(files["q.jsonl"]), 4)
    right = int(asked.hits().sum())
    entry = entries["choices", "q.jsonl"]
    assert entry["metrics"]["accuracy"] == pytest.approx(right / 7)
    assert entry["metrics"]["accuracy_per_byte"] == pytest.approx(int(asked.hits(True).sum()) / 7)
    assert entry["interval"]["accuracy"] == list(wilson_interval(right, 7))
    assert (entry["questions"], entry["chance"], entry["truncated"]) == (7, 0.5, 0)
    assert report["format"] == FORMAT_VERSION and report["base"] is None
    assert report["environment"]["torch"] == torch.__version__
    assert json.loads(json.dumps(report)) == report


def test_the_same_run_compares_equal_and_changed_files_do_not(model, files):
    config = EvalConfig(texts=(files["b.txt"],), choices=(files["q.jsonl"],), **FAST)
    first = evaluate(model, letter_tokenizer(), config)
    again = compare(evaluate(model, letter_tokenizer(), config), first, Bounds())
    assert (again.violations, again.skipped, again.compared) == ((), (), 6)
    files["b.txt"].write_text("Another text, which is longer.", encoding="utf-8")
    other = compare(evaluate(model, letter_tokenizer(), config), first, Bounds())
    assert "text b.txt: not compared, sha256 is " in other.skipped[0] and other.compared == 3


def test_default_text_is_the_manual_that_the_demo_holds_out(model):
    report = evaluate(model, letter_tokenizer(), EvalConfig(**FAST))
    (entry,) = report["entries"]
    manual = split_documents(load_documents(None))[1]
    assert entry["name"] == evaluation.DEFAULT_TEXT
    expected = score_text(model, letter_tokenizer(), manual, **WINDOWS)
    assert entry["inputs"]["sha256"] == expected.sha256


def test_base_is_scored_on_the_same_inputs(model, files):
    base = tiny_model("llama", torch.float32, seed=3).eval()
    config = EvalConfig(
        texts=(files["b.txt"],), ood=(files["c.txt"],), choices=(files["q.jsonl"],), **FAST
    )
    report = evaluate(model, letter_tokenizer(), config, base=(base, letter_tokenizer()))
    alone = by_name(evaluate(base, letter_tokenizer(), config))
    for key, entry in by_name(report).items():
        assert entry["base"] == alone[key]["metrics"]
        for metric in ("perplexity", "bits_per_byte") if key[0] != "choices" else ():
            ratio = entry["metrics"][metric] / entry["base"][metric]
            assert entry["relative_change"][metric] == pytest.approx(ratio - 1)
    assert by_name(report)["choices", "q.jsonl"]["relative_change"] == {}
    assert report["base"]["parameters"] == report["model"]["parameters"]


def test_base_with_another_tokenizer_is_compared_by_bits_only(model, files):
    class Pairs:
        """Two letters to a token, so half as many tokens."""

        bos_token_id = eos_token_id = 0

        def __call__(self, texts, add_special_tokens, verbose):
            return {
                "input_ids": [[3 + ord(c) % 90 for c in text[: len(text) // 2]] for text in texts]
            }

    config = EvalConfig(texts=(files["b.txt"],), length=64, windows=0, latency=False)
    report = evaluate(model, letter_tokenizer(), config, base=(model, Pairs()))
    assert set(report["entries"][0]["relative_change"]) == {"bits_per_byte"}


def test_latency_is_what_measure_found(model, files):
    config = EvalConfig(texts=(files["b.txt"],), **TIMED)
    report = evaluate(model, letter_tokenizer(), config, base=(model, letter_tokenizer()))
    entry = by_name(report)["latency", "random prompts"]
    speed = entry["measurement"]["model"]
    for phase in ("prefill", "decode"):
        milliseconds = entry["metrics"][f"{phase}_ms_per_token"]
        assert milliseconds == pytest.approx(1000 / speed[phase]["median"])
    assert entry["measurement"]["dense"] is not None
    assert entry["inputs"]["prompt_tokens"] == 8 and entry["inputs"]["batch_size"] == 1


def test_identity_of_dense_gated_and_packed_models():
    model = tiny_model("llama", torch.float32)
    total = sum(p.numel() for p in model.parameters())
    dense = identify(model, "tiny")
    assert (dense["name"], dense["class"], dense["state"]) == ("tiny", "LlamaForCausalLM", "dense")
    assert (dense["parameters"], dense["kept_fraction"]) == (total, 1.0)
    assert dense["widths"] == {"heads": [6, 6], "kv_heads": [2, 2], "channels": [40, 40]}
    gates = gp.attach(model, gp.GateConfig(target=0.5, width_multiple=4))
    gates.close("model.layers.0.mlp:channels", range(30))
    gated = identify(model)
    assert (gated["state"], gated["parameters"]) == ("gated", total)
    assert gated["kept_fraction"] == gates.kept_fraction()
    found = gp.pack(model)
    packed = identify(model)
    assert (packed["state"], packed["parameters"]) == ("packed", found.params[1])
    assert packed["kept_fraction"] == pytest.approx(found.kept_fraction)
    assert packed["widths"]["channels"] == [10, 40]


def test_model_of_a_family_without_a_row_has_no_widths():
    config = transformers.GPTJConfig(
        n_embd=16, n_layer=1, n_head=2, n_inner=8, rotary_dim=4, vocab_size=VOCAB
    )
    found = identify(transformers.GPTJForCausalLM(config))
    assert (found["widths"], found["state"]) == (None, "dense")


def test_files_of_one_name_are_told_apart(model, files, tmp_path):
    other = tmp_path / "other" / "b.txt"
    other.parent.mkdir()
    other.write_text("The other text.", encoding="utf-8")
    config = EvalConfig(texts=(files["b.txt"], other, files["b.txt"]), **FAST)
    names = [name for _, name in by_name(evaluate(model, letter_tokenizer(), config))]
    assert names == [files["b.txt"].as_posix(), other.as_posix(), "pooled"]


def test_only_so_many_questions_are_asked(model, files):
    config = EvalConfig(choices=(files["q.jsonl"],), questions=3, **FAST)
    (entry,) = evaluate(model, letter_tokenizer(), config)["entries"]
    assert entry["questions"] == 3


def test_errors_name_the_input(model, files, tmp_path):
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    for config, message in (
        (EvalConfig(texts=(tmp_path / "empty.txt",), **FAST), "empty.txt is empty"),
        (EvalConfig(choices=(tmp_path / "none.jsonl",), **FAST), "none.jsonl cannot be read"),
        (EvalConfig(texts=(files["b.txt"],), length=4096), "b.txt: length is 4096 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, letter_tokenizer(), config)
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="short.txt: a text needs a token to predict"):
        config = EvalConfig(texts=(tmp_path / "short.txt",), **FAST)
        evaluate(model, letter_tokenizer(eos=False), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length must be >= 2"),
        ({"stride": 512}, "stride must lie in 1..511"),
        ({"questions": -1}, "questions must be >= 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"repeats": 0}, "repeats must be >= 1, got 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**settings)


def test_arguments_of_other_types_are_named(model):
    with pytest.raises(ValueError, match="tokenizer must be one of transformers, got NoneType"):
        evaluate(model, None)
    with pytest.raises(ValueError, match="config must be an EvalConfig or None, got dict"):
        evaluate(model, letter_tokenizer(), {})


def test_run_loads_by_name_and_writes_the_report(model, files, tmp_path):
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    config = EvalConfig(texts=(files["b.txt"],), **FAST)
    out = tmp_path / "new" / "report.json"
    report = run(str(folder), config, base=str(folder), device="cpu", out=out)
    assert json.loads(out.read_text(encoding="utf-8")) == report
    assert list(out.parent.iterdir()) == [out]
    assert report["model"]["name"] == report["base"]["name"] == str(folder)
    assert report["entries"][0]["relative_change"] == {"perplexity": 0.0, "bits_per_byte": 0.0}
    half = run(str(folder), config, device="cpu", dtype="bfloat16")
    assert half["model"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16"):
        run(str(folder), config, dtype="int8")


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in with the part of lm-eval 0.4 that is used; says how it was called."""
    calls = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            calls["wrapped"] = (pretrained, tokenizer, batch_size)

    def simple_evaluate(model, tasks, limit, log_samples):
        if "none" in tasks:
            raise KeyError("none")
        calls["evaluated"] = (type(model), tasks, limit, log_samples)
        return {
            "results": {
                "arc": {
                    "alias": "arc",
                    "acc,none": 0.25,
                    "acc_stderr,none": 0.1,
                    "acc_norm,none": 0.5,
                    "acc_norm_stderr,none": "N/A",
                },
                "wiki": {"alias": "wiki", "word_perplexity,none": 12.0},
            },
            "versions": {"arc": 1.0, "wiki": 2},
            "n-shot": {"arc": 0, "wiki": 0},
            "n-samples": {"arc": {"original": 99, "effective": 5}},
            "higher_is_better": {
                "arc": {"acc": True, "acc_norm": True},
                "wiki": {"word_perplexity": False},
            },
        }

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    sys.modules["lm_eval.models.huggingface"].HFLM = HFLM
    calls["HFLM"] = HFLM
    return calls


def test_tasks_are_run_by_lm_eval_on_the_given_model(model, lm_eval):
    tokenizer = letter_tokenizer()
    config = EvalConfig(tasks=("arc", "wiki"), questions=5, **FAST)
    report = evaluate(model, tokenizer, config)
    assert lm_eval["wrapped"] == (model, tokenizer, 4)
    assert lm_eval["evaluated"] == (lm_eval["HFLM"], ["arc", "wiki"], 5, False)
    assert report["entries"] == [
        {
            "kind": "task",
            "name": "arc",
            "inputs": {"version": 1.0, "n_shot": 0, "samples": 5},
            "metrics": {"acc,none": 0.25, "acc_norm,none": 0.5},
            "stderr": {"acc_stderr,none": 0.1},
            "higher_is_better": {"acc,none": True, "acc_norm,none": True},
        },
        {
            "kind": "task",
            "name": "wiki",
            "inputs": {"version": 2, "n_shot": 0, "samples": None},
            "metrics": {"word_perplexity,none": 12.0},
            "stderr": {},
            "higher_is_better": {"word_perplexity,none": False},
        },
    ]
    evaluate(model, tokenizer, dataclasses.replace(config, questions=0))
    assert lm_eval["evaluated"][2] is None
    with pytest.raises(ValueError, match="lm-eval does not have the task 'none'"):
        evaluate(model, tokenizer, EvalConfig(tasks=("none",), **FAST))


def test_missing_lm_eval_is_named_before_the_work(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tasks=arc,wiki needs lm-eval: pip install lm-eval"):
        run("no-such-model", EvalConfig(tasks=("arc", "wiki")))


def test_nan_weights_give_nan_and_a_violation(model, files):
    config = EvalConfig(texts=(files["b.txt"],), **FAST)
    before = evaluate(model, letter_tokenizer(), config)
    broken = tiny_model("llama", torch.float32)
    broken.lm_head.weight.data[5, 0] = float("nan")
    after = evaluate(broken, letter_tokenizer(), config)
    assert math.isnan(after["entries"][0]["metrics"]["perplexity"])
    assert len(compare(after, before, Bounds()).violations) == 3
