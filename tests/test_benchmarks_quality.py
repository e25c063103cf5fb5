"""The quality benchmarks on tiny models: what they remove, score, write, and do not do twice."""

import json
from types import SimpleNamespace

import _step_cost
import pytest
import quality
import quality_encoder
import report
import report_quality
import torch
from letters import letter_tokenizer
from tiny import tiny_model, token_ids

from gatepack.methods import FineGates
from gatepack.training import TrainConfig

MADE = ("dense", "recipe", "distilled", "FLAP", "FineGates", "ATP")
TEXT = "The gate that stays open is worth its cost; the others go. "


def jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def language_model(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama", torch.float32).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def test_language_model(language_model, tmp_path, capsys):
    train = jsonl(tmp_path / "train.jsonl", [{"text": TEXT * 12}])
    test = jsonl(tmp_path / "test.jsonl", [{"text": TEXT[::-1] * 20}])
    asked = [{"question": "Open?", "choices": ["yes", "no"], "answer": 0}] * 3
    choices = jsonl(tmp_path / "choices.jsonl", asked)
    arguments = [
        "--domain", "tiny", "--model", str(language_model), "--train", train, "--test", test,
        "--choices", choices, "--kept", "0.7", "--steps", "4", "--window", "16", "--windows", "1",
        "--width-multiple", "2", "--device", "cpu", "--work", str(tmp_path / "work"),
        "--out", str(tmp_path / "out"), "--methods", *MADE,
    ]  # fmt: skip
    quality.main([*arguments, "--train-only"])
    assert not (tmp_path / "out").exists()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/*/made.json")}
    quality.main(arguments)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/*/made.json")}
    rows = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert set(rows) == {f"tiny-{method}-{1.0 if method == 'dense' else 0.7}-0" for method in MADE}
    for name, row in rows.items():
        assert len(row["losses"]) == 4
        kept = 1.0 if "dense" in name else 0.7
        assert row["kept_fraction"] == pytest.approx(kept, abs=0.02), name
        assert row["params"] is None or row["params"][1] < row["params"][0]
        assert row["figures"]["text"]["test.jsonl"]["perplexity"] > 1
        assert 0 <= row["figures"]["choices"]["choices.jsonl"]["accuracy"] <= 1
        assert (row["speed"] is None) == ("dense" in name)
    capsys.readouterr()
    quality.main(arguments)
    assert capsys.readouterr().out == ""


def test_texts_are_read_before_a_model_trains(language_model, tmp_path):
    train, test = (
        jsonl(tmp_path / f"{name}.jsonl", [{"text": TEXT * 12}]) for name in ("train", "test")
    )
    arguments = [
        "--domain", "tiny", "--model", str(language_model), "--train", train, "--test", test,
        "--choices", test, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="line 1 must be an object with a field `question`"):
        quality.main(arguments)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("option", ["--test", "--choices", "--ood"])
def test_what_is_trained_on_is_not_scored(option, tmp_path):
    (tmp_path / "texts").mkdir()
    train, test = (
        jsonl(tmp_path / "texts" / f"{name}.jsonl", [{"text": TEXT}]) for name in ("train", "test")
    )
    linked = tmp_path / "other.jsonl"
    linked.symlink_to(train)
    arguments = ["--domain", "tiny", "--train", train, "--work", str(tmp_path / "work")]
    arguments += [] if option == "--test" else ["--test", test]
    for same in (train, str(linked), str(tmp_path / "texts" / ".." / "texts")):
        with pytest.raises(ValueError, match=f"{option} must not be trained on, got .* --train"):
            quality.main([*arguments, option, same])
    assert not (tmp_path / "work").exists()


def test_an_encoder_is_not_tested_on_what_it_trains_on(tmp_path):
    data = jsonl(tmp_path / "data.jsonl", [{"text": TEXT, "label": "yes"}])
    arguments = ["--model", "none", "--task", "tiny", "--train", data, "--test", data]
    with pytest.raises(ValueError, match="--test must not be trained on"):
        quality_encoder.main(arguments)


def test_page_sets_methods_beside_the_dense_model(tmp_path, monkeypatch):
    stamp = {"device": "chip", "threads": 1, "torch": "2.9", "date": "2026-01-01", "commit": "abc"}
    shared = {"bench": "quality", "domain": "law", "model": "m/tiny", "dirty": False, **stamp}
    shared["train"] = {"steps": 10, "batch_size": 2, "window": 5, "lora_rank": 3, "seed": 0}
    shared["train"]["calibration_batches"] = 4
    (tmp_path / "quality").mkdir()
    cells = (
        ("dense", 1.0, 8.0, 9),
        ("FLAP", 0.6, 16.0, 9),
        ("recipe", 0.6, 10.0, 9),
        ("recipe", 0.6, 12.5, 3, (0.2, 0.5)),
    )
    for number, (method, kept, perplexity, repaired, *close) in enumerate(cells):
        ratios = {"ratios": {"prefill": 1.5, "decode": 1.25}}
        figures = {
            "text": {"t.jsonl": {"perplexity": perplexity}},
            "ood": {"o.txt": {"perplexity": 30.0}},
            "choices": {"c.jsonl": {"accuracy": 0.5}},
        }
        row = {**shared, "method": method, "kept": kept, "kept_fraction": kept, "figures": figures}
        row["speed"] = None if method == "dense" else ratios
        row["train"] = {**shared["train"], "repair_batches": repaired}
        row |= {"close": close[0]} if close else {}
        jsonl(tmp_path / "quality" / f"{number}.json", [row])
    monkeypatch.setattr(report_quality, "RESULTS", tmp_path)
    page = report_quality.quality_page()
    assert "## tiny, law\n\n100 tokens of training for every row, in 10 steps" in page
    assert (
        "| LoRA, nothing removed |  | 0 | 0 | 0 % | 8.00 | 100.0% | 50.0% | 30.00 | 1 | 1 | 1 |"
        in page
    )
    assert "| FLAP |  | 40 | 0 | 40.0% | 16.00 | 50.0% | 50.0% | 30.00 | 1.50 | 1.25 | 1 |" in page
    for cells in (
        "0% | 40 | 90 | 40.0% | 10.00 | 80.0%",
        "20%, 50% | 40 | 30 | 40.0% | 12.50 | 64.0%",
    ):
        assert f"| gatepack's recipe | {cells} |" in page
    assert "chip, 1 threads, torch 2.9, 2026-01-01, commit abc." in page
    assert (
        "| law, 40% removed: perplexity of FLAP over ours | at least 1.00 | 1.60 | pass |" in page
    )
    assert "| law, 40% removed: dense over ours | at least 91% | 80% | short |" in page
    assert "law, 20% removed" not in page


def test_demo_rows_of_earlier_settings_are_left_out(monkeypatch):
    stamp = {"bench": "demo", "device": "chip", "threads": 1, "torch": "2.9", "commit": "abc"}
    rows = []
    cells = (
        (0, 10, 2, 9.0, [0.5]),
        (1, 10, 3, 11.0, [0.5]),
        (2, 20, 1, 5.0, [0.5]),
        (3, 10, 1, 4.0, None),
    )
    for seed, steps, day, perplexity, close in cells:
        rows.append(
            {
                **stamp,
                "dirty": False,
                "date": f"2026-01-0{day}",
                "target": 0.8,
                "seed": seed,
                "train": {"steps": steps, "seed": seed},
                **({"close": close} if close else {}),
                "perplexity": {"base": 20.0, "lora": 8.0, "packed": perplexity},
                "bytes_on_disk": {"base": 4, "packed": 3},
                "speed": {"ratios": {"prefill": 1.5, "decode": 1.25}},
                "error": 1e-6,
            }
        )
    monkeypatch.setattr(report, "rows_of", lambda bench: rows)
    section = report.demo_section()
    assert "10 steps for every column" in section
    assert "| 20% | 2 | 20.00 | 8.00 | 10.00 (9.00-11.00) | 0.75 |" in section


def test_encoder(tmp_path):
    folder = tmp_path / "encoder"
    tiny_model("bert", torch.float32).save_pretrained(folder)
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    records = [
        {"text": text, "text2": "gate", "label": label}
        for text, label in (("open", "yes"), ("closed", "no")) * 8
    ]
    train, test = (jsonl(tmp_path / f"{name}.jsonl", records) for name in ("train", "test"))
    quality_encoder.main(
        [
            "--model",
            str(folder),
            "--task",
            "tiny",
            "--train",
            train,
            "--test",
            test,
            "--kept",
            "0.7",
            "--seeds",
            "0",
            "--batch-size",
            "4",
            "--length",
            "16",
            "--out",
            str(tmp_path),
        ]  # fmt: skip
    )
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*-0.json")}
    assert set(rows) == {
        *(f"tiny-{method}-1.0-0" for method in ("full", "lora", "last_layers")),
        *(f"tiny-{method}-0.7-0" for method in quality_encoder.METHODS[3:]),
    }
    for name, row in rows.items():
        assert len(row["losses"]) == 8 and row["tested"] == 16
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high
        closing = (0.4, 0.4) if "recipe" in name else (0.4, 0.8) if "fine" in name else (0.0, 1.0)
        assert (row["warmup"], row["freeze"]) == closing
        if "0.7" in name:
            assert row["removed"] == pytest.approx(0.3, abs=0.02)
            assert row["speed"]["model"]["decode"] is None
        if "fine_gates" in name:
            for cost in row["step"].values():
                assert cost["runs"] == 5 and cost["error"] < 1e-5
                assert min(cost[f"{name}_{unit}"] for name in ("ours", "masked")
                           for unit in ("ms", "bytes")) > 0  # fmt: skip
        else:
            assert row["step"] is None and (row["removed"] is None) == ("1.0" in name)


def test_page_gives_the_spread_over_seeds(tmp_path, monkeypatch):
    stamp = {"device": "chip", "threads": 1, "torch": "2.9", "date": "2026-01-01", "commit": "abc"}
    shared = {"bench": "quality_encoder", "task": "qnli", "model": "tiny", "dirty": False, **stamp}
    shared |= {"epochs": 2, "batch_size": 4, "length": 16, "tested": 9, "kept": 0.8}
    (tmp_path / "quality").mkdir()
    for seed, accuracy in enumerate((0.7, 0.8, 0.9)):
        row = {**shared, "method": "fine_gates", "accuracy": accuracy, "removed": 0.2, "seed": seed}
        row |= {"warmup": 0.25, "freeze": 0.75}
        row["speed"] = {"ratios": {"prefill": 1.1}}
        cost = {"ratio": 1.5, "ours_bytes": 3, "masked_bytes": 4}
        row["step"] = {"trained": cost, "frozen": {**cost, "ratio": 1.6 + seed}}
        jsonl(tmp_path / "quality" / f"{seed}.json", [row])
    full = {**shared, "method": "full", "kept": 1.0, "removed": None, "speed": None, "step": None}
    inside = {**row, "method": "fine_gates_lora", "accuracy": 0.85, "removed": 0.4, "kept": 0.6}
    jsonl(tmp_path / "quality" / "inside.json", [{**inside, "seed": 0}])
    for seed, accuracy in enumerate((0.95, 0.9, 0.85, 0.1)):
        row = {**full, "accuracy": accuracy, "seed": seed}
        jsonl(tmp_path / "quality" / f"full-{seed}.json", [row])
    monkeypatch.setattr(report_quality, "RESULTS", tmp_path)
    page = report_quality.quality_page()
    spread = "20.0% | 80.0% (70.0%-90.0%) | 1.10"
    step = "1.50 | 2.60 (1.60-3.60) | 75%"
    assert f"| FineGates | {spread} | {step} | 3 |" in page
    assert "over seeds. Gates of FineGates close between 25% and 75% of the steps. Speed" in page
    assert "| full fine-tuning | 0 % | 70.0% (10.0%-95.0%) | 1 |  |  |  | 4 |" in page
    goal = "qnli, 20% removed by FineGates: accuracy below full fine-tuning"
    assert f"| {goal} | at most 0.5% | 10.0% | short |" in page
    assert "| qnli, 40% removed by FineGates, LoRA inside: inference, x dense | at least" in page


def test_page_sets_a_step_beside_masks():
    shared = {"level": "train_step", "model": "tiny", "batch": 1, "tokens": 8, "dtype": "float32"}
    shared |= {"device": "chip", "torch": "2.9", "date": "2026-01-01", "commit": "abc"}
    shared["dirty"] = False
    times = {"ours": (2.0, 30), "masked": (3.0, 60), "dense": (2.5, 40), "oracle": (1.0, 10)}
    rows = [
        {
            **shared,
            "lora": lora,
            "open": 0.6,
            "contender": name,
            "ms": ms + lora,
            "peak_bytes": size,
        }
        for lora in (0, 4)
        for name, (ms, size) in times.items()
    ]
    rows.append({**rows[0], "open": 0.3})  # alone, so not in the table
    goals, section = report_quality.step_section(rows)
    goal = "tiny, 1 x 8, LoRA, 40% closed: step, x masked"
    assert goals == [[goal, "at least 1.30", "1.17", "short"]]
    assert "| tiny, 1 x 8, float32 | none | 60% | 1.50 | 1.25 | 50% | 75% |" in section
    assert "| tiny, 1 x 8, float32 | 4 | 60% | 1.17 | 1.08 | 50% | 75% |" in section
    assert "30%" not in section and section.endswith("chip, torch 2.9, 2026-01-01, commit abc.")


def test_batches_of_like_length_hold_all_examples():
    lengths = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = {"input_ids": [[0] * length for length in lengths]}
    examples = quality_encoder.Examples(encoded, torch.zeros(40), None)
    order = examples.order(4, 20, seed=3)
    assert torch.equal(torch.cat(order).bincount(), torch.full((40,), 2))
    padded = [4 * max(lengths[i] for i in rows) for rows in order]
    assert sum(padded) < 1.25 * 2 * sum(lengths)
    again = examples.order(4, 20, seed=3)
    assert all(torch.equal(*pair) for pair in zip(order, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(order, examples.order(4, 20, 4), strict=True))


@pytest.mark.parametrize("method", quality_encoder.METHODS)
def test_the_pooler_trains_with_the_head(method):
    """It was not trained with the encoder: with it frozen, nothing is learned on its output."""
    if "lora" in method or method == "recipe":
        pytest.importorskip("peft")
    cell = quality_encoder.Cell("mini", "tiny", method, 0.7, 0, 1, 4, 16, 1e-3, 0.2, 0.7)
    model = tiny_model("bert", torch.float32)
    train = TrainConfig(steps=4, lora_rank=2)
    tensors = SimpleNamespace(pad=lambda lists, **_: {k: torch.tensor(v) for k, v in lists.items()})
    encoded = {"input_ids": token_ids(40, 8).tolist()}
    examples = quality_encoder.Examples(encoded, torch.zeros(40, dtype=torch.int64), tensors)
    model, beside = quality_encoder.prepared(cell, model, train, examples)
    weights = model.parameters() if beside is None else beside.weights()
    trained = {id(p) for p in weights if p.requires_grad}
    head = [p for n, p in model.named_parameters() if "pooler" in n or "classifier" in n]
    assert len(head) >= 4 and all(id(p) in trained for p in head)
    query = "layer.0.attention.self.query."
    names = {n for n, p in model.named_parameters() if query in n and id(p) in trained}
    adapted = "lora" in method or method == "recipe"
    assert any(n.endswith("_A.default.weight") for n in names) == adapted
    # The tiny model has no more layers than "last_layers" trains.
    whole = method in ("full", "last_layers", "recipe_full")
    assert any(n.endswith("query.weight") for n in names) == whole


def test_a_wrong_step_is_not_timed(monkeypatch):
    model = tiny_model("bert", torch.float32)
    FineGates(noise=0.1).start(model, 4)
    own = _step_cost.mask_rows_columns

    def halved(*arguments):
        run, logits = own(*arguments)
        return lambda f: 0.5 * run(f), logits

    monkeypatch.setattr(_step_cost, "mask_rows_columns", halved)
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "labels": torch.tensor([0, 1])}
    with pytest.raises(SystemExit, match="a training step is wrong by .*: not timed"):
        _step_cost.step_cost(model, [batch])
