"""The C++, and the CUDA kernels over a CPU, under AddressSanitizer and UBSan."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

from gatepack import _build, _ext

SUPPORT = Path(__file__).resolve().parent / "support"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Quick to compile, and with its line numbers.
FLAGS = ["-O0", "-g1", "-w", "-fPIC", "-std=c++17", "-ffp-contract=off", *_build.DEFINES]


def compiler() -> list[str]:
    try:
        _build.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    return shlex.split(get_cxx_compiler())


def sanitizers(command: list[str], folder: Path) -> list[str]:
    """The flags where they work, or the reason to skip."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }")
    arguments = [*command, *SANITIZERS, str(source), "-o", str(folder / "empty")]
    if subprocess.run(arguments, capture_output=True).returncode:
        pytest.skip(f"{command[0]} has no sanitizers: {' '.join(SANITIZERS)} does not link")
    return SANITIZERS


def build(command: list[str], folder: Path, sanitize: list[str]) -> Path:
    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    includes = [f"-I{path}" for path in (SUPPORT / "cuda_on_cpu", _ext.CSRC, *includes)]
    cuda = ["-x", "c++", "-include", "cuda_runtime.h"]

    def compiled(name: str) -> str:
        target = str(folder / f"{name}.o")
        language = cuda if name.endswith(".cu") else []
        defines = ["-DGATEPACK_FLAGS=sanitised"]
        source = [*language, "-c", str(_ext.CSRC / name), "-o", target]
        subprocess.run([*command, *FLAGS, *defines, *sanitize, *includes, *source], check=True)
        return target

    # The longest first.
    names = sorted([*_build.CXX_SOURCES, *_build.CUDA_SOURCES], key=lambda name: "fold" not in name)
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, names))
    library = folder / "sanitised.so"
    lib = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-lpthread"]
    subprocess.run([*command, *sanitize, *objects, *link, "-o", str(library)], check=True)
    return library


def runtime(command: list[str], name: str) -> str:
    done = subprocess.run(
        [*command, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded, as on Linux")
@pytest.mark.skipif(_ext.backend().name == "torch", reason="gatepack._C could not be built")
def test_no_op_reads_or_writes_what_it_should_not(tmp_path, simd_levels):
    command = compiler()
    library = build(command, tmp_path, sanitizers(command, tmp_path))
    preload = [runtime(command, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(_ext.CSRC.parent.parent),
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "sanitised.py"), str(library)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    called = {level: set(calls) for level, calls in json.loads(done.stdout).items()}
    sources = "".join((_ext.CSRC / name).read_text() for name in _build.CUDA_SOURCES)
    on_cuda = set(re.findall(r'm\.impl\("(\w+)"', sources))
    assert called == {level: set(_ext.OPS) for level in simd_levels()} | {"emulated": on_cuda}
