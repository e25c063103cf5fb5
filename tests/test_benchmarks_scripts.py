"""Benchmark scripts from end to end on tiny shapes: their lines are what the report and the goals
read, and what is wrong is neither timed nor written."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import _results
import bench_demo
import bench_fold_pack
import bench_pack_tensors
import goals
import pytest
import report
import torch
from checkpoints import save_tiny, write_documents
from clean import checkout
from packed import spoil

from gatepack import demo, recipe
from gatepack.demo import DemoConfig
from gatepack.packing import pack
from gatepack.testing import ModelShape
from gatepack.training import TrainConfig

SHAPE = ModelShape(hidden=20, mlp=30, heads=4, kv_heads=2, head_dim=4)
PACKING = {
    "fold_pack": (bench_fold_pack, report.fold_pack_sections),
    "pack_tensors": (bench_pack_tensors, report.pack_tensors_sections),
}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """started(module, *arguments) runs a script's main; returns the rows that it has appended."""
    out = tmp_path / "results" / "chip" / "rows.jsonl"
    monkeypatch.setattr(_results, "RESULTS", tmp_path / "results")

    def start(module, *arguments):
        command = [f"benchmarks/{module.__name__}.py", *arguments, "--json", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    start.out = out
    return start


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_fold_pack, "SHAPES", ((12, 10), (5, 40)))
    monkeypatch.setattr(bench_pack_tensors, "MODEL_SHAPES", {"llama-3-8b": SHAPE})


@pytest.mark.parametrize("bench", PACKING)
def test_rows_of_packing_are_those_that_are_read(bench, small, started):
    module, sections = PACKING[bench]
    rows = started(module, "--seconds", "0")
    assert {row["bench"] for row in rows} == {bench}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    assert all(row["ms"] > 0 and row["runs"] == 5 and row["backend"] for row in rows)
    assert all(row["of_copy"] == 1 for row in rows if row["op"] == "copy")
    (text,) = sections()
    assert len(text.splitlines()) == len(rows) + 4  # a header, its rule, a blank line, conditions
    decided = [goal for goal in goals.GOALS if goal.bench == bench]
    assert decided
    for goal in decided:
        sized = [{**row, "shape": goal.case["shape"]} for row in rows]
        assert goals.judge(goal, sized).rows.keys() >= {"ours", goal.against}


def one_off(function):
    """function with the last element of its result, or of its first result, changed."""

    @functools.wraps(function)
    def wrong(*arguments, **options):
        result = function(*arguments, **options)
        first = result
        while not isinstance(first, torch.Tensor):
            first = first[0]
        first.view(torch.uint8).flatten()[-1] ^= 1
        return result

    return wrong


def wrong_where(chosen):
    """one_off for the calls whose arguments are `chosen`."""

    def of(function):
        wrong = one_off(function)
        return lambda *a, **k: (wrong if chosen(*a, **k) else function)(*a, **k)

    return of


@pytest.mark.parametrize(
    ("bench", "op", "change", "said"),
    [
        ("fold_pack", "fold_pack", one_off, "fold_pack is wrong"),
        ("fold_pack", "fold_pack", wrong_where(lambda *a: len(a) > 3), "fold_pack, gates is wrong"),
        ("fold_pack", "fold_pack_adjoint", one_off, "fold_pack_adjoint is wrong"),
        ("pack_tensors", "pack_tensors", one_off, "pack_tensors is wrong"),
        ("pack_tensors", "unpack_tensors", one_off, "unpack_tensors is wrong"),
    ],
)
def test_wrong_packing_is_not_timed(bench, op, change, said, small, started, monkeypatch):
    module, _ = PACKING[bench]
    monkeypatch.setattr(module, op, change(getattr(module, op)))
    monkeypatch.setattr(module, "timed", lambda functions, *_, **fields: [])
    with pytest.raises(SystemExit, match=f"{said}: not timed"):
        started(module, "--seconds", "0")
    assert not started.out.exists()


@pytest.fixture
def demos(tmp_path, monkeypatch):
    """Arguments of bench_demo for a tiny model, trained for two steps."""
    train = {"steps": 2, "batch_size": 2, "window": 16, "lora_rank": 2, "calibration_batches": 2}
    sizes = {"width_multiple": 8, "eval_windows": 2, "prompt_tokens": 8, "new_tokens": 2}
    make = functools.partial(DemoConfig, repeats=1, **sizes)
    monkeypatch.setattr(bench_demo, "DemoConfig", make)
    monkeypatch.setattr(bench_demo, "TrainConfig", functools.partial(TrainConfig, **train))
    model, text = save_tiny(tmp_path / "tiny"), write_documents(tmp_path / "text.jsonl")
    return ["--model", str(model), "--text", str(text), "--out", str(tmp_path / "out")]


def test_rows_of_the_demo_are_those_that_are_read(demos, started, monkeypatch):
    plain, own = [], demo._lora_only
    monkeypatch.setattr(demo, "_lora_only", lambda *a: plain.append(a) or own(*a))
    rows = started(bench_demo, *demos, "--targets", "0.8", "0.7", "--seeds", "3")
    assert [(row["bench"], row["target"], row["seed"]) for row in rows] == [
        ("demo", 0.8, 3),
        ("demo", 0.7, 3),
    ]
    assert len(plain) == 1, "base and LoRA are measured once per seed"
    assert rows[0]["perplexity"]["lora"] == rows[1]["perplexity"]["lora"]
    for row in rows:
        assert abs(row["kept"] - row["target"]) <= 0.005
        assert 0 <= row["error"] <= row["error_bound"]
    lines = report.demo_section().splitlines()
    assert [line[:8] for line in lines if line.startswith(("| 20%", "| 30%"))] == [
        "| 20% | ",
        "| 30% | ",
    ]


def test_a_demo_whose_packed_model_is_wrong_writes_no_row(demos, started, monkeypatch):
    monkeypatch.setattr(recipe, "pack", lambda model: (pack(model), spoil(model))[0])
    with pytest.raises(recipe.ParityError, match="logits that differ"):
        started(bench_demo, *demos, "--targets", "0.7")
    assert not started.out.exists()


@pytest.mark.skipif(not (shutil.which("git") and shutil.which("make")), reason="needs git and make")
def test_bench_compare_runs_this_tree_and_the_base(tmp_path):
    """make bench-compare in a repository of its own, without the extension."""
    tree = checkout(tmp_path / "a tree")
    foreign = ("GATEPACK_", "GIT_", "MAKE", "MFLAGS")  # `make test` would be make's parent
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env["GATEPACK_SKIP_EXT"] = "1"

    def run(*command):
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def commit(name):
        git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
        run(*git, "add", "--all")
        run(*git, "commit", "--quiet", "--message", name)
        run(*git, "tag", name)

    def compared(base) -> list[str]:
        """What the table says of the probe."""
        make = ["make", "--assume-old=.venv/installed", f"BIN={Path(sys.executable).parent}"]
        arguments = "ARGS=--small --seconds 0 --threads 1 --only fold_pack"
        text = run(*make, "bench-compare", f"BASE={base}", arguments)
        assert len(run("git", "worktree", "list").splitlines()) == 1
        return text.splitlines()[-1].split(maxsplit=1)

    run("git", "init", "--quiet")
    commit("works")
    source = tree / "python" / "gatepack" / "_ext.py"
    text = source.read_text(encoding="utf-8")
    source.write_text(f"{text}\ndef fold_pack(*_):\n    raise ValueError('not here')\n")
    commit("refuses")
    source.write_text(text, encoding="utf-8")
    assert compared("refuses") == ["fold_pack", "skipped: base: ValueError: not here"]
    name, figures = compared("works")
    base, now, ratio, p20, p80, runs = map(float, figures.split())
    assert name == "fold_pack" and base > 0 and now > 0 and p20 <= ratio <= p80 and runs == 5
