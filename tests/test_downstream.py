"""A trainer in a package of its own that depends on gatepack: installed, run, type-checked."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clean import ROOT, Env, build, checkout

import gatepack

pytest.importorskip("triton")
PROJECT = ROOT / "tests" / "downstream"
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "GATEPACK_SKIP_EXT": "1"}


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> Env:
    """Where pip installed the trainer and, because the trainer's metadata says so, gatepack."""
    folder = tmp_path_factory.mktemp("downstream")
    tools = Env(folder / "tools", borrow=False)
    wheels = folder / "wheels"
    build("wheel", checkout(folder / "gatepack"), wheels, tools)
    shutil.copytree(PROJECT, folder / "tinytrainer")
    build("wheel", folder / "tinytrainer", wheels, tools)
    env = Env(folder / "env")
    env.pip("install", "--no-index", "--find-links", str(wheels), "tinytrainer")
    assert (env.site / "gatepack" / "__init__.py").is_file()
    return env


@pytest.fixture(scope="module")
def trained(env) -> dict:
    return run(env, "train")


def run(env: Env, command: str) -> dict:
    out = str(env.folder / "out")
    return json.loads(env.run("tinytrainer", command, out, **QUIET).stdout.splitlines()[-1])


def test_a_family_takes_at_most_15_lines():
    tree = ast.parse((PROJECT / "src" / "tinytrainer" / "family.py").read_text())
    (call,) = [node for node in tree.body if isinstance(node, ast.Expr | ast.Import)][2:]
    assert call.end_lineno - call.lineno + 1 <= 15


def test_it_uses_public_names_only():
    public = {f"gp.{name}" for name in gatepack.__all__}
    for path in sorted((PROJECT / "src").rglob("*.py")):
        text = path.read_text()
        assert set(re.findall(r"\bgp\.\w+", text)) <= public
        assert set(re.findall(r"from (gatepack[\w.]*)", text)) <= {"gatepack", "gatepack.kernels"}


def test_it_trains_two_steps_packs_and_saves(trained, env):
    assert trained["version"] == gatepack.__version__
    assert len(trained["losses"]) == 2
    assert 0.5 < trained["kept"] <= 0.6
    # 2 blocks of 7 linears, all packed.
    assert trained["explained"] == 14
    assert trained["difference"] < 1e-5
    assert trained["op"] < 1e-6
    saved = json.loads((env.folder / "out" / "config.json").read_text())
    assert saved["model_type"] == "pebble" and saved["gatepack"]["kept"]


def test_its_packed_model_reloads(trained, env):
    assert run(env, "reload")["logits"] == trained["logits"]


EVERY_NAME = """
from gatepack import *
import gatepack as gp
from gatepack import kernels
{imports}
names = ({uses})
gp.no_such_name
kernels.no_such_op
"""


@pytest.fixture(scope="module")
def source(env) -> Path:
    """Uses every public name in each way there is; two lines of it are wrong."""
    names = [name for name in gatepack.__all__ if not name.startswith("_")]
    ops = importlib.import_module("gatepack.kernels").__all__
    text = EVERY_NAME.format(
        imports="\n".join(
            [f"from gatepack import {name} as _{name}" for name in names]
            + [f"from gatepack.kernels import {name} as _{name}" for name in ops]
        ),
        uses=", ".join(
            names + [f"gp.{name}" for name in names] + [f"kernels.{name}" for name in ops]
        ),
    )
    path = env.folder / "every_name.py"
    path.write_text(text)
    return path


class TestTypes:
    """What type checkers make of an installed gatepack."""

    def mypy(self, env, *arguments: str) -> str:
        pytest.importorskip("mypy", reason="pip install mypy")
        mypy = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
        mypy += ["--python-executable", str(env.bin / "python")]
        done = subprocess.run([*mypy, *arguments], capture_output=True, text=True, cwd=env.folder)
        assert not done.stderr
        return done.stdout

    def test_mypy(self, env, source):
        # Names are gatepack's alone: what it imports need not be read for them.
        settings = env.folder / "mypy.ini"
        settings.write_text(
            "[mypy]\nfollow_imports = skip\n[mypy-gatepack.*]\nfollow_imports = normal\n"
        )
        found = self.mypy(env, "--config-file", str(settings), "--cache-dir=/dev/null", str(source))
        assert re.findall(r'has no attribute "(\w+)"', found) == [
            "no_such_name",
            "no_such_op",
        ], found
        assert len(found.splitlines()) == 2, found

    @pytest.mark.slow
    def test_mypy_of_the_trainer(self, env):
        found = self.mypy(env, f"--cache-dir={env.folder / 'mypy'}", "-p", "tinytrainer")
        # What transformers leaves untyped is not ours to mend.
        ours = [line for line in found.splitlines() if "[no-untyped-call]" not in line]
        assert not [line for line in ours if "gatepack" in line], found

    def test_pyright(self, env, source):
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        names = ("pyright", "basedpyright")
        pyright = next((found for name in names if (found := shutil.which(name, path=path))), None)
        if pyright is None:
            pytest.skip("pyright is not installed: pip install basedpyright")
        settings = env.folder / "pyrightconfig.json"
        settings.write_text(json.dumps({"include": [source.name], "typeCheckingMode": "standard"}))
        command = [pyright, "--outputjson", "-p", str(settings)]
        done = subprocess.run(
            [*command, "--pythonpath", str(env.bin / "python")], capture_output=True, text=True
        )
        found = json.loads(done.stdout)["generalDiagnostics"]
        errors = [entry["message"] for entry in found if entry["severity"] == "error"]
        assert len(errors) == 2, errors
        assert "no_such_name" in errors[0] and "no_such_op" in errors[1]
