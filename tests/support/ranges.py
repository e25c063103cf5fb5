"""Runs a selection of the tests at the ends of what pyproject.toml admits: `make test-ranges`.

python tests/support/ranges.py [oldest] [compiled] [newest]

Each end has an environment in build/ranges, made once and brought up to date by later runs:
"oldest" has exactly the lower bounds, "compiled" the oldest torch that the extension is built for,
"newest" the newest releases. gatepack is installed there as a wheel, with the extension but for
"oldest", and it is the installed package that the tests import. PyPI's torch for Linux brings CUDA,
some 7 GB for each end; for the builds without:
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-ranges
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "python" / "gatepack" / "_build.py"
ENDS = ("oldest", "compiled", "newest")
# Gates, modules, packing, checkpoints, PEFT, the Trainer, the extension, the interpreter, the
# command line.
TESTS = (
    "api budget callback channel_stats checkpoint closed_gradients closure column_dot "
    "compensation doctor ext families fold_pack forwards_that_meet functional gate_penalty "
    "gated_attention gated_linear gated_matmul gated_mlp gated_swiglu gates gather_norm "
    "head_counts hf interrupted_save kernels_common launches linear_cross_entropy mlp modules "
    "open_set_ops open_sets pack_tensors packed_linear packing repack row_column sample_gates "
    "samples scatter_add sites training"
).split()
_TOOLS = ("pytest", "hypothesis", "ninja")


def floors(text: str) -> dict[str, str]:
    """name -> lower bound of everything that a pyproject.toml asks for by "name>=version"."""
    return dict(re.findall(r'"([A-Za-z][\w-]*)>=([\d.]+)', text))


def interpreter(end: str, text: str) -> str:
    """The oldest Python that the metadata admits where it is installed, else the running one."""
    (least,) = re.findall(r'requires-python = ">=([\d.]+)"', text)
    found = shutil.which(f"python{least}") if end == "oldest" else None
    runs = found and not subprocess.run([found, "-c", ""], capture_output=True).returncode
    return found if runs else sys.executable


def check(end: str) -> int:
    """Brings the environment of one end up to date and runs the tests there; their exit status."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folder = ROOT / "build" / "ranges" / end
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter(end, text), "-m", "venv", str(folder)], check=True)
    oldest = ".".join(map(str, runpy.run_path(str(BUILD))["OLDEST_TORCH"]))
    least = floors(text)
    # The interpreter of its Triton does not run with every newer NumPy.
    compiled = {"torch": f"{oldest}.0", "numpy": least["numpy"]}
    exact = {"oldest": least, "compiled": compiled}.get(end, {})
    bounds = folder / "constraints.txt"
    bounds.write_text("".join(f"{name}=={version}\n" for name, version in exact.items()))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-c", str(bounds)]
    newest = ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*pip, *newest, "torch", "setuptools", *_TOOLS], check=True)
    # The extension is built against that torch, hence without isolation; the tests need no GPU.
    one_chip = {"TORCH_CUDA_ARCH_LIST": "9.0", **os.environ}
    package = [*pip, *newest, "--no-build-isolation", f"{ROOT}[peft]"]
    subprocess.run(package, check=True, env=one_chip)
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    command = [str(python), "-m", "pytest", "-o", "pythonpath=tests/support", *files]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([str(folder / "bin" / "gatepack"), "doctor"], env=variables, check=True)
    if end != "oldest":  # pip installs without the extension if that cannot be built
        built = "from gatepack._ext import backend; exit(backend().name == 'torch')"
        subprocess.run([str(python), "-c", built], cwd=folder, env=variables, check=True)
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


def main() -> None:
    ends = sys.argv[1:] or ENDS
    if not set(ends) <= set(ENDS):
        raise SystemExit(f"ends: expected some of {', '.join(ENDS)}, got {' '.join(ends)}")
    try:
        failed = [end for end in ends if check(end)]
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{shlex.join(error.cmd)} exited with {error.returncode}") from error
    if failed:
        raise SystemExit(f"tests failed with the {' and the '.join(failed)} releases")


if __name__ == "__main__":
    main()
