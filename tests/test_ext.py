"""gatepack._C: when it is loaded, built and rebuilt, and what happens without it."""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from gatepack import _build, _env, _ext

ROOT = Path(__file__).resolve().parent.parent
PACK = """
import warnings, torch
from gatepack import _ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        w = torch.arange(12.0).view(3, 4).requires_grad_()
        out = _ext.fold_pack(w, torch.tensor([0, 2]), None, torch.tensor([1.0, 0.5]))
        out.backward(torch.ones(2, 4))
assert torch.equal(out, torch.tensor([[0.0, 1, 2, 3], [4, 4.5, 5, 5.5]])), out
assert torch.equal(w.grad[:, 0], torch.tensor([1.0, 0, 0.5])), w.grad
print(_ext.backend().name, len([c for c in caught if "gatepack" in str(c.message)]))
"""
# As if no extension were installed beside the sources.
HIDE_INSTALLED = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "gatepack._C" else find_spec(name, *a)
"""


def run(code, **env):
    full = {**os.environ, "PYTHONPATH": str(ROOT / "python"), **env}
    full["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), full["PATH"]))
    done = subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_skip_ext_runs_plain_torch_with_one_warning():
    assert run(PACK, GATEPACK_SKIP_EXT="1") == ["torch", "1"]


def test_failed_build_runs_plain_torch_with_one_warning(tmp_path):
    assert run(HIDE_INSTALLED + PACK, CXX="false", GATEPACK_CACHE_DIR=str(tmp_path)) == [
        "torch",
        "1",
    ]


def test_import_loads_and_builds_nothing(tmp_path):
    code = """
import sys, torch
import gatepack, gatepack._ext
assert not torch.cuda.is_initialized()
assert gatepack._ext._backend is None
print([m for m in sys.modules if m == "gatepack._C" or "cpp_extension" in m])
"""
    assert run(code, GATEPACK_CACHE_DIR=str(tmp_path)) == ["[]"]
    assert not list(tmp_path.iterdir())


def test_first_call_may_be_one_that_is_traced():
    code = """
import torch
from gatepack import _ext
w, rows, z = torch.rand(3, 4), torch.tensor([0, 2]), torch.tensor([1.0, 0.5])
pack = torch.compile(_ext.fold_pack, fullgraph=True, backend="eager")
out = pack(w, rows, None, z)
assert _ext._backend is not None
assert torch.equal(out, w[rows] * z[:, None]), out
"""
    run(code)


def test_load_has_the_mark_of_a_constant_result():
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(marked) and vars(marked).items() <= vars(_ext._load).items()


def test_backend_names_its_reason():
    backend = _ext.backend()
    assert backend.name in ("cuda", "cpp", "torch")
    assert backend.reason


def test_build_info_lists_what_was_built():
    if _ext.backend().name == "torch":
        pytest.skip(_ext.backend().reason)
    info = _ext.build_info()
    assert info["simd"] in ("scalar", "avx2", "avx512")
    assert "-ffp-contract=off" in info["flags"]
    assert (info["cuda_archs"] is not None) == (_ext.backend().name == "cuda")


@pytest.mark.parametrize("cap", _env.SIMD_LEVELS)
def test_simd_level_can_be_capped(cap):
    if _ext.backend().name == "torch":
        pytest.skip(_ext.backend().reason)
    code = "from gatepack import _ext; _ext.backend(); print(_ext.build_info()['simd'])"
    present = _env.SIMD_LEVELS[_env.SIMD_LEVELS.index(_ext.build_info()["simd"]) :]
    assert run(code, GATEPACK_SIMD=cap) == [cap if cap in present else present[0]]


@pytest.mark.parametrize(
    ("cap", "best", "used"),
    [("avx512", "avx2", "avx2"), ("avx2", "avx512", "avx2"), ("avx2", "scalar", "scalar")],
)
def test_the_cap_on_another_machine(cap, best, used, monkeypatch):
    levels = []
    gatepack = types.SimpleNamespace(set_simd_level=levels.append)
    monkeypatch.setenv("GATEPACK_SIMD", cap)
    monkeypatch.delenv("GATEPACK_SKIP_EXT", raising=False)
    monkeypatch.setattr(_ext, "_location", None)
    monkeypatch.setattr(_ext, "_load_extension", lambda: (None, "from a test"))
    monkeypatch.setattr(_ext, "build_info", lambda: {"simd": best, "cuda_archs": None})
    monkeypatch.setattr(torch, "ops", types.SimpleNamespace(gatepack=gatepack))
    assert _ext._choose().name == "cpp" and levels == [used]


def test_unknown_simd_level_is_refused_by_every_call(monkeypatch):
    monkeypatch.setenv("GATEPACK_SIMD", "avx9000")
    monkeypatch.setattr(_ext, "_backend", None)
    message = "GATEPACK_SIMD must be avx512, avx2 or scalar, got 'avx9000'"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            _ext.fold_pack(torch.ones(2, 2))


def test_location_is_the_file_that_is_loaded():
    if _ext.backend().name == "torch":
        assert _ext.location() is None
    else:
        assert _ext.location().is_file() and _ext.location().name.startswith("_C")


def test_every_op_is_listed():
    _ext.backend()
    for name in _ext.OPS:
        assert hasattr(torch.ops.gatepack, name)


def test_compiler_is_tried_and_named(monkeypatch):
    first = _build.compiler()
    monkeypatch.setenv("CXX", first.split(":")[0] + " -pipe")
    assert _build.compiler() != first
    for broken in ("false", "/nonexistent/c++"):
        monkeypatch.setenv("CXX", broken)
        with pytest.raises(RuntimeError, match=re.escape(f"no C++17 compiler: {broken}")):
            _build.compiler()


def test_nvcc_without_the_cuda_runtime_builds_for_cpus_only(tmp_path, monkeypatch):
    if _ext.backend().name == "torch":
        pytest.skip(_ext.backend().reason)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.library_paths", lambda device: [str(tmp_path)])
    if not _build.links_cuda():  # unless the linker finds one by itself
        assert not _build.plan()["cuda"]
        (tmp_path / "empty.cpp").touch()
        command = [*_build.compiler().partition(":")[0].split(), "-shared"]
        command += [str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "libcudart.so")]
        subprocess.run(command, check=True)
    assert _build.plan()["cuda"]


def test_arch_list_is_explicit(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert _build.cuda_archs("12.6").endswith("9.0+PTX")
    assert _build.cuda_archs("13.0").endswith("12.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert _build.gencode(_build.cuda_archs("13.0")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_spills_are_found_in_what_ptxas_says():
    text = """ptxas info    : Function properties for _Z4goodv
    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z3badv
    32 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads"""
    assert _build.spills(text) == ["16 + 20 bytes in _Z3badv"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_compiles_without_spills():
    _build.compile_cuda()


@pytest.mark.slow
def test_first_use_builds_and_a_damaged_entry_is_rebuilt(tmp_path):
    def entry():
        (library,) = tmp_path.glob("*/_C.so")
        return library

    env = {"GATEPACK_CACHE_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0"}
    name, warned = run(HIDE_INSTALLED + PACK, **env)
    assert name in ("cpp", "cuda") and warned == "0"
    built = entry().read_bytes()
    first = entry().stat().st_mtime_ns
    run(HIDE_INSTALLED + PACK, **env)
    assert entry().stat().st_mtime_ns == first, "a sound entry was built again"

    # What an interrupted build or a full disk leaves.
    entry().write_bytes(built[: len(built) // 2])
    (entry().parent / "build-interrupted").mkdir()
    name, warned = run(HIDE_INSTALLED + PACK, **env)
    assert name in ("cpp", "cuda") and warned == "0"
    assert len(entry().read_bytes()) == len(built)
    assert not list(tmp_path.glob("*/build-*"))
