"""Stage 5, pack: torch.ops.gatepack.fold_pack and its adjoint, from gatepack._C or plain torch.

The first call settles which: the installed gatepack._C, else one built now with ninja and kept in
a per-user cache, else the reference below, after one warning that says why. The ops have the same
schema, fake and gradient in every case; the reference also serves devices that _C does not know.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gatepack import _build, _env

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CSRC = Path(__file__).resolve().parent / "csrc"

OPS = ("fold_pack", "fold_pack_adjoint")
_SCHEMAS = (
    "fold_pack(Tensor w, Tensor? rows, Tensor? cols, Tensor? z_out, Tensor? z_in, "
    "ScalarType? dtype) -> Tensor",
    "fold_pack_adjoint(Tensor g, Tensor? rows, Tensor? cols, Tensor? z_out, Tensor? z_in, "
    "SymInt O, SymInt I, ScalarType? dtype) -> Tensor",
)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FIX = "Install ninja and a C++17 compiler, or reinstall with --no-build-isolation."


class Backend(NamedTuple):
    """name: "cuda" (_C with CUDA kernels), "cpp" (_C, CPU only) or "torch"; reason: a sentence."""

    name: str
    reason: str


_backend: Backend | None = None
_location: Path | None = None
_library: torch.library.Library | None = None
_loading = threading.Lock()


# Reference


def _row_major(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1


def _empty(like: Tensor, m: int, n: int, dtype: torch.dtype) -> Tensor:
    if _row_major(like):
        return like.new_empty((m, n), dtype=dtype)
    return like.new_empty((n, m), dtype=dtype).t()


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _check_index(op: str, name: str, index: Tensor | None, bound: int) -> int:
    if index is None:
        return bound
    _require(index.dim() == 1, f"{op}: {name} must have 1 dimension, got {index.dim()}")
    _require(
        index.dtype in (torch.int64, torch.int32),
        f"{op}: {name} must be int64 or int32, got {index.dtype}",
    )
    # Reading an index that lives elsewhere would stop the host; torch checks its range there.
    if index.device.type == "cpu" and index.numel():
        _require(bool((index[1:] > index[:-1]).all()), f"{op}: {name} must be strictly increasing")
        low, high = int(index[0]), int(index[-1])
        _require(
            low >= 0 and high < bound,
            f"{op}: {name} must be in [0, {bound}), got {low if low < 0 else high}",
        )
    return index.numel()


def _check_gate(op: str, name: str, gate: Tensor | None, kept: int, wide: bool) -> None:
    if gate is None:
        return
    allowed = (torch.float32, torch.float64) if wide else (torch.float32,)
    _require(gate.dim() == 1, f"{op}: {name} must have 1 dimension, got {gate.dim()}")
    _require(
        gate.dtype in allowed,
        f"{op}: {name} must be float32{' or float64' if wide else ''}, got {gate.dtype}",
    )
    _require(
        gate.numel() == kept,
        f"{op}: {name} must have one value per kept unit ({kept}), got {gate.numel()}",
    )


def _check(op, name, matrix, rows, cols, z_out, z_in, dtype, shape) -> tuple[int, int]:
    """Refuse what the C++ op refuses; return the compact shape."""
    _require(matrix.dim() == 2, f"{op}: {name} must have 2 dimensions, got {matrix.dim()}")
    for what, value in ((name, matrix.dtype), ("dtype", dtype or matrix.dtype)):
        _require(
            value in _DTYPES,
            f"{op}: {what} must be float32, float64, float16 or bfloat16, got {value}",
        )
    _require(
        _row_major(matrix) or matrix.stride(0) == 1 or matrix.shape[0] <= 1,
        f"{op}: {name} must have stride 1 in one dimension, got strides {matrix.stride()}",
    )
    kept = (
        _check_index(op, "rows", rows, shape[0]),
        _check_index(op, "cols", cols, shape[1]),
    )
    wide = matrix.dtype == torch.float64
    _check_gate(op, "z_out", z_out, kept[0], wide)
    _check_gate(op, "z_in", z_in, kept[1], wide)
    return kept


def _scaled(kept: Tensor, z_out: Tensor | None, z_in: Tensor | None) -> Tensor:
    if z_out is None and z_in is None:
        return kept
    kept = kept if kept.dtype == torch.float64 else kept.float()
    kept = kept if z_out is None else kept * z_out[:, None]
    return kept if z_in is None else kept * z_in[None, :]


def fold_pack_ref(w, rows=None, cols=None, z_out=None, z_in=None, dtype=None) -> Tensor:
    """(w[rows, cols] · z_out) · z_in in fp32, rounded once: what every backend must equal."""
    m, n = _check("fold_pack", "w", w, rows, cols, z_out, z_in, dtype, w.shape)
    kept = w if rows is None else w.index_select(0, rows)
    kept = kept if cols is None else kept.index_select(1, cols)
    return _empty(w, m, n, dtype or w.dtype).copy_(_scaled(kept, z_out, z_in))


def fold_pack_adjoint_ref(g, rows, cols, z_out, z_in, O, I, dtype=None) -> Tensor:
    """The adjoint of fold_pack in w: g scaled and put back, zero elsewhere."""
    op = "fold_pack_adjoint"
    kept = _check(op, "g", g, rows, cols, z_out, z_in, dtype, (O, I))
    _require(
        tuple(g.shape) == kept,
        f"{op}: g must be {kept[0]} x {kept[1]}, got {g.shape[0]} x {g.shape[1]}",
    )
    dtype = dtype or g.dtype
    values = _scaled(g, z_out, z_in).to(dtype)
    if cols is not None:
        values = values.new_zeros(values.shape[0], I).index_copy_(1, cols.long(), values)
    if rows is not None:
        values = values.new_zeros(O, I).index_copy_(0, rows.long(), values)
    return _empty(g, O, I, dtype).copy_(values)


# Loading


@contextlib.contextmanager
def _locked(folder: Path):
    # flock ends with its process, so an interrupted build cannot block the next one.
    if fcntl is None:
        raise RuntimeError("building on first use needs Linux or macOS")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _load_from_cache() -> Path:
    """Load the cached extension, building it when absent, damaged or from other sources."""
    plan = _build.plan()
    files = sorted(path for path in CSRC.iterdir() if path.suffix in (".cpp", ".cu", ".h"))
    if not files:
        raise RuntimeError(f"no C++ sources in {CSRC}")
    made_of = (json.dumps(plan), platform.machine())
    key = _digest(*(path.read_bytes() for path in files), *(part.encode() for part in made_of))
    folder = _env.cache_dir() / key[:16]
    library, stamp = folder / "_C.so", folder / "_C.sha256"
    with _locked(folder):
        # Checked before it is mapped: a truncated library kills the process instead of raising.
        with contextlib.suppress(OSError):
            if stamp.read_text() == _digest(library.read_bytes()):
                torch.ops.load_library(library)
                return library
        for leftover in folder.glob("build-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
            from torch.utils.cpp_extension import load

            load(
                "gatepack_C",
                [str(CSRC / name) for name in plan["sources"]],
                extra_cflags=plan["cxx"],
                extra_cuda_cflags=plan["nvcc"],
                build_directory=scratch,
                with_cuda=plan["cuda"],
                is_python_module=False,
            )
            built = next(Path(scratch).glob("*.so"))
            stamp.write_text(_digest(built.read_bytes()))
            os.replace(built, library)
    return library


def _load_extension() -> tuple[Path, str]:
    """The library that is now loaded, and where it came from."""
    if importlib.util.find_spec("gatepack._C"):
        module = importlib.import_module("gatepack._C")
        return Path(module.__file__), "installed with the package"
    library = _load_from_cache()
    return library, f"built on first use, {library}"


def _choose() -> Backend:
    global _location
    if _env.skip_ext():
        return Backend("torch", "GATEPACK_SKIP_EXT is set")
    try:
        _location, origin = _load_extension()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Backend("torch", f"gatepack._C did not load ({lines[0]})")
    if _env.simd():
        torch.ops.gatepack.set_simd_level(_env.simd())
    if build_info()["cuda_archs"]:
        return Backend("cuda", f"gatepack._C {origin}")
    return Backend("cpp", f"gatepack._C {origin}, without CUDA kernels")


@functools.cache
def _warn_once(device_type: str) -> None:
    fix = "Unset it." if _env.skip_ext() else _FIX
    warnings.warn(
        f"gatepack: fold_pack on {device_type} is plain torch, slower: {_backend.reason}. {fix}",
        RuntimeWarning,
        stacklevel=2,
    )


# Ops


def _reference_kernel(reference):
    def kernel(matrix, *arguments):
        _warn_once(matrix.device.type)
        return reference(matrix, *arguments)

    return kernel


def _fold_pack_fake(w, rows, cols, z_out, z_in, dtype):
    m = w.shape[0] if rows is None else rows.shape[0]
    n = w.shape[1] if cols is None else cols.shape[0]
    return _empty(w, m, n, dtype or w.dtype)


def _fold_pack_adjoint_fake(g, rows, cols, z_out, z_in, O, I, dtype):
    return _empty(g, O, I, dtype or g.dtype)


def _save(ctx, inputs, output):
    matrix, rows, cols, z_out, z_in, *_ = inputs
    ctx.save_for_backward(rows, cols, z_out, z_in)
    ctx.shape, ctx.dtype = matrix.shape, matrix.dtype


def _usable(grad: Tensor, dtype: torch.dtype) -> Tensor:
    # An upstream gradient may be expanded, and fp64 gates go with an fp64 matrix only.
    grad = grad if 1 in grad.stride() else grad.contiguous()
    return grad.double() if dtype == torch.float64 else grad


def _fold_pack_backward(ctx, grad):
    dw = torch.ops.gatepack.fold_pack_adjoint(
        _usable(grad, ctx.dtype), *ctx.saved_tensors, *ctx.shape, ctx.dtype
    )
    return dw, None, None, None, None, None


def _fold_pack_adjoint_backward(ctx, grad):
    dg = torch.ops.gatepack.fold_pack(_usable(grad, ctx.dtype), *ctx.saved_tensors, ctx.dtype)
    return dg, None, None, None, None, None, None, None


def _register(backend: Backend) -> torch.library.Library:
    library = torch.library.Library("gatepack", "FRAGMENT")
    if backend.name == "torch":
        for schema in _SCHEMAS:
            library.define(schema)
    for name, reference, fake, backward in (
        ("fold_pack", fold_pack_ref, _fold_pack_fake, _fold_pack_backward),
        (
            "fold_pack_adjoint",
            fold_pack_adjoint_ref,
            _fold_pack_adjoint_fake,
            _fold_pack_adjoint_backward,
        ),
    ):
        library.impl(name, _reference_kernel(reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"gatepack::{name}", fake, lib=library)
        torch.library.register_autograd(
            f"gatepack::{name}", backward, setup_context=_save, lib=library
        )
    return library


# Under torch.compile the first call must happen while tracing, not become part of the graph.
@torch.compiler.assume_constant_result
def _load() -> bool:
    global _backend, _library
    with _loading:
        if _backend is None:
            chosen = _choose()
            _library = _register(chosen)  # registrations live as long as this object
            _backend = chosen
    return True


def backend() -> Backend:
    """Which implementation fold_pack runs, and why; loads or builds it if no call has yet."""
    _load()
    return _backend


def location() -> Path | None:
    """The file that gatepack._C was loaded from, None where plain torch runs."""
    _load()
    return _location


def build_info() -> dict:
    """Compiler, flags, instruction set, threads and CUDA architectures of gatepack._C."""
    return json.loads(torch.ops.gatepack.build_info())


def _refuse_gate_gradient(op: str, z_out: Tensor | None, z_in: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, z in (("z_out", z_out), ("z_in", z_in)):
        if z is not None and z.requires_grad:
            raise ValueError(
                f"{op}: {name} must not require grad, the op is differentiable in its matrix only; "
                f"pass {name}.detach() and take gate gradients from gatepack's modules"
            )


def _call(op, matrix: Tensor, *arguments) -> Tensor:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and matrix.requires_grad):
        return op(matrix, *arguments)
    # The autograd registration is Python code: 10 us a call on a CPU, which a small matrix feels
    # (benchmarks/bench_fold_pack.py). Without a gradient to record there is nothing for it to do.
    with torch._C._AutoDispatchBelowAutograd():
        return op(matrix, *arguments)


def fold_pack(
    w: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    z_out: Tensor | None = None,
    z_in: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W_k[i, j] = (w[rows[i], cols[j]] · z_out[i]) · z_in[j]

    w [O, I] fp32, fp64, fp16 or bf16, unit stride in one dimension; the result [|R|, |C|] keeps
    that majorness. rows, cols: strictly increasing int64 or int32, None keeps all. z_out [|R|],
    z_in [|C|]: fp32 (fp64 too with an fp64 w), one value per kept unit, None for ones. Products are
    taken in fp32 (fp64 for fp64) and rounded once to dtype (default w.dtype): the same bytes on
    every backend.

    Differentiable in w; refused: gates that require grad, other dtypes, strides, index orders. On
    CUDA the indices are not read by the host: out of range traps on the device, order is trusted.
    """
    if _backend is None:
        _load()
    _refuse_gate_gradient("fold_pack", z_out, z_in)
    return _call(torch.ops.gatepack.fold_pack.default, w, rows, cols, z_out, z_in, dtype)


def fold_pack_adjoint(
    g: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    z_out: Tensor | None,
    z_in: Tensor | None,
    O: int,
    I: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """G[rows[i], cols[j]] = (g[i, j] · z_out[i]) · z_in[j], zero elsewhere; G [O, I]

    The adjoint of fold_pack in w, and with no gates its inverse on what was kept. g [|R|, |C|];
    everything else as in fold_pack.
    """
    if _backend is None:
        _load()
    _refuse_gate_gradient("fold_pack_adjoint", z_out, z_in)
    op = torch.ops.gatepack.fold_pack_adjoint.default
    return _call(op, g, rows, cols, z_out, z_in, O, I, dtype)
