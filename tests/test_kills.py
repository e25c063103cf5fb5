"""A save that is killed, or finds the disk full, leaves the old state or the new one, whole; what
it left half-written is removed by the next. support/kills.py does the killing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"
KILLS = 50


def trials(folder, *kinds):
    paths = [str(SUPPORT.parent.parent / "python"), str(SUPPORT)]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "kills.py"), str(folder), str(KILLS), *kinds],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found):
    assert found["wrong"] == []
    assert found["killed"] >= KILLS
    assert found["killed at steps"] > 5 and found["failed"] >= 4
    assert (found["left"], found["mine"]) == ([], "mine")


def test_checkpoint(tmp_path):
    found = trials(tmp_path, "save", "race")
    check(found["save"])
    # Some were killed after the new one was in place and before they ended.
    assert found["save"]["new"]
    assert found["race"]["saves"] == 2 * KILLS  # by two processes, to one folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["training", "save without exchange", "uniform", "hf", "gguf", "decilm", "onnx"]
)
def test_state_of_a_run_exports_and_other_file_systems(tmp_path, kind):
    if kind in ("gguf", "onnx"):
        pytest.importorskip({"gguf": "gguf", "onnx": "onnxscript"}[kind])
    check(trials(tmp_path, kind)[kind])
