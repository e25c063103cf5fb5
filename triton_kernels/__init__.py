"""Stage 2, kernels: the fused ops behind gated training and packed inference.

Imported as `gatepack.kernels`. Needs torch and triton only. Importing it touches no device and
compiles nothing; a kernel is compiled when it is first launched.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is gatepack's kernel source, not OpenAI's package `triton_kernels`; "
        "import gatepack.kernels instead"
    )

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("gatepack.kernels needs Triton: pip install triton") from error

from ._configs import GatedLinearConfig, Tile, choose_config
from .gated_linear import gated_linear_fn, gated_linear_ref
from .open_sets import open_set_fn, open_set_ref

__all__ = [
    "GatedLinearConfig",
    "Tile",
    "choose_config",
    "gated_linear_fn",
    "gated_linear_ref",
    "open_set_fn",
    "open_set_ref",
]
