"""Every environment variable of gatepack. Only setup.py, which cannot import this, looks besides.

GATEPACK_SKIP_EXT=1           use plain torch in place of gatepack._C; at install, do not build it
GATEPACK_CACHE_DIR=PATH       where an extension built on first use is kept
                              (default $XDG_CACHE_HOME/gatepack, else ~/.cache/gatepack)
GATEPACK_SIMD=avx512|avx2|scalar
                              cap the CPU instruction set of gatepack._C (default: the best present)
GATEPACK_BACKEND=folded|triton|dense
                              force the path of gated modules (default: by shape and device)
GATEPACK_COMMIT=SHA           what benchmarks write as the commit where the sources are no checkout
"""

import os
from pathlib import Path

# A machine that has one has those after it.
SIMD_LEVELS = ("avx512", "avx2", "scalar")


def skip_ext() -> bool:
    return os.environ.get("GATEPACK_SKIP_EXT", "0") not in ("", "0")


def cache_dir() -> Path:
    chosen = os.environ.get("GATEPACK_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gatepack"


def commit() -> str:
    return os.environ.get("GATEPACK_COMMIT", "")


def _one_of(variable: str, *choices: str) -> str | None:
    chosen = os.environ.get(variable) or None
    if chosen not in (None, *choices):
        *others, last = choices
        raise ValueError(f"{variable} must be {', '.join(others)} or {last}, got {chosen!r}")
    return chosen


def simd() -> str | None:
    return _one_of("GATEPACK_SIMD", *SIMD_LEVELS)


def backend() -> str | None:
    return _one_of("GATEPACK_BACKEND", "folded", "triton", "dense")
