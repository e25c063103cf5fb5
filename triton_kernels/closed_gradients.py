"""Stage 2, kernels: gate gradients of closed units, for straight-through estimators.

Skipping a closed unit is exact for everything but its own gate gradient, which is defined as 0 for
clamped gates and is not for straight-through ones. With d, h and x as in gated_linear.py,

    dz_out = colsum(dy * h)      dz_in = colsum(x * (W^T d + drop(A^T v)))

over closed units too. The outputs or input gradients of these units are computed for the sums alone
and never stored, by the same kernel over the complement of the open set: the cost of one matmul of
the forward over closed lanes only. "sampled" computes the sums over a random subset of m tokens,
drawn without replacement, times T / m: each token is in it with probability m / T, so that the mean
is the exact gradient. The low-rank part of dz_in is exact in either case: it is
sum_r A[r, k] (v^T drop(x))[r, k].

Source: straight-through estimation, arXiv 1308.3432, section 3.
"""

import torch
import triton
import triton.language as tl

from ._common import philox
from .gated_matmul import gated_matmul
from .open_sets import Axis


def sampled_count(tokens: int, fraction: float) -> int:
    """How many of T tokens are drawn: at least one."""
    return min(tokens, max(1, round(fraction * tokens)))


def sampled_tokens_ref(seed: torch.Tensor, tokens: int, count: int) -> torch.Tensor:
    """The `count` tokens with the smallest Philox words, ties by position: int64 [count]."""
    t = torch.arange(tokens, device=seed.device)
    return (philox(seed, t - 2**32)[0] >> 1).argsort(stable=True)[:count]


@triton.jit
def _token_words_kernel(seed_ptr, word_ptr, T, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Dropout counts (column, row / 4): this second word is none of its.
    low = t.to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), low, low * 0 + 0xFFFFFFFF, low * 0, low * 0)
    tl.store(word_ptr + t, (word >> 1).to(tl.int32), mask=t < T)


def sampled_tokens(seed: torch.Tensor, tokens: int, count: int) -> torch.Tensor:
    """sampled_tokens_ref with one kernel and one sort; no host sync."""
    words = torch.empty(tokens, dtype=torch.int32, device=seed.device)
    _token_words_kernel[(triton.cdiv(tokens, 1024),)](seed, words, tokens, BLOCK=1024, num_warps=4)
    return words.argsort(stable=True)[:count]


def complement(axis: Axis) -> Axis:
    """The same lanes with open and closed exchanged; no gate is applied."""
    units, count = axis.open_set[:-1], axis.open_set[-1:]
    return axis._replace(z=None, open_set=torch.cat([units.flip(0), len(units) - count]))


def closed_dz_out(x, w, ins, outs, tile, dy, *, bias=None, u=None, up=None) -> torch.Tensor:
    """colsum(dy * (W (z_in * x) + U u + b)) on closed lanes of outs, else 0: fp32 [N]."""
    return gated_matmul(
        x, w, ins, complement(outs), tile, bias=bias, u=u, up=up, aux=dy, keep=""
    )[2]  # fmt: skip


def closed_dz_in(dy, w, outs, ins, tile, x) -> torch.Tensor:
    """colsum(x * (W^T (z_out * dy))) on closed lanes of ins, else 0: fp32 [K]."""
    return gated_matmul(dy, w.t(), outs, complement(ins), tile, aux=x, keep="")[2]
