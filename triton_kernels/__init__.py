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

from ._configs import (
    AttentionTile,
    GatedAttentionConfig,
    GatedLinearConfig,
    GatedMLPConfig,
    PackedLinearConfig,
    Panel,
    Tile,
    choose_config,
)
from .channel_stats import ChannelStats, channel_stats_fn, channel_stats_ref
from .column_dot import column_dot_fn, column_dot_ref
from .gate_penalty import gate_penalty_fn, gate_penalty_ref
from .gated_attention import gated_attention_fn, gated_attention_ref
from .gated_linear import gated_linear_fn, gated_linear_ref
from .gated_mlp import gated_mlp_fn, gated_mlp_ref
from .gated_swiglu import gated_swiglu_fn, gated_swiglu_ref
from .gather_norm import gather_norm_fn, gather_norm_ref
from .linear_cross_entropy import (
    LinearCrossEntropy,
    linear_cross_entropy_fn,
    linear_cross_entropy_ref,
)
from .open_sets import open_set_fn, open_set_ref
from .packed_linear import packed_linear_fn, packed_linear_ref
from .sample_gates import sample_gates_fn, sample_gates_ref
from .scatter_add import scatter_add_fn, scatter_add_ref

__all__ = [
    "AttentionTile",
    "ChannelStats",
    "GatedAttentionConfig",
    "GatedLinearConfig",
    "GatedMLPConfig",
    "LinearCrossEntropy",
    "PackedLinearConfig",
    "Panel",
    "Tile",
    "choose_config",
    "channel_stats_fn",
    "channel_stats_ref",
    "column_dot_fn",
    "column_dot_ref",
    "gate_penalty_fn",
    "gate_penalty_ref",
    "gated_attention_fn",
    "gated_attention_ref",
    "gated_linear_fn",
    "gated_linear_ref",
    "gated_mlp_fn",
    "gated_mlp_ref",
    "gated_swiglu_fn",
    "gated_swiglu_ref",
    "gather_norm_fn",
    "gather_norm_ref",
    "linear_cross_entropy_fn",
    "linear_cross_entropy_ref",
    "open_set_fn",
    "open_set_ref",
    "packed_linear_fn",
    "packed_linear_ref",
    "sample_gates_fn",
    "sample_gates_ref",
    "scatter_add_fn",
    "scatter_add_ref",
]
