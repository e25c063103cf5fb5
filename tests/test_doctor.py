"""gatepack doctor: what it lists, that every gap names its cure, that nothing broken stops it."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gatepack import _ext, doctor
from gatepack.cli import app

ROOT = Path(__file__).resolve().parent.parent


def findings(report=None):
    report = report or doctor.examine()
    return {f"{s.name}/{f.name}": f for s in report.sections for f in s.findings}


def section(name, report=None):
    (found,) = [s for s in (report or doctor.examine()).sections if s.name == name]
    return {finding.name: finding for finding in found.findings}


def optional_packages():
    """(package, extra) of every extra that is for users' work."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[(.*)\]$", table, re.MULTILINE)
    return [
        (name, extra)
        for extra, names in extras
        if extra not in ("demo", "docs")
        for name in re.findall(r'"([\w-]+)', names)
    ]


def test_floors_are_those_of_the_metadata():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, floor in doctor.FLOORS.items():
        pattern = r"requires-python = \">=([\d.]+)\"" if name == "python" else rf'"{name}>=([\d.]+)'
        assert re.findall(pattern, text), name
        assert set(re.findall(pattern, text)) == {floor}, name


def test_every_subject_is_looked_at_and_every_gap_has_one_line_that_fixes_it():
    report = doctor.examine()
    assert [s.name for s in report.sections] == [
        "machine",
        "packages",
        "gpu",
        "extension",
        "ops",
        "settings",
        "caches",
    ]
    for name, finding in findings(report).items():
        assert finding.state in ("ok", "gap", "unused"), name
        assert finding.found, name
        assert bool(finding.fix) == (finding.state == "gap"), name
        assert "\n" not in finding.fix, name
    assert len(set(report.fixes)) == len(report.fixes)


def test_every_op_has_a_backend():
    kernels = pytest.importorskip("gatepack.kernels")
    ops = section("ops")
    names = {name.removesuffix("_fn") for name in kernels.__all__ if name.endswith("_fn")}
    assert names | set(_ext.OPS) == set(ops)
    for name in names:
        assert ops[name].found in ("triton, compiled", "triton, interpreter", "reference")
    assert ops["fold_pack"].found == _ext.backend().name


def test_json_is_json_alone_and_strict_exits_1_on_a_gap(monkeypatch):
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert {"gatepack", "sections", "fixes"} == set(report)
    monkeypatch.setitem(doctor.FLOORS, "torch", "99.0")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    done = CliRunner().invoke(app, ["doctor", "--strict"], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "pip install --upgrade torch" in done.output


def test_strict_exits_0_without_gaps(monkeypatch):
    report = doctor.Report("1.0", (doctor.Section("gpu", (doctor.Finding("gpu", "ok", "one"),)),))
    monkeypatch.setattr(doctor, "examine", lambda: report)
    done = CliRunner().invoke(app, ["doctor", "--strict"])
    assert done.exit_code == 0
    assert "no gaps" in done.output


def test_a_fix_is_printed_whole_on_a_narrow_terminal(monkeypatch):
    fix = "pip install " + " ".join(f"package-{i}" for i in range(20))
    gap = doctor.Finding("thing", "gap", "none", "why [not]", fix)
    monkeypatch.setattr(
        doctor, "examine", lambda: doctor.Report("1.0", (doctor.Section("x", (gap,)),))
    )
    output = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "60"}).output
    assert fix in output and "why [not]" in output


class TestGaps:
    """Each thing that may be missing."""

    @pytest.mark.parametrize("missing", ["torch", "triton", "transformers"])
    def test_package_missing(self, missing, monkeypatch):
        monkeypatch.setitem(sys.modules, missing, None)
        finding = section("packages")[missing]
        assert finding.state == "gap" and "pip install" in finding.fix

    @pytest.mark.parametrize(("name", "extra"), optional_packages())
    def test_optional_package_missing(self, name, extra, monkeypatch):
        monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
        finding = section("packages")[name]
        assert finding.state == "unused"
        assert re.fullmatch(rf".* needs? it: pip install 'gatepack\[{extra}\]'", finding.why)

    def test_optional_package_broken(self, tmp_path, monkeypatch):
        (tmp_path / "gguf.py").write_text("raise OSError('no library')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "gguf", raising=False)
        finding = section("packages")["gguf"]
        assert (finding.state, finding.found) == ("gap", "no library")
        assert finding.fix == "pip install --upgrade gguf"

    @pytest.mark.parametrize("old", ["torch", "transformers", "accelerate"])
    def test_package_below_the_range(self, old, monkeypatch):
        monkeypatch.setitem(doctor.FLOORS, old, "99.1")
        finding = section("packages")[old]
        assert (finding.state, "99.1" in finding.why) == ("gap", True)

    def test_interpreter_with_numpy_that_it_cannot_use(self, monkeypatch):
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton, "__version__", "3.6.0")
        monkeypatch.setattr("numpy.__version__", "2.4.6")
        assert doctor._triton(interpreted=True).fix == "pip install 'numpy<2.4'"
        assert doctor._triton(interpreted=False).state == "ok"

    def test_no_extension(self, monkeypatch):
        monkeypatch.setenv("GATEPACK_SKIP_EXT", "1")
        monkeypatch.setattr(_ext, "_backend", _ext.Backend("torch", "GATEPACK_SKIP_EXT is set"))
        report = doctor.examine()
        extension = section("extension", report)["gatepack._C"]
        assert (extension.found, extension.fix) == ("plain torch", "unset GATEPACK_SKIP_EXT")
        ops = section("ops", report)
        assert ops["fold_pack"].found == "torch"
        assert ops["fold_pack"].fix == "unset GATEPACK_SKIP_EXT"

    @pytest.mark.parametrize(
        ("absent", "fix"), [("c++", "apt-get install g++"), ("ninja", "pip install ninja")]
    )
    def test_no_compiler(self, absent, fix, monkeypatch):
        monkeypatch.delenv("GATEPACK_SKIP_EXT", raising=False)
        monkeypatch.setattr(_ext, "_backend", _ext.Backend("torch", "gatepack._C did not load"))
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(doctor, "_cxx", lambda: None if absent == "c++" else "found")
        monkeypatch.setattr(doctor, "_tool", lambda name: None if name == absent else "found")
        found = section("extension")
        assert found["gatepack._C"].fix.startswith(fix)
        assert found[absent].fix.startswith(fix)

    def test_a_build_that_fails_with_every_tool_there(self, monkeypatch):
        monkeypatch.delenv("GATEPACK_SKIP_EXT", raising=False)
        monkeypatch.setattr(_ext, "_backend", _ext.Backend("torch", "gatepack._C did not load"))
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(doctor, "_cxx", lambda: "found")
        monkeypatch.setattr(doctor, "_tool", lambda name: "found")
        found = section("extension")
        assert "pip install -v --no-build-isolation" in found["gatepack._C"].fix
        assert found["c++"].state == found["ninja"].state == "ok"

    def test_a_build_that_cannot_write_its_cache(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.delenv("GATEPACK_SKIP_EXT", raising=False)
        monkeypatch.setenv("GATEPACK_CACHE_DIR", str(tmp_path / "file" / "cache"))
        monkeypatch.setattr(_ext, "_backend", _ext.Backend("torch", "gatepack._C did not load"))
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(doctor, "_cxx", lambda: "found")
        monkeypatch.setattr(doctor, "_tool", lambda name: "found")
        report = doctor.examine()
        fix = section("caches", report)["extension"].fix
        assert "GATEPACK_CACHE_DIR" in fix
        assert section("extension", report)["gatepack._C"].fix == fix
        assert section("ops", report)["fold_pack"].fix == fix

    def test_torch_too_old_for_the_extension(self, monkeypatch):
        monkeypatch.delenv("GATEPACK_SKIP_EXT", raising=False)
        monkeypatch.setattr(_ext, "_backend", _ext.Backend("torch", "needs torch >= 2.10"))
        monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
        assert section("extension")["gatepack._C"].fix == "pip install --upgrade torch"

    @pytest.mark.parametrize("name", ["GATEPACK_BACKEND", "GATEPACK_SIMD"])
    def test_unknown_choice(self, name, monkeypatch):
        monkeypatch.setenv(name, "fast")
        finding = section("settings")[name]
        assert (finding.state, finding.fix) == ("gap", f"unset {name}")

    def test_unknown_instruction_set_where_the_extension_is_not_loaded_yet(self, monkeypatch):
        monkeypatch.setenv("GATEPACK_SIMD", "avx9000")
        monkeypatch.setattr(_ext, "_backend", None)
        report = doctor.examine()
        for finding in (
            section("extension", report)["gatepack._C"],
            section("ops", report)["fold_pack"],
        ):
            assert (finding.state, finding.fix) == ("gap", "unset GATEPACK_SIMD")
            assert "GATEPACK_SIMD must be" in finding.why and "avx9000" in finding.why
        assert section("extension", report)["c++"].state != "gap"

    def test_cache_below_a_file_or_on_a_full_disk(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("GATEPACK_CACHE_DIR", str(tmp_path / "file" / "cache"))
        finding = section("caches")["extension"]
        assert "cannot be written to" in finding.why and "GATEPACK_CACHE_DIR" in finding.fix
        monkeypatch.setenv("GATEPACK_CACHE_DIR", str(tmp_path / "new"))
        assert section("caches")["extension"].state == "ok"
        assert not (tmp_path / "new").exists(), "looking must not create it"
        monkeypatch.setattr(doctor, "CACHE_BYTES", 1 << 60)
        assert section("caches")["extension"].state == "gap"


class TestGpu:
    """With a GPU that is not there."""

    @pytest.fixture
    def h100(self, monkeypatch):
        device = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 << 30, 80 << 30))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(doctor, "_driver", lambda: "580.1")

    def test_kernels_are_compiled_for_it(self, h100, monkeypatch):
        monkeypatch.setattr(doctor, "_interpreted", lambda: False)
        report = doctor.examine()
        gpu = section("gpu", report)["gpu 0"]
        assert gpu.state == "ok"
        for word in ("NVIDIA H100", "sm_90", "70.0 of 80.0 GiB", "580.1", "13.0"):
            assert word in gpu.found
        op = section("ops", report)["gated_linear"]
        assert (op.state, op.found, op.why) == ("ok", "triton, compiled", "sm_90")

    def test_extension_without_cuda_kernels_is_a_gap(self, h100, monkeypatch):
        if _ext.backend().name != "cpp":
            pytest.skip(f"the extension is {_ext.backend().name}")
        extension = section("extension")["gatepack._C"]
        assert extension.state == "gap" and "CUDA toolkit 13.0" in extension.fix

    def test_torch_without_code_for_it(self, h100, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_100"])
        assert section("gpu")["gpu 0"].fix == "pip install --upgrade torch"

    def test_driver_with_a_torch_for_cpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
        gpu = section("gpu")["gpu"]
        assert "580.1" in gpu.why and "a build of torch for this driver" in gpu.fix

    @pytest.mark.parametrize(
        ("chip", "built", "runs"),
        [
            ((9, 0), ["sm_90a"], True),
            ((8, 9), ["sm_80"], True),
            ((8, 0), ["sm_89"], False),
            ((12, 0), ["sm_80", "sm_90"], False),
            ((12, 0), ["sm_90", "compute_90"], True),
            ((10, 3), ["sm_100"], True),
        ],
    )
    def test_which_code_runs_on_a_chip(self, chip, built, runs):
        assert doctor._runs_on(*chip, built) is runs
