"""compare: which values are set against each other, and what counts as worse."""

import copy
import json
import math

import pytest

from gatepack.regression import FORMAT_VERSION, Bounds, compare, load_report


def report():
    return {
        "format": FORMAT_VERSION,
        "entries": [
            {
                "kind": "text",
                "name": "a.txt",
                "inputs": {"sha256": "a" * 64, "length": 512, "stride": 256},
                "tokens": 100,
                "metrics": {"perplexity": 20.0, "bits_per_byte": 1.0, "calibration_error": 0.02},
            },
            {
                "kind": "choices",
                "name": "q.jsonl",
                "inputs": {"sha256": "b" * 64},
                "metrics": {"accuracy": 0.5, "accuracy_per_byte": 0.55, "calibration_error": 0.1},
            },
            {
                "kind": "task",
                "name": "arc",
                "inputs": {"version": 1.0, "n_shot": 0, "samples": 9},
                "metrics": {"acc,none": 0.5, "word_perplexity,none": 10.0, "count,none": 5.0},
                "higher_is_better": {
                    "acc,none": True,
                    "word_perplexity,none": False,
                    "count,none": None,
                },
            },
            {
                "kind": "latency",
                "name": "random prompts",
                "inputs": {"device": "cpu", "threads": 1},
                "metrics": {"prefill_ms_per_token": 2.0, "decode_ms_per_token": 40.0},
            },
        ],
    }


def changed(entry, **metrics):
    new = report()
    new["entries"][entry]["metrics"].update(metrics)
    return compare(new, report(), Bounds())


def test_equal_reports_compare_every_value():
    found = compare(report(), report(), Bounds())
    assert (found.violations, found.skipped, found.compared) == ((), (), 10)


@pytest.mark.parametrize(
    ("entry", "metric", "allowed", "refused"),
    [
        (0, "perplexity", 20.4, 20.41),
        (0, "bits_per_byte", 1.01, 1.0101),
        (0, "calibration_error", 0.07, 0.0701),
        (1, "accuracy", 0.49, 0.4899),
        (1, "accuracy_per_byte", 0.541, 0.5399),
        (1, "calibration_error", 0.149, 0.1501),
        (2, "acc,none", 0.49, 0.4899),
        (2, "word_perplexity,none", 10.2, 10.21),
        (3, "prefill_ms_per_token", 2.1, 2.11),
        (3, "decode_ms_per_token", 42.0, 42.1),
    ],
)
def test_each_metric_has_its_bound(entry, metric, allowed, refused):
    assert changed(entry, **{metric: allowed}).violations == ()
    (line,) = changed(entry, **{metric: refused}).violations
    assert metric in line and f"is {refused:.6g}, was " in line and ", allowed " in line


def test_a_violation_names_both_values_and_the_bound():
    assert changed(0, perplexity=21.0).violations == (
        "text a.txt: perplexity is 21, was 20: 1.0500x, allowed 1.02",
    )
    assert changed(1, accuracy=0.4).violations == (
        "choices q.jsonl: accuracy is 0.4, was 0.5: a drop of 0.1000, allowed 0.01",
    )


def test_better_and_undirected_values_are_no_violation():
    assert changed(0, perplexity=2.0, bits_per_byte=0.1, calibration_error=0.0).violations == ()
    assert changed(2, **{"acc,none": 1.0, "count,none": 500.0}).violations == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_worse(value):
    assert len(changed(0, perplexity=value).violations) == 1


def test_other_inputs_are_not_compared_and_said():
    new = report()
    new["entries"][0]["inputs"] = {"sha256": "c" * 64, "length": 128, "stride": 256}
    new["entries"][0]["metrics"]["perplexity"] = 99.0
    found = compare(new, report(), Bounds())
    assert found.violations == () and found.compared == 7
    assert found.skipped == (
        "text a.txt: not compared, sha256 is cccccccccccc..., was aaaaaaaaaaaa..., "
        "length is 128, was 512",
    )


def test_perplexity_of_another_tokenizer_is_not_compared_but_its_bits_are():
    new = report()
    new["entries"][0]["tokens"] = 120
    new["entries"][0]["metrics"].update(perplexity=99.0, bits_per_byte=1.5)
    found = compare(new, report(), Bounds())
    assert found.skipped == ("text a.txt: perplexity not compared, 120 tokens against 100",)
    assert len(found.violations) == 1 and "bits_per_byte is 1.5" in found.violations[0]


def test_what_is_missing_is_a_violation():
    new = report()
    del new["entries"][1], new["entries"][0]["metrics"]["bits_per_byte"]
    found = compare(new, report(), Bounds())
    assert found.violations == (
        "text a.txt: bits_per_byte is missing from the new report",
        "choices q.jsonl: missing from the new report",
    )


def test_an_entry_that_is_new_is_no_violation():
    old = report()
    del old["entries"][1]
    assert compare(report(), old, Bounds()).violations == ()


def test_nothing_to_compare_is_a_violation():
    new = copy.deepcopy(report())
    for entry in new["entries"]:
        entry["inputs"] = {}
    found = compare(new, report(), Bounds())
    assert found.violations == ("no value could be compared",) and len(found.skipped) == 4


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [("perplexity_ratio", 0.9, 1), ("accuracy_drop", -0.1, 0), ("latency_ratio", math.nan, 1)],
)
def test_bounds_are_checked(field, value, least):
    with pytest.raises(ValueError, match=f"{field} must be >= {least}, got {value}"):
        Bounds(**{field: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "r.json is not a report: "),
        ("[]", "in format 1 .it says None"),
        ('{"format": 2, "entries": []}', "in format 1 .it says 2"),
        ('{"format": 1}', "is not a report of gatepack eval"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_report(tmp_path / "r.json")


def test_reports_are_read_back(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(report()), encoding="utf-8")
    assert load_report(tmp_path / "r.json") == report()


@pytest.mark.parametrize("entry", [3, {"kind": "text", "name": "a.txt"}])
def test_entries_without_their_fields_are_refused(tmp_path, entry):
    content = {"format": FORMAT_VERSION, "entries": [entry]}
    (tmp_path / "r.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="r.json has an entry without .*inputs, metrics"):
        load_report(tmp_path / "r.json")
