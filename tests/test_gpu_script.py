"""benchmarks/gpu.sh, with a python3 that only says what it was called with."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/bash
case "$*" in
    *get_device_capability*) echo 9.0 ;;
    *xdist*) exit 0 ;;
    *"/ 60"*) echo 1.5 ;;
    *) echo "$TORCH_CUDA_ARCH_LIST $GATEPACK_COMMIT" ;;
esac
case "$*" in *"-m pytest"*|*"pip install"*) exit 1 ;; esac
"""


@pytest.fixture
def gpu(tmp_path):
    """gpu(*options) runs the script; returns its status, its output and the folder of results."""
    binaries, out = tmp_path / "bin", tmp_path / "out"
    binaries.mkdir()
    (binaries / "python3").write_text(PYTHON)
    (binaries / "python3").chmod(0o755)
    (tmp_path / "one.whl").touch()
    env = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    env["PATH"] = f"{binaries}:{env['PATH']}"

    def run(*options):
        command = ["bash", str(SCRIPT), "--out", str(out), *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, out

    return run


def test_what_fails_costs_no_other_step(gpu, tmp_path):
    status, printed, out = gpu("--wheels", str(tmp_path), "--commit", "abc1234")
    steps = re.findall(r"^== ([\w-]+)", printed, re.M)
    assert status == 1 and steps[:3] == ["build", "tests", "goals"] and len(steps) >= 8
    assert re.findall(r"^FAILED (\w+)", printed, re.M) == ["wheels", "tests"]
    assert {log.stem for log in out.glob("*.log")} == set(steps), "a step overwrote another's log"
    assert len(set(steps)) == len(steps)
    assert (out / "build.log").read_text() == "9.0 abc1234\n"


def test_unknown_parts_and_options_are_refused(gpu):
    assert gpu("--parts", "build nothing")[0] == 2
    assert gpu("--nothing", "1")[0] == 2
