"""Clean environments for the packaging tests: copies of the checkout, and virtual environments in
which gatepack can only come from what was installed there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])
_NOT_SOURCES = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "out", "*.egg-info", "*.so", "*.pyc"
)

# Where gatepack comes from, without importing torch.
LOOK = """
import importlib.metadata, importlib.util, json, pathlib, re
import gatepack
package = pathlib.Path(gatepack.__file__).parent
kernels = pathlib.Path(importlib.util.find_spec("gatepack.kernels").origin)
print(json.dumps({
    "package": str(package.resolve()),
    "kernels": str(kernels.parent.resolve()),
    "mark": re.findall(r"(?m)^MARK = '(.*)'$", kernels.read_text()),
    "version": gatepack.__version__,
    "metadata": importlib.metadata.version("gatepack"),
    "typed": (package / "py.typed").is_file(),
    "csrc": sorted(path.name for path in (package / "csrc").resolve().iterdir()),
}))
"""
# That what needs torch and triton imports, from the same place.
IMPORT = """
import json, pathlib
import gatepack.kernels
from gatepack import _ext
print(json.dumps({
    "kernels": str(pathlib.Path(gatepack.kernels.__file__).parent.resolve()),
    "mark": getattr(gatepack.kernels, "MARK", None),
    "csrc": sorted(path.name for path in _ext.CSRC.iterdir()),
}))
"""


def checkout(folder: Path, version: str | None = None, mark: str | None = None) -> Path:
    """A copy of the sources with its links; version and mark make it tell itself from others."""
    shutil.copytree(ROOT, folder, symlinks=True, ignore=_NOT_SOURCES)
    if version is not None:
        init = folder / "python" / "gatepack" / "__init__.py"
        text = re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', init.read_text())
        init.write_text(text)
    if mark is not None:
        with open(folder / "triton_kernels" / "__init__.py", "a") as handle:
            handle.write(f"\nMARK = {mark!r}\n")
    return folder


class Env:
    """A virtual environment without pip; borrow: also sees the packages of the running one.

    Its own packages come first, and of the running one's nothing of gatepack is seen, nor other
    editable installs.
    """

    def __init__(self, folder: Path, borrow: bool = True):
        venv.create(folder, symlinks=True)
        scheme = sysconfig.get_preferred_scheme("prefix")
        self.folder = folder
        self.bin = folder / "bin"
        self.site = Path(
            sysconfig.get_path("purelib", scheme, {"base": str(folder), "platbase": str(folder)})
        )
        if borrow:
            borrowed = folder / "borrowed"
            borrowed.mkdir()
            for path in SITE.iterdir():
                if not path.name.startswith(("gatepack", "__editable__")):
                    (borrowed / path.name).symlink_to(path)
            (self.site / "borrowed.pth").write_text(f"{borrowed}\n")
        else:
            # Enough to build with, and nothing else: no torch.
            for path in (*SITE.glob("setuptools*"), SITE / "_distutils_hack"):
                (self.site / path.name).symlink_to(path)

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, **variables: str):
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "GATEPACK_", "TRITON_"))
        }
        env |= {"PATH": f"{self.bin}{os.pathsep}{env['PATH']}", "VIRTUAL_ENV": str(self.folder)}
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=env | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done

    def python(self, code: str, **options) -> str:
        return self.run(str(self.bin / "python"), "-c", code, **options).stdout

    def look(self, code: str = LOOK, **options) -> dict:
        return json.loads(self.python(code, **options).splitlines()[-1])

    def pip(self, *arguments: str, **options):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        return self.run(*pip, "--python", str(self.bin / "python"), *arguments, **options)

    def install(self, *what: str, **options):
        """pip install of exactly this, from no index; without the extension unless told."""
        options = {"GATEPACK_SKIP_EXT": "1", **options}
        return self.pip("install", "--no-deps", "--no-build-isolation", *what, **options)


def quick_compiler(folder: Path, first: str = "") -> str:
    """A C++ compiler that does not optimise, in a third of the time; first: shell that runs before
    each call of it, with the arguments in "$@"."""
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\n{first}\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    path.chmod(0o755)
    return shlex.quote(str(path))


def build(kind: str, source: Path, out: Path, env: Env, **options) -> Path:
    """Builds "wheel" or "sdist" by the PEP 517 hook; returns the one file that it made."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    name = env.python(code, cwd=source, **options).splitlines()[-1]
    return out / name
