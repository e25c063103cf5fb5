"""The extension built on first use: by one process at a time, once for each source, torch and set
of flags, whole or not at all, and not in silence where it cannot be built."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clean import Env, checkout, quick_compiler

from gatepack import _build, _ext

pytestmark = pytest.mark.skipif(_ext.fcntl is None, reason="needs Linux or macOS")

# Before it compiles, notes that it is called for a source file and waits for the file `go`. Each
# file is really compiled for the first test alone: ninja gives the object last.
HELD_UP = """
case "$*" in *.cpp*)
  echo "$*" >> "{log}"
  while [ ! -e "{go}" ]; do sleep 0.05; done
  for object; do :; done
  if [ ! -e "{kept}/$object" ]; then
    {compiler} "$@" && cp "$object" "$object.d" "{kept}"
    exit
  fi
  cp "{kept}/$object" "{kept}/$object.d" .
  exit;;
esac
"""
FOLD_PACK = """
import hashlib, warnings, torch
from gatepack import _ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    w = torch.linspace(-3, 5, 70 * 33).view(70, 33).to(torch.bfloat16)
    z = torch.linspace(0.1, 1, 24)
    out = [_ext.fold_pack(w, torch.arange(0, 70, 3), None, z) for _ in range(2)][-1]
texts = [str(c.message) for c in caught if "gatepack" in str(c.message)]
print(_ext.backend().name, hashlib.sha256(out.float().numpy().tobytes()).hexdigest(), len(texts))
print(*texts)
"""


class Bench:
    """A checkout of its own, its cache, and a compiler that counts and can be held up."""

    def __init__(self, folder: Path, kept: Path):
        self.folder = folder
        self.source = checkout(folder / "a checkout")
        self.cache = folder / "a cache"
        self.env = Env(folder / "env")
        self.log, self.go = folder / "log", folder / "go"
        self.go.touch()
        held_up = HELD_UP.format(log=self.log, go=self.go, kept=kept, compiler=quick_compiler(kept))
        self.compiler = quick_compiler(folder, held_up)
        self.started: list[subprocess.Popen] = []

    @property
    def compiled(self) -> int:
        """Source files compiled so far."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def start(self, code: str = FOLD_PACK, **variables: str) -> subprocess.Popen:
        ninja = Path(sys.executable).parent
        variables = {
            **{k: v for k, v in os.environ.items() if not k.startswith("GATEPACK_")},
            "PATH": os.pathsep.join((str(ninja), os.environ["PATH"])),
            "PYTHONPATH": str(self.source / "python"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GATEPACK_CACHE_DIR": str(self.cache),
            "TORCH_CUDA_ARCH_LIST": "9.0",
            "CXX": self.compiler,
            **variables,
        }
        process = subprocess.Popen(
            [str(self.env.bin / "python"), "-c", code],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """Ends what a failed test has left waiting, with the compilers it started."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def finish(self, process: subprocess.Popen) -> list[str]:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
        return out.split(maxsplit=3)

    def run(self, code: str = FOLD_PACK, **variables: str) -> list[str]:
        return self.finish(self.start(code, **variables))

    def entries(self) -> list[Path]:
        return sorted(self.cache.glob("*/_C.so"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def bench(tmp_path, kept) -> Iterator[Bench]:
    bench = Bench(tmp_path, kept)
    yield bench
    bench.stop()


def wait_for(holds, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def test_torch_too_old_for_the_extension(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(RuntimeError, match="torch >= 2.10, got 2.9.1"):
        _ext._load_from_cache()


def test_two_processes_build_once_and_agree_with_plain_torch(bench):
    bench.go.unlink()
    first = bench.start()
    wait_for(lambda: bench.compiled)
    second = bench.start()
    time.sleep(3)
    bench.go.touch()
    results = [bench.finish(process) for process in (first, second)]
    assert results[0] == results[1] and results[0][0] in ("cpp", "cuda")
    assert results[0][2] == "0"
    sources = re.findall(r"/csrc/(\w+\.cpp)", bench.log.read_text())
    assert sorted(sources) == sorted(_build.CXX_SOURCES)
    once = bench.compiled
    assert len(bench.entries()) == 1
    assert bench.run(GATEPACK_SKIP_EXT="1")[1] == results[0][1]
    assert bench.run() == results[0] and bench.compiled == once, "a sound entry was built again"


def test_a_killed_build_leaves_nothing_that_is_used(bench):
    bench.go.unlink()
    killed = bench.start()
    wait_for(lambda: bench.compiled)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not bench.entries()
    bench.go.touch()
    name, _, warned, *_ = bench.run()
    assert name in ("cpp", "cuda") and warned == "0"
    (entry,) = bench.entries()
    assert not list(entry.parent.glob("build-*"))


def test_a_failed_build_is_tried_again(bench):
    assert bench.run(CXX="false")[0] == "torch"
    assert not bench.entries()
    assert bench.run()[0] in ("cpp", "cuda")


def test_an_entry_for_each_of_sources_compiler_torch_and_flags(tmp_path, monkeypatch):
    def key() -> str:
        """The entry that would be built."""
        with pytest.raises(RuntimeError, match="not built") as error:
            _ext._load_from_cache()
        return str(error.value)

    def load(name, sources, build_directory, **options):
        raise RuntimeError(f"not built: {Path(build_directory).parent}")

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    monkeypatch.setenv("GATEPACK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_ext, "CSRC", shutil.copytree(_ext.CSRC, tmp_path / "csrc"))
    keys = [key()]
    assert keys == [key()]
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    keys.append(key())
    monkeypatch.setattr(_build, "CXX_FLAGS", [*_build.CXX_FLAGS, "-DMORE"])
    keys.append(key())
    monkeypatch.setenv("CXX", f"{os.environ.get('CXX', 'c++')} -pipe")
    keys.append(key())
    with open(tmp_path / "csrc" / "layout.h", "a") as handle:
        handle.write("// another byte\n")
    keys.append(key())
    assert len(set(keys)) == 5
    assert not list(tmp_path.glob("cache/*/build-*")), "a failed build left its folder"
