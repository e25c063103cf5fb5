"""Stage 5, pack: the torch.ops.gatepack of csrc, from gatepack._C or plain torch; fold_pack.

The first call settles which: the installed gatepack._C, else one built now with ninja and kept in
a per-user cache, else gatepack._reference, after one warning that says why. The ops have the same
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
import re
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gatepack import _build, _env
from gatepack._fakes import (
    column_products_fake,
    fold_pack_adjoint_fake,
    fold_pack_fake,
    gate_lanes_backward_fake,
    gate_lanes_fake,
    open_linear_backward_fake,
    open_linear_fake,
    open_sets_fake,
    out_fake,
    pack_tensors_fake,
    remap_ids_fake,
    swiglu_backward_fake,
    swiglu_fake,
    unpack_tensors_fake,
)
from gatepack._reference import (
    column_products_ref,
    fold_pack_adjoint_ref,
    fold_pack_ref,
    gate_lanes_backward_ref,
    gate_lanes_ref,
    open_linear_backward_ref,
    open_linear_ref,
    open_sets_ref,
    pack_tensors_out_ref,
    pack_tensors_ref,
    remap_ids_ref,
    swiglu_backward_ref,
    swiglu_ref,
    unpack_tensors_out_ref,
    unpack_tensors_ref,
)
from gatepack.errors import first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CSRC = Path(__file__).resolve().parent / "csrc"

OPS = (
    "fold_pack",
    "pack_rows",
    "fold_pack_adjoint",
    "pack_tensors",
    "pack_tensors_out",
    "unpack_tensors",
    "unpack_tensors_out",
    "open_sets",
    "remap_ids",
    "open_linear",
    "open_linear_backward",
    "swiglu",
    "swiglu_backward",
    "gate_lanes",
    "gate_lanes_backward",
    "column_products",
)
_SOURCE_SUFFIXES = (".cpp", ".cu", ".h", ".cuh")
_FIX = "`gatepack doctor` prints what to do."


class Backend(NamedTuple):
    """name: "cuda" (_C with CUDA kernels), "cpp" (_C, CPU only) or "torch"; reason: a sentence."""

    name: str
    reason: str


_backend: Backend | None = None
_location: Path | None = None
_library: torch.library.Library | None = None
_fold_pack: torch._C._DispatchOperatorHandle | None = None
_pack_rows: torch._C._DispatchOperatorHandle | None = None
_loading = threading.Lock()


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
    files = sorted(path for path in CSRC.iterdir() if path.suffix in _SOURCE_SUFFIXES)
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
    cap = _env.simd()
    if _env.skip_ext():
        return Backend("torch", "GATEPACK_SKIP_EXT is set")
    try:
        _location, origin = _load_extension()
    except Exception as error:
        return Backend("torch", f"gatepack._C did not load ({first_line(error)})")
    if cap:
        best = build_info()["simd"]
        torch.ops.gatepack.set_simd_level(max(cap, best, key=_env.SIMD_LEVELS.index))
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


def schemas() -> list[str]:
    """The schema of every op in OPS, as csrc/schemas.h states it."""
    text = (CSRC / "schemas.h").read_text()
    found = re.findall(r'^GATEPACK_SCHEMA\((.*?)"\)$', text, re.MULTILINE | re.DOTALL)
    return [re.sub(r'"\s*"', "", schema).strip('"') for schema in found]


def _device_type(value) -> str:
    return value.device.type if isinstance(value, Tensor) else value[0].device.type


def _reference_kernel(reference):
    def kernel(first, *arguments):
        _warn_once(_device_type(first))
        return reference(first, *arguments)

    return kernel


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
    return dw, None, None, None, None, None, None


def _fold_pack_adjoint_backward(ctx, grad):
    dg = torch.ops.gatepack.fold_pack(_usable(grad, ctx.dtype), *ctx.saved_tensors, ctx.dtype)
    return dg, None, None, None, None, None, None, None


# Name, reference, fake, backward.
_TABLE = (
    ("fold_pack", fold_pack_ref, fold_pack_fake, _fold_pack_backward),
    ("pack_rows", fold_pack_ref, fold_pack_fake, None),
    (
        "fold_pack_adjoint",
        fold_pack_adjoint_ref,
        fold_pack_adjoint_fake,
        _fold_pack_adjoint_backward,
    ),
    ("pack_tensors", pack_tensors_ref, pack_tensors_fake, None),
    ("pack_tensors_out", pack_tensors_out_ref, out_fake, None),
    ("unpack_tensors", unpack_tensors_ref, unpack_tensors_fake, None),
    ("unpack_tensors_out", unpack_tensors_out_ref, out_fake, None),
    ("open_sets", open_sets_ref, open_sets_fake, None),
    ("remap_ids", remap_ids_ref, remap_ids_fake, None),
    ("open_linear", open_linear_ref, open_linear_fake, None),
    ("open_linear_backward", open_linear_backward_ref, open_linear_backward_fake, None),
    ("swiglu", swiglu_ref, swiglu_fake, None),
    ("swiglu_backward", swiglu_backward_ref, swiglu_backward_fake, None),
    ("gate_lanes", gate_lanes_ref, gate_lanes_fake, None),
    ("gate_lanes_backward", gate_lanes_backward_ref, gate_lanes_backward_fake, None),
    ("column_products", column_products_ref, column_products_fake, None),
)


def _register(backend: Backend) -> torch.library.Library:
    library = torch.library.Library("gatepack", "FRAGMENT")
    if backend.name == "torch":
        for schema in schemas():
            library.define(schema)
    for name, reference, fake, backward in _TABLE:
        library.impl(name, _reference_kernel(reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"gatepack::{name}", fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(
                f"gatepack::{name}", backward, setup_context=_save, lib=library
            )
    return library


def _load() -> bool:
    global _backend, _library, _fold_pack, _pack_rows
    with _loading:
        if _backend is None:
            chosen = _choose()
            _library = _register(chosen)  # registrations live as long as this object
            _fold_pack = torch.ops.gatepack.fold_pack.default._handle
            _pack_rows = torch.ops.gatepack.pack_rows.default._handle
            _backend = chosen
    return True


# Under torch.compile the first call must happen while tracing, not become part of the graph. The
# mark of torch.compiler.assume_constant_result, which itself imports torch._dynamo: 1.4 s.
_load._dynamo_marked_constant = True


def backend() -> Backend:
    """Which implementation fold_pack runs, and why; loads or builds it if no call has yet."""
    if _backend is None:
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


def _refuse_tangents(op: str, **operands: Tensor | None) -> None:
    """Torch drops tangents at a custom op: unless it is said here, derivatives would be zeros."""
    for name, x in operands.items():
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{op}: {name} must not have a tangent, the op has no forward-mode derivative; "
                "take it by reverse mode, or index and multiply in plain torch"
            )


class refusals:
    """Around calls of ops: what gatepack._C refuses is a ValueError, as in plain torch.

    From torch 2.15 on, the stable ABI hands on every C++ exception as a RuntimeError.
    """

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is RuntimeError:
            _raise_refusal(error)


def _raise_refusal(error: RuntimeError) -> None:
    if str(error).partition(":")[0] in OPS:
        raise ValueError(str(error)) from None


# A small matrix feels each look-up (benchmarks/bench_fold_pack.py).
_ops = torch.ops.gatepack
_below_autograd = torch._C._AutoDispatchBelowAutograd
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_dispatch = torch._C._dispatch_call_boxed
_has_torch_function = torch._C._has_torch_function_variadic
_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_count_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled


def _call(op, matrix: Tensor, *arguments) -> Tensor:
    if _is_compiling():
        return op(matrix, *arguments)
    try:
        if _is_grad_enabled() and matrix.requires_grad:
            return op(matrix, *arguments)
        # The autograd registration is Python code, 10 us a call on a CPU, and without a gradient to
        # record there is nothing for it to do.
        with _below_autograd():
            return op(matrix, *arguments)
    except RuntimeError as error:
        _raise_refusal(error)
        raise


def fold_pack(
    w: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    z_out: Tensor | None = None,
    z_in: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    stream: bool = False,
) -> Tensor:
    """W_k[i, j] = (w[rows[i], cols[j]] · z_out[i]) · z_in[j]

    w [O, I] fp32, fp64, fp16 or bf16, unit stride in one dimension; the result [|R|, |C|] keeps
    that majorness. rows, cols: strictly increasing int64 or int32, None keeps all. z_out [|R|],
    z_in [|C|]: fp32 (fp64 too with an fp64 w), one value per kept unit, None for ones. Products are
    taken in fp32 (fp64 for fp64) and rounded once to dtype (default w.dtype): the same bytes on
    every backend. stream: on an x86 CPU with several threads, write past the caches; faster where
    matmuls on all threads read the result and its memory is written again, slower otherwise.

    Differentiable in w, by reverse mode; refused: gates that require grad, forward-mode tangents,
    other dtypes, strides, index orders. On CUDA the indices are not read by the host: out of range
    traps on the device, order is trusted.
    """
    tracing = _is_dynamo_compiling()
    if tracing or _backend is None:  # torch 2.9 has no guard for what _load sets
        _load()
    if forward_ad._current_level >= 0:
        _refuse_tangents("fold_pack", w=w, z_out=z_out, z_in=z_in)
    # Rows alone, without a gradient, have an op of their own with less to hand over: 1.7 us a call
    # instead of 2.7 us. Tracers, fakes and other modes see fold_pack.
    if (
        cols is z_out is z_in is dtype is None
        and rows is not None
        and not (stream or tracing or _count_modes())
        and not (_has_torch_function(w, rows) or (w.requires_grad and _is_grad_enabled()))
    ):
        try:
            return _dispatch(_pack_rows, w, rows)
        except RuntimeError as error:
            _raise_refusal(error)
            raise
    if z_out is not None or z_in is not None:
        _refuse_gate_gradient("fold_pack", z_out, z_in)
    if (
        _is_compiling()
        or _has_torch_function(w, rows, cols, z_out, z_in)
        or (w.requires_grad and _is_grad_enabled())
        or _is_excluded(_AUTOGRAD)
    ):
        return _call(_ops.fold_pack.default, w, rows, cols, z_out, z_in, dtype, stream)
    # As _call in 1.5 us less. torch.ops is left out, which only looks for overrides of functions:
    # dispatch modes, functorch, fakes, tracers and profilers work in the dispatcher.
    _exclude(_AUTOGRAD, True)
    try:
        return _dispatch(_fold_pack, w, rows, cols, z_out, z_in, dtype, stream)
    except RuntimeError as error:
        _raise_refusal(error)
        raise
    finally:
        _exclude(_AUTOGRAD, False)


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
    everything else as in fold_pack, but on CUDA what an index has out of range is left out.
    """
    if _is_dynamo_compiling() or _backend is None:
        _load()
    if z_out is not None or z_in is not None:
        _refuse_gate_gradient("fold_pack_adjoint", z_out, z_in)
    if forward_ad._current_level >= 0:
        _refuse_tangents("fold_pack_adjoint", g=g, z_out=z_out, z_in=z_in)
    return _call(_ops.fold_pack_adjoint.default, g, rows, cols, z_out, z_in, O, I, dtype)
