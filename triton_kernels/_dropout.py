"""Stage 2, kernels: dropout that is drawn again wherever it is needed, instead of being stored.

Element (t, k) of an activation is kept if u(seed, t, k) >= p, u uniform in [0, 1). One call of
Philox gives four words, for rows 4q .. 4q + 3 of a column: word t % 4 of counter (k, t // 4). Rows
are never gathered, so this holds whatever columns a tile is made of. The factor 1 / (1 - p) of
inverted dropout is left to the caller, who has a factor to fold it into.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import philox, philox_uniform


class Dropout(NamedTuple):
    """p: probability of dropping an element, fp32. seed: int64 tensor of one element."""

    p: float
    seed: torch.Tensor


def kept_ref(drop: Dropout, rows: int, columns: int) -> torch.Tensor:
    """Which elements stay: bool [rows, columns]."""
    t = torch.arange(rows, device=drop.seed.device)[:, None]
    k = torch.arange(columns, device=drop.seed.device)
    words = torch.stack(philox(drop.seed, (t // 4 << 32) + k))
    word = words.gather(0, (t % 4).expand(1, rows, columns))[0]
    return philox_uniform(word) >= torch.tensor(drop.p, dtype=torch.float32)


@triton.jit
def kept_tile(seed_ptr, p, row, lane, ROWS: tl.constexpr):
    """Which elements of a tile stay: bool [ROWS, lanes]; row: its first row, a multiple of 4."""
    quad = (row // 4 + tl.arange(0, ROWS // 4)).to(tl.uint32)
    column = lane.to(tl.uint32)[None, :] + (quad * 0)[:, None]
    zero = column * 0
    a, b, c, d = tl.philox(tl.load(seed_ptr), column, quad[:, None] + zero, zero, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS / 4, lanes, 2, 2]
    words = tl.permute(words, (0, 2, 3, 1)).reshape(ROWS, lane.shape[0])
    return tl.uint_to_uniform_float(words) >= p
