"""Verdicts on curves, which may not rise beyond noise nor be above dense; the main ones exist."""

import _curves
import pytest
import run


def timed_pair(spread=0.01, commit="new", date="1", **fields):
    """fields: those of a level's rows, and ours, dense in ms."""
    times = {name: fields.pop(name) for name in ("ours", "dense")}
    row = {"bench": "level", "level": "mlp", "model": "m", "batch": 1, "tokens": 8, "lora": 0}
    row |= {"dtype": "float32", "open": 1.0, "commit": commit, "date": date, **fields}
    return [
        {**row, "contender": name, "ms": ms, "p20": ms * (1 - spread), "p80": ms * (1 + spread)}
        for name, ms in times.items()
    ]


def closing(shares: dict, **fields) -> list[dict]:
    """Rows in which dense takes 10 ms, twice as long where half are open."""
    busy = {kept: 2 if kept == 0.5 else 1 for kept in shares}
    return [
        row
        for kept, share in shares.items()
        for row in timed_pair(
            open=kept, ours=10 * share * busy[kept], dense=10 * busy[kept], **fields
        )
    ]


@pytest.mark.parametrize(
    ("shares", "spread", "rising", "above"),
    [
        ({1.0: 1.02, 0.8: 0.9, 0.5: 0.7}, 0.01, [], []),
        ({0.5: 0.7, 1.0: 1.02, 0.8: 1.01}, 0.01, [], []),
        ({1.0: 0.9, 0.8: 0.95, 0.5: 0.7}, 0.01, [0.8], []),
        ({1.0: 0.9, 0.8: 0.95, 0.5: 0.7}, 0.05, [], []),
        ({1.0: 0.9, 0.8: 0.7, 0.5: 0.8}, 0.01, [0.5], []),
        ({1.0: 1.2, 0.8: 1.0, 0.5: 1.1}, 0.01, [0.5], [1.0, 0.5]),
    ],
)
def test_a_curve_falls_and_stays_below_dense(shares, spread, rising, above):
    (curve,) = _curves.curves(closing(shares, spread=spread))
    assert [point.at for point in curve.points] == [1.0, 0.8, 0.5]
    assert [point.at for point in curve.rising] == rising
    assert [point.at for point in curve.above] == above
    cells = curve.cells()
    assert len(cells) == len(_curves.HEADER)
    assert cells[-1] == ("short" if rising or above else "pass")
    for cell, points in zip(cells[3:5], (rising, above), strict=True):
        assert [text.split(" ")[0] for text in filter(None, cell.split(", "))] == [
            f"{at:.0%}" for at in points
        ]


def test_a_curve_is_of_the_newest_commit_that_measured_it():
    old = closing({1.0: 1.0, 0.8: 2.0, 0.5: 1.0}, commit="old")
    new = closing({1.0: 1.0, 0.8: 0.8, 0.5: 0.5}, date="2")
    alone = closing({1.0: 9.0}, commit="newest", date="3")
    (curve,) = _curves.curves([*old, *new, *alone])
    assert [round(point.share, 3) for point in curve.points] == [1.0, 0.8, 0.5]
    assert not _curves.curves(alone)
    shown = run.table(new, "cpu", []).splitlines()
    (text,) = (line for line in shown if line.startswith("mlp, m, 1 x 8, float32"))
    assert "1.00 to 0.50" in text and text.endswith("pass")


def test_curves_grow_along_tokens_and_batch():
    rows = []
    for field in ("tokens", "batch"):
        for size, share in ((16, 0.5), (4, 0.8), (2, 1.0)):
            rows += timed_pair(**{field: size}, open=0.6, ours=share * size, dense=1.0 * size)
    along = {curve.along: curve for curve in _curves.curves(rows)}
    assert set(along) == {"tokens", "batch"}
    for curve in along.values():
        assert [point.at for point in curve.points] == [2, 4, 16] and not curve.rising
    assert along["tokens"].cells()[0] == "mlp, m, 1 x T, float32, 60% open"
    assert along["batch"].cells()[:2] == ["mlp, m, B x 8, float32, 60% open",
                                          "batch 2 to 16, 3 points"]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_curve_of_interest_is_measured(device):
    rows = []
    for _, level, fields in run.cases_of("curves", device):
        case = {"level": level, **fields, "open": fields["kept"]}
        rows += timed_pair(**case, ours=1.0, dense=1.0)
    found = {(curve.points[0].row["level"], curve.along) for curve in _curves.curves(rows)}
    closed = {"mlp", "attention", "decoder_layer", "train_step", "decode", "prefill"}
    assert {level for level, along in found if along == "open"} == closed
    assert {("train_step", "tokens"), ("train_step", "batch"), ("mlp", "tokens")} <= found
    begun = {curve.points[0].row["level"] for curve in _curves.curves(rows[: len(rows) // 2])}
    assert begun >= closed, "the closing curves come first"
