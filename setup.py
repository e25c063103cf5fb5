"""Builds gatepack._C where torch is importable; everything else is in pyproject.toml."""

import os
import runpy
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

for link, target in (("kernels", "triton_kernels"), ("csrc", "csrc")):
    if not (ROOT / "python" / "gatepack" / link).is_dir():
        raise SystemExit(
            f"python/gatepack/{link} must be a link to ../../{target}: this copy of the sources "
            "lost its symbolic links (on Windows, clone with git -c core.symlinks=true)."
        )


def extension() -> dict:
    """C++ always, CUDA when there is a toolkit and a CUDA torch; nothing without torch.

    Where the extension cannot be built, one line says so and the wheel is pure Python.
    """
    if os.environ.get("GATEPACK_SKIP_EXT", "0") not in ("", "0"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return {}
    try:
        plan = runpy.run_path(str(ROOT / "python" / "gatepack" / "_build.py"))["plan"]()
    except RuntimeError as error:
        print(f"gatepack: {error}: installing without gatepack._C", flush=True)
        return {}
    kind = CUDAExtension if plan["cuda"] else CppExtension
    module = kind(
        "gatepack._C",
        [f"csrc/{name}" for name in plan["sources"]],
        extra_compile_args={"cxx": plan["cxx"], "nvcc": plan["nvcc"]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


arguments = extension()
# An empty folder for each build: what an earlier one left in build/lib would go into the wheel, and
# two builds at once would mix.
with tempfile.TemporaryDirectory(prefix="gatepack-build-") as scratch:
    options = {**arguments.pop("options", {}), "build": {"build_base": scratch}}
    setup(
        package_dir={"": "python"},
        packages=find_packages("python"),
        package_data={"gatepack": ["py.typed", "csrc/*"]},
        options=options,
        **arguments,
    )
