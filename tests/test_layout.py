"""Names, versions and files: what is imported comes from this checkout, and installs complete."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, **env):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_folder_refuses_the_name_triton_kernels():
    done = python("-c", "import triton_kernels")  # -c puts the repository root on the path
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "gatepack.kernels" in done.stderr


def test_links_lead_into_this_checkout():
    for link, target in (("kernels", "triton_kernels"), ("csrc", "csrc")):
        path = ROOT / "python" / "gatepack" / link
        assert path.is_symlink(), f"{path} must be a link to ../../{target}"
        assert path.resolve() == ROOT / target


def test_import_is_light():
    code = (
        "import sys, gatepack, torch; assert not torch.cuda.is_initialized(); "
        "print([m for m in ('transformers', 'triton', 'peft', 'gatepack._C') if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_versions_agree():
    source = (ROOT / "python" / "gatepack" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{version}]" in changelog


def test_constraints_pin_the_formatter_that_pyproject_requires():
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f'required-version = "=={pinned.group(1)}"' in (ROOT / "pyproject.toml").read_text()


def test_every_environment_variable_is_read_and_listed_in_one_file():
    package = ROOT / "python" / "gatepack"
    listed = (package / "_env.py").read_text().split('"""')[1]
    for path in [*package.glob("*.py"), *(ROOT / "triton_kernels").glob("*.py")]:
        text = path.read_text()
        if path.name not in ("_env.py", "_build.py"):
            reads = re.findall(r"environ\S*\W+(GATEPACK_\w+)", text)
            assert not reads, f"{path.name} reads {reads}"
        for name in re.findall(r"GATEPACK_[A-Z_]+", text):
            if name not in ("GATEPACK_FLAGS", "GATEPACK_CUDA_ARCHS", "GATEPACK_SCHEMA"):
                assert name in listed, f"{path.name} names {name}, which _env.py does not list"


@pytest.mark.slow
def test_wheel_is_complete(tmp_path):
    # From a copy: setuptools leaves build/ in the tree, and would pack what an older one left.
    copy = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    arguments = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path))
    done = python(*arguments, str(copy), GATEPACK_SKIP_EXT="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {path.name for path in (ROOT / "triton_kernels").glob("*.py")}
    sources = {path.name for path in (ROOT / "csrc").iterdir() if path.suffix != ".o"}
    expected = {f"gatepack/kernels/{name}" for name in kernels}
    expected |= {f"gatepack/csrc/{name}" for name in sources} | {"gatepack/py.typed"}
    assert expected <= names, sorted(expected - names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gatepack"}
