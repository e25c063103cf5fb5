"""Stage 3, modules: which path computes gated layers, by shape and device, from one table.

"folded"  pack the open part of the weights once per forward, then vendor matmuls on the small
          shapes. The counts of open units cross to the host once per forward. With few tokens on a
          CPU gatepack._C multiplies with the open part where it lies, and nothing is packed.
"triton"  gates inside the kernels, at full width between layers: only open lanes are read, nothing
          is packed, and nothing waits for the host, so that a step captures into a CUDA graph.
"dense"   the ungated forward at its full price, between multiplications by the gates: on a CPU
          where packing costs more than it saves, for few tokens or where little is closed, of
          weights that gatepack._C does not multiply with where they lie.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gatepack import _env


class Choice(NamedTuple):
    """A path, and why it runs."""

    path: str
    why: str


@dataclass(frozen=True)
class Rule:
    """On chips named `arch`..., layers up to `width` wide take "triton" up to `tokens` tokens."""

    arch: str
    width: float
    tokens: int


# The first rule that fits decides. Packing W costs as many bytes as it saves at about these token
# counts, by counted bytes; not measured.
RULES = (
    Rule("", 1024, 64),
    Rule("", 2048, 256),
    Rule("", math.inf, 512),
)


# Writing a weight once more and reading it again takes a CPU as long as multiplying it with
# packing_of(width) tokens; to pack one at all, as long as CALL products of a weight with a token.
# fp32, 2 threads of an AMD EPYC: in training, MLPs of 576 x 1536 pack faster than they multiply in
# full from about 25 tokens on with 60 % open, from 50 to 90 on with 80 %, and attention of width
# 576 with 67 % open from 64 to 256 on. Wide layers need memory from the system, page by page, in
# each step: 4096 x 14336 with 60 % open took 658 ms packed and 443 ms in full with 64 tokens, which
# meet at 140 (benchmarks/run.py --parts curves).
PACKING = ((2048, 12), (math.inf, 70))
CALL = 5e6

# By what part products of packed widths, which need not be multiples of 16, are slower than those
# of whole ones: by this rule the same MLPs with 95 % open run at 0.97x the dense one's speed with
# 512 tokens and 0.99x with 1024, where they packed at 0.92x and 0.97x.
SLOWER = 0.05


def packing_of(width: float) -> float:
    """What packing a weight costs in layers of this width, in tokens that multiply with it."""
    return next(tokens for most, tokens in PACKING if width <= most)


def few_tokens(width: int, device: torch.device, kept: float = 1.0) -> float:
    """Up to how many tokens nothing is packed on a device, in layers of this residual width.

    On a CPU, where a fraction `kept` of a weight is open, packing costs as much as products with (1
    + kept) * packing_of(width) + CALL / width^2 tokens, and saves 1 - (1 + SLOWER) * kept of one
    product, with gradients of two. On a GPU, how many tokens take "triton".
    """
    if device.type == "cpu":
        products = 2 if torch.is_grad_enabled() else 1
        cost = (1 + kept) * packing_of(width) + CALL / width**2
        saved = 1 - (1 + SLOWER) * kept
        return math.inf if saved <= 0 else cost / saved // products
    if device.type != "cuda" or not _has_triton():
        return 0
    from gatepack.kernels._common import arch_of

    arch = arch_of(device)
    return next(r.tokens for r in RULES if arch.startswith(r.arch) and width <= r.width)


def choose_path(
    tokens: int, width: int, device: torch.device, kept: float = 1.0, in_place: int = 0
) -> Choice:
    """The path of a forward of `tokens` tokens through layers of a residual width.

    On a CPU only, kept: open fraction of the weights; in_place: up to how many tokens their open
    part is multiplied where it lies. GATEPACK_BACKEND forces a path; a CUDA graph under capture
    forces "triton".
    """
    forced = _env.backend()
    if forced:
        return Choice(forced, "GATEPACK_BACKEND")
    if device.type == "cpu":
        if tokens <= in_place:
            return Choice("folded", f"at most {in_place} tokens, with nothing packed")
        limit = few_tokens(width, device, kept)
        if limit == math.inf:
            little = "nothing" if kept >= 1 else "too little to pack for"
            return Choice("dense", f"{little} is closed")
        path, side = ("dense", "at most") if tokens <= limit else ("folded", "more than")
        return Choice(path, f"{side} {limit:.0f} tokens with {kept:.0%} open")
    if device.type != "cuda":
        return Choice("folded", f"on {device.type}")
    if not _has_triton():
        return Choice("folded", "triton is not installed")
    if torch.cuda.is_current_stream_capturing():
        return Choice("triton", "a CUDA graph is being captured")
    limit = few_tokens(width, device)
    if tokens <= limit:
        return Choice("triton", f"at most {limit} tokens")
    return Choice("folded", f"more than {limit} tokens")


# What packing a weight a second time may add to the time of its products.
AGAIN = 0.09


def packs_again(tokens: int, shape: tuple[int, int], device: torch.device, kept: float) -> bool:
    """Whether backward packs a weight anew, so that nothing is kept of it since forward.

    On a CPU from as many tokens on as make it cheap: (1 + kept) * packing_of(width) + CALL / size
    against 2 * kept for each token, so that small weights, which hold little, stay for longer. A
    training step of SmolLM2-135M with 256 tokens and 60 % open packs its MLPs anew and holds 371
    MB, 376 MB without gates; with attention packed anew, too, it would hold 301 MB and take 1 %
    longer, with all weights kept 554 MB and 3 % less. GPUs keep them.
    """
    cost = (1 + kept) * packing_of(min(shape)) + CALL / max(math.prod(shape), 1)
    return device.type == "cpu" and cost <= AGAIN * 2 * kept * tokens


def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on this device: GPUs, or the interpreter where it is forced."""
    return _has_triton() and (device.type == "cuda" or _env.backend() == "triton")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
