"""Stage 2, kernels: the statistics by channel that calibration needs, in one pass.

Over the tokens t that a mask keeps, with v = x - shift,

    count = sum 1      sum = sum v      abs_sum = sum |v|      square_sum = sum v^2
    max_abs = max |v|                   deviation = sum (v - mean)^2

serve Mini-GPTs (mean |x|; of an output also without its bias: shift), Wanda (sum x^2) and FLAP
(variance). Each lane keeps the mean and deviation of what follows its first value, relative to that
value, by Welford's update. Partial results are merged by Chan's formula in a fixed order, with a
mean in two parts, so that a large mean does not cancel the variance:

    n = n_a + n_b      mean = (n_a mean_a + n_b mean_b) / n
    deviation = deviation_a + deviation_b + n_a (mean_a - mean)^2 + n_b (mean_b - mean)^2

Source: Mini-GPTs, arXiv 2312.12682; Wanda, arXiv 2306.11695; FLAP, arXiv 2312.11983; Chan et al.
1979, Updating formulae and a pairwise algorithm for computing sample variances.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import check_device, config_of, expect, expect_operand, offsets, rows_of
from ._configs import Panel
from .sample_gates import bytes_of


class ChannelStats(NamedTuple):
    """Sums over tokens. count: int64 []. The others: fp32 [C], of v = x - shift.

    deviation: sum of (v - mean)^2.
    """

    count: torch.Tensor
    sum: torch.Tensor
    abs_sum: torch.Tensor
    square_sum: torch.Tensor
    max_abs: torch.Tensor
    deviation: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """sum / count [C]; 0 without tokens."""
        return self.sum / self.count.clamp(min=1)

    @property
    def variance(self) -> torch.Tensor:
        """deviation / count [C], of the tokens as the whole population; 0 without tokens."""
        return self.deviation / self.count.clamp(min=1)

    def merge(self, other: "ChannelStats") -> "ChannelStats":
        """The statistics of both sets of tokens together."""
        count = self.count + other.count
        weight = self.count / count.clamp(min=1) * other.count
        return ChannelStats(
            count,
            self.sum + other.sum,
            self.abs_sum + other.abs_sum,
            self.square_sum + other.square_sum,
            torch.maximum(self.max_abs, other.max_abs),
            self.deviation + other.deviation + weight * (self.mean - other.mean).square(),
        )


def channel_stats_ref(x, token_mask=None, shift=None) -> ChannelStats:
    """ChannelStats in plain torch, at least in fp32."""
    v = rows_of(x.detach()).to(torch.promote_types(x.dtype, torch.float32))
    if token_mask is not None:
        v = v[token_mask.reshape(-1)]
    if shift is not None:
        v = v - shift
    count = torch.tensor(len(v), device=x.device)
    mean = v.sum(0) / count.clamp(min=1)
    largest = v.abs().amax(0) if len(v) else torch.zeros_like(mean)
    return ChannelStats(
        count, v.sum(0), v.abs().sum(0), v.square().sum(0), largest, (v - mean).square().sum(0)
    )


@triton.jit
def _merge(n, mean, rest, deviation):
    """Chan's formula over axis 0: (n, mean, rest, deviation) of all rows; n fp32 [rows, 1].

    mean + rest is the mean; rest holds what the rounding of mean left out.
    """
    count = tl.sum(n, axis=0)
    share = n / tl.maximum(count, 1.0)[None, :]
    center = tl.sum(share * (mean + rest), axis=0)
    gap = mean - center[None, :] + rest
    center_rest = tl.sum(share * gap, axis=0)
    gap -= center_rest[None, :]
    return count, center, center_rest, tl.sum(deviation + n * gap * gap, axis=0)


@triton.jit
def _channel_stats_fwd_kernel(
    x_ptr,  # [T, C]
    keep_ptr,  # uint8 [T] or None
    shift_ptr,  # fp32 [C] or None
    count_ptr,  # fp32 [splits]: tokens kept among SPAN rows
    partial_ptr,  # fp32 [5, splits, C]: mean, rest, deviation, abs_sum, max_abs of SPAN rows
    T,
    C,
    stride_xt,
    stride_xc,
    splits,
    tiles_c,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = (tl.program_id(0) // tiles_c).to(tl.int64)
    tile = tl.program_id(0) % tiles_c
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    shift = tl.zeros([BLOCK_C], tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + c, mask=in_c, other=0.0)
    n = tl.zeros([BLOCK_T], tl.float32)
    origin = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    deviation = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    abs_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    max_abs = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    end = tl.minimum(T, split * SPAN + SPAN)
    for start in tl.range(split * SPAN, end, BLOCK_T, num_stages=6):
        t = start + tl.arange(0, BLOCK_T)
        keep = t < T
        mask = keep[:, None] & in_c[None, :]
        x = tl.load(x_ptr + offsets(t, stride_xt, c, stride_xc), mask=mask, other=0.0)
        if keep_ptr is not None:
            keep = keep & (tl.load(keep_ptr + t, mask=keep, other=0) != 0)
        v = x.to(tl.float32) - shift[None, :]
        size = tl.where(keep[:, None], tl.abs(v), 0.0)
        abs_sum += size
        max_abs = tl.maximum(max_abs, size)
        origin = tl.where((keep & (n == 0))[:, None], v, origin)
        n += keep.to(tl.float32)
        v = tl.where(keep[:, None], v - origin, mean)
        step = v - mean
        mean += step * (1.0 / tl.maximum(n, 1.0))[:, None]
        deviation += step * (v - mean)
    count, center, rest, total = _merge(n[:, None], origin, mean, deviation)
    if tile == 0:
        tl.store(count_ptr + split + tl.arange(0, 1), count)
    plane = tl.cast(splits, tl.int64) * C
    out = partial_ptr + split * C + c
    tl.store(out, center, mask=in_c)
    tl.store(out + plane, rest, mask=in_c)
    tl.store(out + 2 * plane, total, mask=in_c)
    tl.store(out + 3 * plane, tl.sum(abs_sum, axis=0), mask=in_c)
    tl.store(out + 4 * plane, tl.max(max_abs, axis=0), mask=in_c)


@triton.jit
def _channel_stats_fwd_merge_kernel(
    count_ptr,  # fp32 [splits]
    partial_ptr,  # fp32 [5, splits, C]
    total_ptr,  # int64 []: tokens kept
    stats_ptr,  # fp32 [5, C]: sum, abs_sum, square_sum, max_abs, deviation
    splits,
    C,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    in_c = c < C
    plane = tl.cast(splits, tl.int64) * C
    total = tl.zeros([1], tl.int64)
    n = tl.zeros([1], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    rest = tl.zeros([BLOCK_C], tl.float32)
    deviation = tl.zeros([BLOCK_C], tl.float32)
    abs_sum = tl.zeros([BLOCK_C], tl.float32)
    max_abs = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        mask = (split < splits)[:, None] & in_c[None, :]
        rows = partial_ptr + offsets(split, C, c, 1)
        split_n = tl.load(count_ptr + split, mask=split < splits, other=0.0)
        total += tl.sum(split_n.to(tl.int64), axis=0)
        part_n, part_mean, part_rest, part_deviation = _merge(
            split_n[:, None],
            tl.load(rows, mask=mask, other=0.0),
            tl.load(rows + plane, mask=mask, other=0.0),
            tl.load(rows + 2 * plane, mask=mask, other=0.0),
        )
        abs_sum += tl.sum(tl.load(rows + 3 * plane, mask=mask, other=0.0), axis=0)
        part_max = tl.max(tl.load(rows + 4 * plane, mask=mask, other=0.0), axis=0)
        max_abs = tl.maximum(max_abs, part_max)
        mean = tl.where(n == 0, part_mean, mean)
        gap = part_mean - mean + (part_rest - rest)
        share = part_n / tl.maximum(n + part_n, 1.0)
        rest += gap * share
        deviation += part_deviation + gap * gap * n * share
        n += part_n
    if tl.program_id(0) == 0:
        tl.store(total_ptr + tl.arange(0, 1), total)
    # max drops a NaN; the sum keeps it.
    max_abs = tl.where(abs_sum == abs_sum, max_abs, abs_sum)
    mean += rest
    plane = tl.cast(C, tl.int64)
    tl.store(stats_ptr + c, mean * n, mask=in_c)
    tl.store(stats_ptr + plane + c, abs_sum, mask=in_c)
    tl.store(stats_ptr + 2 * plane + c, deviation + mean * mean * n, mask=in_c)
    tl.store(stats_ptr + 3 * plane + c, max_abs, mask=in_c)
    tl.store(stats_ptr + 4 * plane + c, deviation, mask=in_c)


def _check(x, token_mask, shift):
    expect_operand("x", x)
    expect("token_mask", token_mask, tuple(x.shape[:-1]), torch.bool, x)
    expect("shift", shift, tuple(x.shape[-1:]), torch.float32, x)


@torch.library.custom_op(
    "gatepack::channel_stats",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? token_mask, Tensor? shift, int[] config) "
        "-> (Tensor count, Tensor stats)"
    ),
)
def _channel_stats(x, token_mask, shift, config):
    """count, and sum, abs_sum, square_sum, max_abs and deviation as the rows of fp32 [5, C]."""
    _check(x, token_mask, shift)
    check_device("channel_stats", x)
    x = rows_of(x)
    t, c = x.shape
    if t == 0 or c == 0:
        kept = x.new_full((), t, dtype=torch.int64) if token_mask is None else token_mask.sum()
        return kept, x.new_zeros(5, c, dtype=torch.float32)
    panel = config_of(Panel, "channel_stats", config, (t, c), x.dtype, x.device)
    splits, tiles_c = triton.cdiv(t, panel.span), triton.cdiv(c, panel.columns)
    count = x.new_empty(splits, dtype=torch.float32)
    partial = x.new_empty(5, splits, c, dtype=torch.float32)
    total = x.new_empty((), dtype=torch.int64)
    stats = x.new_empty(5, c, dtype=torch.float32)
    keep = None if token_mask is None else bytes_of(token_mask.reshape(-1).contiguous())
    with torch.cuda.device_of(x):
        _channel_stats_fwd_kernel[(splits * tiles_c,)](
            x, keep, None if shift is None else shift.contiguous(), count, partial, t, c,
            *x.stride(), splits, tiles_c,
            SPAN=panel.span, BLOCK_T=panel.rows, BLOCK_C=panel.columns, num_warps=panel.num_warps,
        )  # fmt: skip
        _channel_stats_fwd_merge_kernel[(triton.cdiv(c, 32),)](
            count, partial, total, stats, splits, c, BLOCK_S=64, BLOCK_C=32, num_warps=4
        )
    return total, stats


@_channel_stats.register_fake
def _(x, token_mask, shift, config):
    _check(x, token_mask, shift)
    stats = x.new_empty(5, x.shape[-1], dtype=torch.float32)
    return x.new_empty((), dtype=torch.int64), stats


def channel_stats_fn(
    x: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    config: Panel | None = None,
) -> ChannelStats:
    """count, sum v, sum |v|, sum v^2, max |v| and sum (v - mean)^2 of v = x - shift, by channel.

    x [*, C]: fp32, bf16 or fp16, any strides (leading dimensions that do not collapse into one
    stride are copied). token_mask bool [*]: tokens to count; the others change nothing, be they
    NaN. shift fp32 [C]. Statistics are fp32, in a fixed order, and stay on the device; `merge`
    joins those of several batches, `mean` and `variance` follow from them. A NaN or an infinity
    stays in its channel. No gradient: x counts as a constant. config None takes the tile of
    choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, CPU tensors outside
    Triton's interpreter.
    """
    ints = [] if config is None else config.to_ints()
    count, stats = torch.ops.gatepack.channel_stats(
        x.detach(), token_mask, None if shift is None else shift.detach(), ints
    )
    return ChannelStats(count, *stats)
