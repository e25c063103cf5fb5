"""Stage 7, command line: what of gatepack works on this machine, what does not, and the cure."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gatepack import __version__, _env
from gatepack.errors import first_line

# As pyproject.toml admits them; a test compares the two.
FLOORS = {
    "python": "3.10",
    "torch": "2.9",
    "triton": "3.5",
    "transformers": "5.1",
    "accelerate": "1.3",
    "peft": "0.21",
}
CACHE_BYTES = 1 << 30
_GPU_FIX = "run on a machine with an NVIDIA or AMD GPU and its driver (nvidia-smi must list it)"
_TORCH_FIX = "pip install --upgrade torch"
_CUDA_TORCH_FIX = "pip uninstall -y torch; pip install a build of torch for this driver"
_CXX_FIX = "apt-get install g++ (or set CXX to a C++17 compiler)"
_REINSTALL = "--no-build-isolation --force-reinstall --no-deps gatepack"
_NO_GPU, _UNUSED_GPU = "none", "not used"
# Package, what needs it, and the extra of gatepack that brings it.
_OPTIONAL = (
    ("peft", "adapters need it", "peft"),
    ("matplotlib", "figures need it", "plot"),
    ("gguf", "export to and reading of GGUF files need it", "gguf"),
    ("sentencepiece", "vocabularies of some GGUF files need it", "gguf"),
    ("onnx", "export to ONNX needs it", "onnx"),
    ("onnxscript", "export to ONNX needs it", "onnx"),
    ("onnxruntime", "export to ONNX needs it", "onnx"),
    ("lm-eval", "tasks of evaluate need it", "eval"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state: "ok"; "gap", something that gatepack could use and cannot; or "unused", not there and not
    needed here. found: what there is. why: what the gap costs, or why there is none. fix: the one
    line that closes a gap, else "".
    """

    name: str
    state: str
    found: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Section:
    """Findings about one subject."""

    name: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Report:
    """What gatepack finds on this machine; `gatepack doctor` prints it."""

    gatepack: str
    sections: tuple[Section, ...]

    @property
    def gaps(self) -> tuple[Finding, ...]:
        return tuple(f for section in self.sections for f in section.findings if f.state == "gap")

    @property
    def fixes(self) -> tuple[str, ...]:
        """Each line that closes a gap, once, in the order of the gaps."""
        return tuple(dict.fromkeys(gap.fix for gap in self.gaps))

    def to_dict(self) -> dict:
        """JSON types, for bug reports."""
        return {**asdict(self), "fixes": list(self.fixes)}


def examine() -> Report:
    """Looks at everything gatepack can use. Loads the extension as a first use would: builds it.

    Never raises for what is missing or broken: that is what the report says.
    """
    torch, torch_finding = _import("torch", _TORCH_FIX, "nothing works without it")
    interpreted = _interpreted()
    machine = Section("machine", (_platform(), _python()))
    packages = Section(
        "packages",
        (
            torch_finding,
            _triton(interpreted),
            _package("transformers", "attach, pack and checkpoints of models need it"),
            _package("accelerate", "transformers' Trainer needs it"),
            *(_package(*row) for row in _OPTIONAL),
        ),
    )
    if torch is None:
        return Report(__version__, (machine, packages, _caches()))
    gpus = _gpus(torch)
    backend, reason = _backend()
    extension = _extension(torch, gpus, backend, reason)
    return Report(
        __version__,
        (
            machine,
            packages,
            Section("gpu", gpus),
            Section("extension", (extension, *_compilers(backend, extension, gpus, interpreted))),
            Section("ops", (*_csrc_ops(backend, extension), *_kernel_ops(gpus, interpreted))),
            _settings(),
            _caches(),
        ),
    )


def show(report: Report) -> None:
    """Prints a report as a table, then each line that closes a gap."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=f"gatepack {report.gatepack}", title_justify="left", box=None)
    table.add_column("")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("why", overflow="fold")
    styles = {"ok": "green", "gap": "bold red", "unused": "dim"}
    for section in report.sections:
        table.add_row(Text(section.name, "bold"))
        above = ""
        for finding in section.findings:
            state = Text(finding.state, styles[finding.state])
            why = finding.why if finding.why != above else ""  # once for a run of ops
            table.add_row(f"  {finding.name}", state, Text(finding.found), Text(why))
            above = finding.why
    console.print(table)
    if not report.fixes:
        console.print("\nno gaps")
        return
    console.print(f"\n{len(report.gaps)} gaps; what closes them:")
    for fix in report.fixes:
        names = ", ".join(gap.name for gap in report.gaps if gap.fix == fix)
        # One line each, whole: to be copied.
        console.print(f"  {fix}", style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(f"    for {names}", style="dim", markup=False, highlight=False)


def _platform() -> Finding:
    return Finding("platform", "ok", f"{platform.platform()}, {os.cpu_count()} CPUs")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _supported(name: str, version: str, fix: str) -> Finding:
    floor = FLOORS.get(name)
    if floor and _release(version) < _release(floor):
        why = f"gatepack {__version__} is tested from {floor} on"
        return Finding(name, "gap", version, why, fix)
    return Finding(name, "ok", version)


def _import(name: str, fix: str, why: str):
    """The module and a Finding about it; None where it does not import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(_module(name))
    except Exception as error:
        return None, Finding(name, "gap", first_line(error), why, fix)
    version = getattr(module, "__version__", None) or importlib.metadata.version(name)
    return module, _supported(name, version, fix)


def _module(name: str) -> str:
    return name.replace("-", "_")


def _python() -> Finding:
    found = _supported("python", platform.python_version(), "install Python 3.10 or newer")
    return Finding("python", found.state, f"{found.found}, {sys.executable}", found.why, found.fix)


def _package(name: str, why: str, extra: str = "") -> Finding:
    floor = FLOORS.get(name)
    fix = f"pip install --upgrade '{name}>={floor}'" if floor else f"pip install --upgrade {name}"
    if importlib.util.find_spec(_module(name)) is None:
        if extra:
            why = f"{why}: pip install 'gatepack[{extra}]'"
            return Finding(name, "unused", "not installed", why)
        return Finding(name, "gap", "not installed", why, fix)
    return _import(name, fix, why)[1]


def _triton(interpreted: bool) -> Finding:
    module, found = _import("triton", "pip install triton", "gatepack.kernels needs it")
    if module is None or not interpreted:
        return found
    numpy = importlib.import_module("numpy")
    if _release(module.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        return Finding(
            "triton",
            "gap",
            found.found,
            "interpreters before Triton 3.7 fail with NumPy 2.4 and newer",
            "pip install 'numpy<2.4'",
        )
    return Finding("triton", found.state, f"{found.found}, interpreter on", found.why, found.fix)


def _interpreted() -> bool:
    try:
        from triton import knobs
    except Exception:
        return False
    return bool(knobs.runtime.interpret)


def _gpus(torch) -> tuple[Finding, ...]:
    driver = _driver()
    if not torch.cuda.is_available():
        if driver and not (torch.version.cuda or torch.version.hip):
            why = f"driver {driver} is there, but torch {torch.__version__} is a build for CPUs"
            return (Finding("gpu", "gap", _UNUSED_GPU, why, _CUDA_TORCH_FIX),)
        why = f"torch {torch.__version__} sees none"
        return (Finding("gpu", "gap", _NO_GPU, f"kernels run on GPUs; {why}", _GPU_FIX),)
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        arch = f"sm_{device.major}{device.minor}"
        text = (
            f"{device.name}, {getattr(device, 'gcnArchName', '') or arch}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {driver or 'unknown'}, "
            f"torch for {torch.version.cuda or torch.version.hip}"
        )
        built = torch.cuda.get_arch_list()
        if torch.version.cuda and not _runs_on(device.major, device.minor, built):
            why = f"this torch has code for {', '.join(built)}"
            found.append(Finding(f"gpu {index}", "gap", text, why, _TORCH_FIX))
        else:
            found.append(Finding(f"gpu {index}", "ok", text))
    return tuple(found)


def _runs_on(major: int, minor: int, built: list[str]) -> bool:
    """Machine code runs on chips of its major version from its minor on; PTX on all later ones."""
    for name in built:
        kind, _, number = name.partition("_")
        digits = re.sub(r"\D", "", number)
        have = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and have <= (major, minor):
            return True
        if kind == "sm" and have[0] == major and have[1] <= minor:
            return True
    return not built


def _driver() -> str:
    """NVIDIA's or AMD's driver version, "" where neither is loaded."""
    for path in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            continue
        return (re.findall(r"\d+(?:\.\d+)+", text) or ["unknown"])[0]
    return ""


def _has_gpu(gpus: tuple[Finding, ...]) -> bool:
    return gpus[0].found not in (_NO_GPU, _UNUSED_GPU)


def _backend() -> tuple[str, str]:
    """Name and reason of the extension's; "none" where a setting is refused, so that no op runs."""
    from gatepack import _ext

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _ext.backend()
    except ValueError as error:
        return "none", str(error)


def _extension(torch, gpus: tuple[Finding, ...], backend: str, reason: str) -> Finding:
    from gatepack import _ext

    if backend == "none":
        return Finding("gatepack._C", "gap", "not loaded", reason, "unset GATEPACK_SIMD")
    if backend == "torch":
        return Finding("gatepack._C", "gap", "plain torch", reason, _extension_fix(torch))
    info = _ext.build_info()
    details = ", ".join(f"{key} {value}" for key, value in info.items() if value is not None)
    found = f"{backend}, {_ext.location()}: {details}"
    if backend == "cpp" and torch.version.cuda and _has_gpu(gpus):
        return Finding("gatepack._C", "gap", found, reason, _nvcc_fix(torch))
    return Finding("gatepack._C", "ok", found, reason)


def _nvcc_fix(torch) -> str:
    return (
        f"install the CUDA toolkit {torch.version.cuda}, set CUDA_HOME, and reinstall: "
        f"pip install {_REINSTALL}"
    )


def _extension_fix(torch) -> str:
    from gatepack import _build

    if _env.skip_ext():
        return "unset GATEPACK_SKIP_EXT"
    if _release(torch.__version__) < _build.OLDEST_TORCH:
        return _TORCH_FIX
    if _cxx() is None:
        return _CXX_FIX
    if _tool("ninja") is None:
        return "pip install ninja"
    cache = _extension_cache()
    if cache.state == "gap":
        return cache.fix
    return f"mend what the compiler says to: pip install -v {_REINSTALL}"


def _cxx() -> str | None:
    """The C++ compiler and its version, None where it does not compile C++17."""
    from gatepack import _build

    try:
        return _build.compiler()
    except RuntimeError:
        return None


def _tool(name: str) -> str | None:
    """First line of `name --version`, None where it does not run."""
    beside_python = str(Path(sys.executable).parent)
    path = shutil.which(name) or shutil.which(name, path=beside_python)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    # nvcc's last but one line has its version, the others' first.
    version = next((line for line in lines if "release" in line), lines[0])
    return f"{path}: {version}"


def _compilers(
    backend: str, extension: Finding, gpus: tuple[Finding, ...], interpreted: bool
) -> Iterator[Finding]:
    """c++, ninja, nvcc and cc: gaps only where what they would build is missing."""
    import torch
    from torch.utils import cpp_extension

    unbuilt = backend == "torch" and not _env.skip_ext()
    cannot = "the extension cannot be built"
    no_kernels = backend == "cpp" and extension.state == "gap"
    launchers = _has_gpu(gpus) and not interpreted
    nvcc = str(Path(cpp_extension.CUDA_HOME) / "bin/nvcc") if cpp_extension.CUDA_HOME else "nvcc"
    for name, found, needed, why, fix in (
        ("c++", _cxx(), unbuilt, cannot, _CXX_FIX),
        ("ninja", _tool("ninja"), unbuilt, cannot, "pip install ninja"),
        ("nvcc", _tool(nvcc), no_kernels, "the extension has no CUDA kernels", _nvcc_fix(torch)),
        ("cc", _tool("cc"), launchers, "Triton cannot compile launchers", "apt-get install gcc"),
    ):
        if found is not None:
            yield Finding(name, "ok", found)
        elif needed:
            yield Finding(name, "gap", "not found", why, fix)
        else:
            yield Finding(name, "unused", "not found", "not needed here")


def _csrc_ops(backend: str, extension: Finding) -> tuple[Finding, ...]:
    from gatepack import _ext

    why = extension.why if extension.state == "gap" else ""
    return tuple(Finding(name, extension.state, backend, why, extension.fix) for name in _ext.OPS)


def _kernel_ops(gpus: tuple[Finding, ...], interpreted: bool) -> tuple[Finding, ...]:
    """Every op of gatepack.kernels: Triton compiled or interpreted, else its reference."""
    try:
        from gatepack import kernels
    except Exception as error:
        return (Finding("kernels", "gap", "reference", first_line(error), "pip install triton"),)
    names = [name.removesuffix("_fn") for name in kernels.__all__ if name.endswith("_fn")]
    if interpreted:
        how = ("ok", "triton, interpreter", "TRITON_INTERPRET is set: for tests, slow", "")
    elif not _has_gpu(gpus):
        why = "kernels refuse CPU tensors: gated modules run plain torch there"
        how = ("gap", "reference", why, gpus[0].fix)
    else:
        how = ("ok", "triton, compiled", gpus[0].found.split(", ")[1], "")
    return tuple(Finding(name, *how) for name in names)


def _settings() -> Section:
    forced = "every gated layer takes this path"
    return Section(
        "settings",
        (
            _setting("GATEPACK_BACKEND", _env.backend, forced, "by shape and device"),
            _setting("GATEPACK_SIMD", _env.simd, "no instruction set above it is used", ""),
        ),
    )


def _setting(name: str, read: Callable[[], str | None], why: str, why_unset: str) -> Finding:
    try:
        chosen = read()
    except ValueError as error:
        return Finding(name, "gap", str(error), "", f"unset {name}")
    return Finding(name, "ok", chosen or "not set", why if chosen else why_unset)


def _caches() -> Section:
    found = [_extension_cache()]
    try:
        from triton import knobs

        found.append(_cache("triton", Path(knobs.cache.dir), "TRITON_CACHE_DIR"))
    except Exception:
        pass  # the finding about triton says why
    return Section("caches", tuple(found))


def _extension_cache() -> Finding:
    return _cache("extension", _env.cache_dir(), "GATEPACK_CACHE_DIR")


def _cache(name: str, folder: Path, variable: str) -> Finding:
    """Whether a cache can be written to and has room; nothing is created."""
    present = folder
    while not present.exists() and present != present.parent:
        present = present.parent
    fix = f"set {variable} to a folder that can be written to, with 1 GiB free"
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        return Finding(name, "gap", str(folder), f"{present} cannot be written to", fix)
    free = shutil.disk_usage(present).free
    text = f"{folder}, {free / 2**30:.1f} GiB free"
    if free < CACHE_BYTES:
        return Finding(name, "gap", text, "less than 1 GiB is free", fix)
    return Finding(name, "ok", text)
