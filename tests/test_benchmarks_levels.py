"""The benchmark suite on tiny shapes: levels agree, goals are judged, a cut-off run goes on."""

import argparse
import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import _counted
import _figures
import _harness
import _measure
import _results
import _roofline
import bench_startup
import compare
import goals
import pytest
import run
import torch
from _contenders import FineGatesLinear, prune_mlp
from _models import build, kept_channels, kept_groups
from _suite import Case, modules

LEVELS = modules(folder="levels")
TINY = {"model": "minilm-l6", "tokens": 3, "kept": 0.6, "layers": 1}
RATES = {"flops": 1e11, "bytes": 1e10, "copy": 1e10, "read": 1e10}


def tiny(level: str, **fields) -> Case:
    own = {"model": "roberta-base", "kept": 1.0} if level == "finegates_step" else {}
    return Case(**{**TINY, **own, **fields}, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    import _models

    monkeypatch.setitem(_models.DEPTH, "roberta-base", (1, 64))
    monkeypatch.setattr(_harness.torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("level", LEVELS)
def test_contenders_of_a_level_agree(level):
    case = tiny(level)
    work = LEVELS[level].work(case)
    for name in work.needs_gpu:
        work.contenders.pop(name, None)
    steps, errors = _measure.prepare(work, case.dtype, compiled=False)
    assert {"ours", "masked"} <= set(errors) <= set(steps)
    assert "finegates" in steps if level in ("mlp", "finegates_step") else "dense" in steps
    assert ("torch_pruning" in steps) == (level == "mlp")
    for step in steps.values():
        step()


@pytest.mark.parametrize("level", ["mlp", "train_step"])
def test_lora_contenders_agree(level):
    pytest.importorskip("peft")
    case = tiny(level, lora=2)
    work = LEVELS[level].work(case)
    _, errors = _measure.prepare(work, case.dtype, compiled=False)
    assert {"ours", "masked"} <= set(errors)


def test_a_training_step_leaves_the_weights_as_they_were():
    work = LEVELS["train_step"].work(tiny("train_step"))
    ours = work.contenders["ours"]
    before = [t.detach().clone() for t in ours.inputs]
    ours.run((torch.ones(()),))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.inputs, strict=True))


def test_kept_units_leave_the_fraction_that_is_asked_for():
    shape = tiny("mlp").shape
    for kept in (1.0, 0.6, 0.3):
        groups = kept_groups(shape, kept)
        channels = kept_channels(shape, kept, ("heads", "channels"))
        attention = 2 * shape.head_dim * (shape.heads + shape.kv_heads)
        left = attention * groups / shape.kv_heads + 3 * channels
        assert kept - 0.01 < left / (attention + 3 * shape.mlp) <= kept
        assert kept_channels(shape, kept, ("channels",)) == round(kept * shape.mlp)


def test_published_fine_gates_at_one_are_the_linear():
    linear = torch.nn.Linear(6, 5)
    gated = FineGatesLinear(linear, 1.0).eval()
    x = torch.randn(2, 6)
    torch.testing.assert_close(gated(x), linear(x))
    assert gated.penalty(0.0) < 0.05


def test_torch_pruning_cuts_what_a_mask_would_leave_out():
    mlp = build(tiny("mlp"), layers=1, vocabulary=16).model.layers[0].mlp
    x, z = torch.randn(1, 3, 384), torch.ones(1536)
    z[::2] = 0
    masked = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * z)
    pruned = prune_mlp(mlp, (z == 0).nonzero().squeeze(1), x)
    assert pruned.down_proj.weight.shape == (384, 768)
    assert pruned.gate_proj.weight.shape == pruned.up_proj.weight.shape == (768, 384)
    assert not any(p.requires_grad for p in pruned.parameters())
    torch.testing.assert_close(pruned(x), masked)


def test_peak_memory_counts_what_is_held_at_once():
    def step():
        a = torch.ones(1 << 18)
        b = a + 1
        del a
        return b + 1

    assert (1 << 21) <= _harness.peak_bytes(step, "cpu") < (1 << 21) + (1 << 16)


def rows_for(goal: goals.Goal, **times: float) -> list[dict]:
    setting = {"bench": "level", "level": goal.name, "model": goal.case["model"]}
    setting |= {"tokens": goal.case["tokens"], "batch": 1, "lora": 0, "open": goal.case["kept"]}
    setting |= {"dtype": "float32"}
    more = {"peak_bytes": 100, "bytes": 8e6, "roofline": 0.5, "flops": 1e9}
    return [{**setting, "contender": n, "ms": ms, **more} for n, ms in times.items()]


def test_goals_are_judged_by_their_bound():
    goal = next(g for g in goals.GOALS if g.device == "cpu" and g.against == "dense")

    def judged(goal, *rows):
        verdict = goals.judge(goal, list(rows))
        return None if verdict is None else (verdict.reached, verdict.passed)

    assert judged(goal, *rows_for(goal, ours=2.0, dense=3.0)) == (1.5, True)
    assert judged(goal, *rows_for(goal, ours=2.5, dense=3.0)) == (1.2, False)
    assert judged(goal, *rows_for(goal, ours=2.0)) is None
    halved = [{**row, "dtype": "bfloat16"} for row in rows_for(goal, ours=2.0, dense=3.0)]
    assert judged(goal, *halved) is None
    peak = dataclasses.replace(goal, measure="peak", bound=0.9)
    assert judged(peak, *rows_for(goal, ours=2.0, dense=3.0)) == (1.0, False)
    read = dataclasses.replace(goal, measure="read", bound=0.3)
    row = {"bench": "ceilings", "dtype": "float32"}
    best = [{**row, **RATES}, {**row, **dict.fromkeys(RATES, 1.0)}]
    best.append({**row, **dict.fromkeys(RATES, 1e20), "dtype": "bfloat16"})
    assert judged(read, *rows_for(goal, ours=2.0)) is None
    assert judged(read, *best, *rows_for(goal, ours=2.0)) == (0.4, True)


def test_goals_are_judged_over_the_runs_of_the_newest_commit():
    goal = next(g for g in goals.GOALS if g.device == "cpu" and g.against == "dense")
    runs = (("old", "1", 9.0), ("new", "2", 3.0), ("new", "3", 1.0), ("new", "4", 2.8))
    rows = [
        {**row, "commit": commit, "date": date}
        for commit, date, dense in runs
        for row in rows_for(goal, ours=2.0, dense=dense)
    ]
    verdict = goals.judge(goal, rows)
    assert (verdict.reached, verdict.low, verdict.high) == (1.4, 0.5, 1.5)
    assert not verdict.passed and verdict.rows["dense"]["date"] == "4"
    alone = {**rows_for(goal, ours=1.0)[0], "commit": "newer", "date": "5"}
    assert goals.judge(goal, [*rows, alone]) == verdict


def test_every_goal_names_a_case_that_is_measured():
    measured = {
        (kind, name, json.dumps(fields, sort_keys=True))
        for device in ("cpu", "cuda")
        for kind, name, fields in run.cases_of("goals", device)
    }
    for goal in goals.GOALS:
        if goal.bench == "level":
            assert ("level", goal.name, json.dumps(goal.case, sort_keys=True)) in measured


def test_every_gpu_goal_has_a_prediction():
    facts = _roofline.read_facts(run.FACTS)
    assert facts
    for goal in goals.GOALS:
        if goal.device == "gpu" and goal.bench != "startup":
            for chip in _roofline.CHIPS.values():
                assert 0.3 < _roofline.predicted(goal, chip, facts) < 10


def test_predictions_follow_bytes_and_flops():
    chip = _roofline.CHIPS["H100"]
    big = _roofline.matmul(8192, 8192, 8192)
    wider = dataclasses.replace(chip, bytes=2 * chip.bytes)
    assert _roofline.seconds([big], chip) == _roofline.seconds([big], wider)
    copy = _roofline.stream(1e9)
    assert _roofline.seconds([copy], chip) > 1.9 * _roofline.seconds([copy], wider)
    half = [{"op": "o", "arch": "sm_90", "has_dot": True, "grid": 133, "resident": 1}]
    assert _roofline.wave_share(half, chip, "o") == 133 / 264


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Options of a run whose only case is a tiny MLP, and how often it was measured."""
    seen, own = [], run.run_level
    monkeypatch.setattr(run, "ceilings", lambda *_: RATES)
    monkeypatch.setattr(
        run, "run_level", lambda *a, **k: seen.append(a[0]) or own(*a, **{**k, "compiled": False})
    )
    own_stamp = run.environment
    monkeypatch.setattr(run, "environment", lambda device: {**own_stamp(device), "dirty": False})
    tiny_case = {key: TINY[key] for key in ("model", "tokens", "kept")}
    monkeypatch.setattr(run, "cases_of", lambda *_: [("level", "mlp", tiny_case)])
    options = argparse.Namespace(
        device="cpu", dtype=None, out=tmp_path, budget=1.0, again=False, parts=("levels",), tried=[]
    )
    return options, seen


def test_a_run_writes_as_it_goes_and_goes_on(bench, capsys):
    options, seen = bench
    first = run.Bench(options)
    first.part("levels")
    rows = run.read_results(options.out)
    names = {row["contender"] for row in rows if row["bench"] == "level"}
    assert {"ours", "masked", "dense", "oracle", "finegates", "liger"} <= names
    assert next(r for r in rows if r.get("contender") == "liger")["skipped"]
    assert all(r["peak_bytes"] > 0 for r in rows if "ms" in r)
    run.Bench(options).part("levels")
    assert seen == ["mlp"]
    options.dtype = "bfloat16"
    run.Bench(options).part("levels")
    assert seen == ["mlp"] * 2
    options.again = True
    run.Bench(options).part("levels")
    assert seen == ["mlp"] * 3
    options.again, bench_of_changed = False, run.Bench(options)
    bench_of_changed.stamp["dirty"] = True
    bench_of_changed.part("levels")
    assert seen == ["mlp"] * 4
    text = run.table(rows, "cpu", [])
    assert "gpu: MLP step, 60 % open" in text and "not measured" in text and "liger" in text


def test_a_script_that_was_cut_off_is_run_again(bench, monkeypatch):
    options, _ = bench
    calls, own = [], subprocess.run

    def started(command, **settings):
        if command[0] != sys.executable:
            return own(command, **settings)
        calls.append(command)
        if len(calls) == 1:
            (options.out / "startup.jsonl").write_text(json.dumps({"bench": "startup"}) + "\n")
            raise subprocess.TimeoutExpired(command, 1)
        return None

    monkeypatch.setattr(run.subprocess, "run", started)
    for count in (1, 2, 2):
        first = run.Bench(options)
        first.part("startup")
        assert len(calls) == count and bool(first.failed) == (count == 1)


def test_a_run_out_of_time_says_what_it_left_out(bench):
    options, seen = bench
    options.budget = 0.0
    late = run.Bench(options)
    late.part("levels")
    assert not seen and late.left_out == ['mlp {"model": "minilm-l6", "tokens": 3, "kept": 0.6}']


def test_a_wrong_contender_fails_the_run(bench, monkeypatch):
    options, _ = bench

    def wrong(*_, **__):
        raise SystemExit("ours: result 0 is wrong by 1.0e+00 (masked: 1.0e-07): not timed")

    monkeypatch.setattr(run, "run_level", wrong)
    failing = run.Bench(options)
    failing.part("levels")
    assert "result 0 is wrong" in failing.failed[0]
    assert not [r for r in run.read_results(options.out) if r["bench"] == "level"]


def test_every_part_names_cases_once():
    for device in ("cpu", "cuda"):
        for part in ("goals", "levels", "ops", "curves"):
            found = run.cases_of(part, device)
            assert found and len(found) == len({json.dumps(c, sort_keys=True) for c in found})
            assert {n for kind, n, _ in found if kind == "level"} <= set(LEVELS)


def test_figures_are_svg_of_the_results(tmp_path, monkeypatch):
    stamp = {"commit": "abc", "dirty": False, "date": "2026-01-01", "threads": 1, "torch": "2.9"}
    stamp |= {"device": "chip", "dtype": "float32"}
    goal = next(g for g in goals.GOALS if g.device == "cpu")
    rows = [{"bench": "ceilings", **RATES, **stamp}]
    for kept, ms in ((1.0, 4.0), (0.6, 2.0), (0.3, 1.0)):
        for row in rows_for(goal, ours=ms, dense=3.8, oracle=1.0):
            spread = {"p20": 0.99 * row["ms"], "p80": 1.01 * row["ms"]}
            rows.append({**row, "open": kept, **spread, **stamp})
    step = {"bench": "level", "level": "train_step", "model": "smollm2-135m", "batch": 1}
    step |= {"tokens": 8, "lora": 0, "open": 0.6, "contender": "ours", "ms": 3.0, **stamp}
    step |= {"breakdown": {"matmul": 2.0, "other": 1.0}, "flops": 1e9, "bytes": 1e6}
    rows.append({**step, "roofline": 0.1})
    rows.append({**step, "tokens": 4, "breakdown": {"packing": 9.0}})
    rows.append({**step, "lora": 8, "breakdown": {"loss": 9.0}})
    rows.append({**step, "dtype": "bfloat16", "tokens": 99, "breakdown": {"halves": 9.0}})
    absent = {key: value for key, value in rows[2].items() if key != "ms"}
    rows.append({**absent, "skipped": "not installed", "date": "2026-01-02"})
    (tmp_path / "chip").mkdir()
    (tmp_path / "chip" / "levels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    made = _results.figures()
    assert set(made) == {"speedup-chip.svg", "roofline-chip.svg", "step-chip.svg"}
    for text in made.values():
        ElementTree.fromstring(text)
        assert "chip, 1 threads, torch 2.9, 2026-01-01, commit abc" in text
    shown = made["step-chip.svg"]
    assert "smollm2-135m, 1 x 8 tokens, 60% open" in shown
    assert "matmul" in shown
    assert not any(other in shown for other in ("packing", "loss", "halves"))
    lost = "mlp, smollm2-135m, 1 x 1024, float32, 100% open: dense 0.95x"
    assert [line for line, _ in _results.losses()] == [lost]
    stamped = "Measured on chip, torch 2.9, 2026-01-01, commit abc."
    assert _results.loss_section().endswith(f"- {lost}\n\n{stamped}")
    line = "| cpu: MLP step, 60 % open | dense | at least 1.45 | 1.90 | pass | 2.00 ms |"
    assert line in _results.goal_section()
    assert "| chip, torch 2.9, 2026-01-01, abc |" in _results.goal_section()
    curve = "| mlp, smollm2-135m, 1 x 1024, float32 | open 100% to 30%, 3 points | 1.05 to 0.26 |"
    assert f"{curve}  | 100% (1.05) | short |" in _results.curve_section()
    assert _results.curve_section().endswith(f"\n\n{stamped}")
    assert line in _results.goal_section(measured_only=True)
    _results.write_figures(tmp_path / "figures")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == set(made)


def test_logarithmic_axes_hold_every_point():
    text = _figures.lines("t", "n", {"a": [(1, 10), (100, 1e6)]}, "x", "y", log=True)
    circles = [e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("circle")]
    assert all(0 < float(c.get("cx")) < 640 and 0 < float(c.get("cy")) < 360 for c in circles)


class FakeWorker:
    def __init__(self, answers):
        self.answers = iter(answers)

    def ask(self, name):
        return next(self.answers)


def test_paired_runs_drop_the_first_and_stay_in_pairs():
    base, head = FakeWorker([9.0, *[2.0] * 9]), FakeWorker([9.0, *[1.0] * 9])
    assert compare.paired(base, head, "probe", 0.0) == [(2.0, 1.0)] * 5
    old = FakeWorker(["ImportError: no such name"])
    assert compare.paired(old, FakeWorker([1.0]), "probe", 0.0) == (
        "base: ImportError: no such name"
    )


def test_compare_refuses_what_it_does_not_know():
    with pytest.raises(SystemExit, match="--base: expected a commit, got 'no-such-commit'"):
        with compare.worktree("no-such-commit"):
            pass


def test_instructions_without_valgrind_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare.shutil, "which", lambda _: None)
    counts, left_out = compare.instructions(tmp_path, tmp_path)
    assert counts == {} and left_out == [
        "valgrind is not installed (Debian, Ubuntu: apt-get install valgrind)"
    ]
    compare.print_instructions({tmp_path / "base": tmp_path, tmp_path: tmp_path})
    said = capsys.readouterr().out
    assert "not counted in base: valgrind is not installed" in said
    assert "not counted in this tree: valgrind is not installed" in said


def test_every_op_is_counted():
    """What runs under callgrind runs without it."""
    calls = _counted.calls()
    assert len(calls) == 17
    for call in calls.values():
        call()


@pytest.mark.parametrize("what", bench_startup.IMPORTS)
def test_import_costs_little_beyond_torch(what):
    """What the goals of run.py measure, without their bound: nothing heavy comes along."""
    before, statement = bench_startup.IMPORTS[what]
    heavy = {"accelerate", "sympy", "torch._dynamo", "torch._inductor", "transformers"}
    if what == "import kernels":
        pytest.importorskip("triton")
    else:
        heavy |= {"triton"}
    code = (
        f"import sys\n{before}\nbefore = set(sys.modules)\n{statement}\n"
        f"came = {heavy} & (sys.modules.keys() - before)\nassert not came, came\nprint(0)"
    )
    assert bench_startup.seconds(code) == 0.0


def test_import_goals_are_measured():
    named = [goal.name for goal in goals.GOALS if goal.name.startswith("import")]
    assert named and set(named) <= set(bench_startup.IMPORTS)


def test_startup_is_timed_with_bytecode(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert bench_startup.seconds("import sys; print(float(sys.dont_write_bytecode))") == 0.0


def test_a_startup_probe_that_fails_says_so():
    with pytest.raises(SystemExit, match="probe failed"):
        bench_startup.seconds("raise ValueError")
