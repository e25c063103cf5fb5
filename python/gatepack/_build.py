"""What gatepack._C is compiled from and how: one answer for setup.py and for the first use.

setup.py runs this file by path, before gatepack is importable: nothing of the package is imported.
"""

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

# The stable parallel_for, const_data_ptr and string returns begin with 2.10.
OLDEST_TORCH = (2, 10)

# Contraction off: operations are rounded one by one, in the order that csrc/layout.h states.
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-DUSE_CUDA"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]

CXX_SOURCES = [
    "ops.cpp",
    "fold_pack_cpu.cpp",
    "gate_lanes_cpu.cpp",
    "open_linear_cpu.cpp",
    "open_sets_cpu.cpp",
    "passes_cpu.cpp",
]
CUDA_SOURCES = ["fold_pack_cuda.cu", "open_sets_cuda.cu"]


def cuda_archs(cuda: str) -> str:
    """TORCH_CUDA_ARCH_LIST, else every architecture of note, with PTX for what comes later.

    The device is never asked: it may be absent where the wheel is built.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen.replace(" ", ";")
    if tuple(int(part) for part in cuda.split(".")[:2]) >= (12, 8):
        return "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    return "8.0;8.6;8.9;9.0+PTX"


def gencode(archs: str) -> list[str]:
    """nvcc flags for "9.0;12.0+PTX"; explicit, so that torch's helper does not ask the device."""
    flags = []
    for arch in archs.split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compiler() -> str:
    """CXX (or c++) and the first line of its --version; RuntimeError where it takes no C++17."""
    from torch.utils.cpp_extension import get_cxx_compiler

    command = shlex.split(get_cxx_compiler())
    empty = [*command, "-std=c++17", "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        subprocess.run(empty, check=True, capture_output=True)
        done = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"no C++17 compiler: {shlex.join(command)} does not work") from error
    return f"{shlex.join(command)}: {done.stdout.splitlines()[0]}"


def links_cuda() -> bool:
    """Whether the toolkit has CUDA's runtime library to link with: nvcc may come without it."""
    from torch.utils.cpp_extension import get_cxx_compiler, library_paths

    folders = [f"-L{folder}" for folder in library_paths("cuda")]
    with tempfile.TemporaryDirectory() as scratch:
        empty = [*shlex.split(get_cxx_compiler()), "-shared", "-x", "c++", os.devnull]
        command = [*empty, *folders, "-lcudart", "-o", str(Path(scratch) / "empty.so")]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def plan() -> dict:
    """Sources, flags and what else decides the binary, for the torch at hand.

    Raises RuntimeError where none can work.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise RuntimeError(f"gatepack._C needs torch >= 2.10, got {torch.__version__}")
    toolkit = CUDA_HOME and torch.version.cuda and links_cuda()
    archs = cuda_archs(torch.version.cuda) if toolkit else None
    # The preprocessor turns these into text: commas, because spaces would need quoting.
    defines = [*DEFINES, "-DGATEPACK_FLAGS=" + ",".join(CXX_FLAGS)]
    if archs:
        defines.append("-DGATEPACK_CUDA_ARCHS=" + archs.replace(";", ","))
    return {
        "sources": CXX_SOURCES + (CUDA_SOURCES if archs else []),
        "cxx": CXX_FLAGS + defines,
        "nvcc": NVCC_FLAGS + DEFINES + (gencode(archs) if archs else []),
        "cuda": archs is not None,
        "compiler": compiler(),
        "torch": [torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi()],
    }


def spills(ptxas: str) -> list[str]:
    """Of what ptxas -v says: "BYTES in KERNEL" for each kernel that spills registers."""
    found = []
    kernel = ""
    for line in ptxas.splitlines():
        if "Function properties for" in line:
            kernel = line.split()[-1]
        stores = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if stores and stores.groups() != ("0", "0"):
            found.append(f"{stores.group(1)} + {stores.group(2)} bytes in {kernel}")
    return found


def compile_cuda() -> None:
    """Compile csrc/*.cu for sm_80, sm_90a and sm_100: a check that needs no GPU.

    Fails where a kernel spills registers to memory.
    """
    from torch.utils.cpp_extension import include_paths

    csrc = Path(__file__).resolve().parent / "csrc"
    includes = [f"-I{path}" for path in include_paths()]
    flags = [*NVCC_FLAGS, *DEFINES, *gencode("8.0;9.0a;10.0"), "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in CUDA_SOURCES:
            command = ["nvcc", *flags, *includes, "-Xcompiler", "-fPIC", "-c", str(csrc / name)]
            command += ["-o", str(Path(scratch) / "out.o")]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"nvcc did not compile {name}:\n{done.stderr}")
            spilled = spills(done.stderr)
            if spilled:
                raise SystemExit("\n".join([f"{name} spills registers:", *spilled]))
            print(f"nvcc compiled {name}, no spills", flush=True)


if __name__ == "__main__":
    compile_cuda()
