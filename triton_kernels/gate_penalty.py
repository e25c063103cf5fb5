"""Stage 2, kernels: the expected cost of every gate of a model, with a gradient in closed form.

Segment s is one gate vector with open probabilities p. Its expected cost is

    cost_s = unit_cost_s * sum_i p_i + shared_cost_s * sum_B (1 - prod_{i in B} (1 - p_i))

over its blocks B of shared_size_s consecutive units, which share a cost until all of them are
closed: the query heads of one key/value head. With p = P(z > 0) by estimator

    stg            Phi(2 (tanh l + 0.5))        p' = 2 phi(2 (tanh l + 0.5)) (1 - tanh^2 l)
    hard_concrete  sigmoid(l + (2/3) log 11)    p' = p (1 - p)
    gumbel         1 - exp(-exp(l + 3))         p' = exp(l + 3 - exp(l + 3))

    dl_i = dcost_s * p'_i * (unit_cost_s + shared_cost_s * prod_{j in B, j != i} (1 - p_j))

stg is a smooth stand-in, wider than the noise, whose gradient never vanishes. gumbel is exact for
one Gumbel variable at any temperature; sigmoid(l / T) would be that of a difference of two.

Source: FineGates, arXiv 2412.12951 (stg); Louizos et al. 2018, arXiv 1712.01312 (hard_concrete);
ATP, arXiv 2412.14426 (gumbel).
"""

import math

import torch
import triton
import triton.language as tl

from ._common import check_device, config_of, expect, refuse_second_derivative
from ._configs import Panel
from .sample_gates import BETA, GAMMA, OFFSET, ZETA, bytes_of, check_estimator, check_segments, tanh

PENALTY_SIGMA = tl.constexpr(0.5)
SHIFT = tl.constexpr(-BETA.value * math.log(-GAMMA.value / ZETA.value))


def gate_penalty_ref(
    logits, offsets, unit_cost, shared_size=None, shared_cost=None, *, estimator="stg", closed=None
):
    """cost of gate_penalty_fn in plain torch, any floating dtype."""
    check_estimator(estimator)
    if estimator == "stg":
        p = torch.special.ndtr((torch.tanh(logits) + 0.5) / PENALTY_SIGMA.value)
    elif estimator == "hard_concrete":
        p = torch.sigmoid(logits + SHIFT.value)
    else:
        p = -torch.expm1(-torch.exp(logits + OFFSET.value))
    if closed is not None:
        p = p.masked_fill(closed, 0.0)
    costs = []
    for s, part in enumerate(torch.split(p, offsets.diff().tolist())):
        cost = unit_cost[s].to(p.dtype) * part.sum()
        if shared_size is not None:
            blocks = torch.split(1.0 - part, int(shared_size[s])) if part.numel() else ()
            for block in blocks:
                cost = cost + shared_cost[s].to(p.dtype) * (1.0 - block.prod())
        costs.append(cost)
    return torch.stack(costs) if costs else p


@triton.jit
def _probabilities(l, ESTIMATOR: tl.constexpr):
    """(P(z > 0), P(z = 0)) of a gate with logit l."""
    if ESTIMATOR == "stg":
        half = 0.5 * tl.erf((tanh(l) + 0.5) / PENALTY_SIGMA * 0.7071067811865476)
        is_open, is_closed = 0.5 + half, 0.5 - half
    elif ESTIMATOR == "hard_concrete":
        is_open, is_closed = tl.sigmoid(l + SHIFT), tl.sigmoid(-l - SHIFT)
    else:
        is_closed = tl.exp(-tl.exp(l + OFFSET))
        is_open = 1.0 - is_closed
    return is_open, is_closed


@triton.jit
def _slope(l, ESTIMATOR: tl.constexpr):
    """d P(z > 0) / dl."""
    if ESTIMATOR == "stg":
        x = (tanh(l) + 0.5) / PENALTY_SIGMA
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = density / PENALTY_SIGMA * 4.0 * tl.sigmoid(2.0 * l) * tl.sigmoid(-2.0 * l)
    elif ESTIMATOR == "hard_concrete":
        slope = tl.sigmoid(l + SHIFT) * tl.sigmoid(-l - SHIFT)
    else:
        slope = tl.exp(l + OFFSET - tl.exp(l + OFFSET))
    return slope


@triton.jit
def _may_open(position, inside, closed_ptr, stride_c):
    """Which of the gates at `position` are inside and not closed by hand."""
    if closed_ptr is not None:
        closed = tl.load(closed_ptr + position * stride_c, mask=inside, other=1)
        inside = inside & (closed == 0)
    return inside


@triton.jit
def _gate_penalty_fwd_kernel(
    logits_ptr,  # fp32 [N]
    offsets_ptr,  # int32 [S + 1]
    unit_cost_ptr,  # fp32 [S]
    shared_size_ptr,  # int32 [S] or None
    shared_cost_ptr,  # fp32 [S] or None
    closed_ptr,  # uint8 [N] or None
    cost_ptr,  # fp32 [S]
    stride_l,
    stride_c,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    size = 1
    if shared_size_ptr is not None:
        size = tl.load(shared_size_ptr + segment)
    units = tl.zeros([BLOCK], tl.float32)
    blocks = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tl.cdiv(end - start, size), BLOCK):
        block_start = start + (first + tl.arange(0, BLOCK)).to(tl.int64) * size
        all_closed = tl.full([BLOCK], 1.0, tl.float32)
        for member in range(0, size):
            position = block_start + member
            inside = _may_open(position, position < end, closed_ptr, stride_c)
            l = tl.load(logits_ptr + position * stride_l, mask=inside, other=0.0)
            is_open, is_closed = _probabilities(l, ESTIMATOR)
            units += tl.where(inside, is_open, 0.0)
            all_closed *= tl.where(inside, is_closed, 1.0)
        blocks += 1.0 - all_closed
    cost = tl.load(unit_cost_ptr + segment) * tl.sum(units, axis=0)
    if shared_size_ptr is not None:
        cost += tl.load(shared_cost_ptr + segment) * tl.sum(blocks, axis=0)
    tl.store(cost_ptr + segment, cost)


@triton.jit
def _gate_penalty_bwd_kernel(
    dcost_ptr,  # fp32 [S]
    logits_ptr,  # fp32 [N]
    offsets_ptr,  # int32 [S + 1]
    unit_cost_ptr,  # fp32 [S]
    shared_size_ptr,  # int32 [S] or None
    shared_cost_ptr,  # fp32 [S] or None
    closed_ptr,  # uint8 [N] or None
    dlogits_ptr,  # fp32 [N]
    stride_d,
    stride_l,
    stride_c,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1)
    dcost = tl.load(dcost_ptr + segment.to(tl.int64) * stride_d)
    unit_cost = tl.load(unit_cost_ptr + segment)
    first = start + tl.program_id(1) * BLOCK
    for tile in range(first, end, tl.num_programs(1) * BLOCK):
        position = tile + tl.arange(0, BLOCK)
        moves = _may_open(position, position < end, closed_ptr, stride_c)
        l = tl.load(logits_ptr + position * stride_l, mask=moves, other=0.0)
        price = tl.full([BLOCK], 1.0, tl.float32) * unit_cost
        if shared_size_ptr is not None:
            size = tl.load(shared_size_ptr + segment)
            block_start = start + (position - start) // size * size
            others_closed = tl.full([BLOCK], 1.0, tl.float32)
            for member in range(0, size):
                other = block_start + member
                counts = _may_open(other, (other < end) & moves, closed_ptr, stride_c)
                counts = counts & (other != position)
                other_l = tl.load(logits_ptr + other * stride_l, mask=counts, other=0.0)
                _, is_closed = _probabilities(other_l, ESTIMATOR)
                others_closed *= tl.where(counts, is_closed, 1.0)
            price += tl.load(shared_cost_ptr + segment) * others_closed
        dlogits = tl.where(moves, dcost * price * _slope(l, ESTIMATOR), 0.0)
        tl.store(dlogits_ptr + position, dlogits, mask=position < end)


def _check(logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator):
    check_segments(logits, offsets, estimator, closed)
    if (shared_size is None) != (shared_cost is None):
        missing = "shared_size" if shared_size is None else "shared_cost"
        raise ValueError(f"{missing}: expected a tensor beside the other shared one, got None")
    segments = (offsets.shape[0] - 1,)
    expect("unit_cost", unit_cost, segments, torch.float32, logits, "logits")
    expect("shared_size", shared_size, segments, torch.int32, logits, "logits")
    expect("shared_cost", shared_cost, segments, torch.float32, logits, "logits")
    if max_segment < 0:
        raise ValueError(f"max_segment: expected at least 0, got {max_segment}")


def _launch_arguments(logits, offsets, unit_cost, shared_size, shared_cost, closed):
    """The tensors that both kernels read, dense where they have no stride argument."""
    small = (
        None if t is None else t.contiguous()
        for t in (offsets, unit_cost, shared_size, shared_cost)
    )
    return logits, *small, bytes_of(closed)


def _panel(config, max_segment, device):
    return config_of(Panel, "gate_penalty", config, (max_segment,), torch.float32, device)


_GATES = (
    "Tensor logits, Tensor offsets, Tensor unit_cost, Tensor? shared_size, Tensor? shared_cost, "
    "Tensor? closed, int max_segment, str estimator, int[] config"
)


@torch.library.custom_op("gatepack::gate_penalty", mutates_args=(), schema=f"({_GATES}) -> Tensor")
def _gate_penalty(
    logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator, config
):
    _check(logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator)
    check_device("gate_penalty", logits)
    segments = offsets.numel() - 1
    cost = logits.new_empty(segments)
    if segments:
        panel = _panel(config, max_segment, logits.device)
        tensors = _launch_arguments(logits, offsets, unit_cost, shared_size, shared_cost, closed)
        with torch.cuda.device_of(logits):
            _gate_penalty_fwd_kernel[(segments,)](
                *tensors, cost, logits.stride(0), 0 if closed is None else closed.stride(0),
                ESTIMATOR=estimator, BLOCK=panel.columns, num_warps=panel.num_warps,
            )  # fmt: skip
    return cost


@_gate_penalty.register_fake
def _(logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator, config):
    _check(logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator)
    return logits.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op(
    "gatepack::gate_penalty_backward", mutates_args=(), schema=f"(Tensor dcost, {_GATES}) -> Tensor"
)
def _gate_penalty_backward(
    dcost, logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator,
    config,
):  # fmt: skip
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    segments = offsets.numel() - 1
    if segments:
        panel = _panel(config, max_segment, logits.device)
        tensors = _launch_arguments(logits, offsets, unit_cost, shared_size, shared_cost, closed)
        tiles = max(1, triton.cdiv(max_segment, panel.columns))
        with torch.cuda.device_of(logits):
            _gate_penalty_bwd_kernel[(segments, tiles)](
                dcost, *tensors, dlogits, dcost.stride(0), logits.stride(0),
                0 if closed is None else closed.stride(0),
                ESTIMATOR=estimator, BLOCK=panel.columns, num_warps=panel.num_warps,
            )  # fmt: skip
    return dlogits


@_gate_penalty_backward.register_fake
def _(
    dcost, logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator,
    config,
):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):
    *tensors, max_segment, estimator, config = inputs
    ctx.save_for_backward(*tensors)
    ctx.args = max_segment, estimator, config


def _backward(ctx, dcost):
    dlogits = torch.ops.gatepack.gate_penalty_backward(dcost, *ctx.saved_tensors, *ctx.args)
    return dlogits, *(None,) * 8


_gate_penalty.register_autograd(_backward, setup_context=_save_for_backward)
_gate_penalty_backward.register_autograd(refuse_second_derivative("gate_penalty"))


def gate_penalty_fn(
    logits: torch.Tensor,
    offsets: torch.Tensor,
    unit_cost: torch.Tensor,
    shared_size: torch.Tensor | None = None,
    shared_cost: torch.Tensor | None = None,
    *,
    max_segment: int,
    estimator: str = "stg",
    closed: torch.Tensor | None = None,
    config: Panel | None = None,
) -> torch.Tensor:
    """cost_s = unit_cost_s * sum p + shared_cost_s * sum over blocks (1 - prod (1 - p)), fp32 [S].

    logits, offsets, max_segment, estimator and closed are as in sample_gates_fn; closed gates have
    p = 0. unit_cost fp32 [S]: cost of one open unit. shared_size int32 [S], at least 1, and
    shared_cost fp32 [S]: a block of shared_size consecutive units carries shared_cost unless all
    of it is closed; the last block of a segment may be short. Everything stays on the device.

    A budget is a sum of costs, (fixed + cost.sum()) / total. FineGates' V-shaped penalty has
    unit_cost = 1 / size, so that cost holds the mean of p by gate vector:
    (cost - target).abs().mean(). Gradient: dlogits, in one launch; the costs get none. config None
    takes the tile of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, an unknown estimator, one
    of shared_size and shared_cost alone, CPU tensors outside Triton's interpreter. RuntimeError: a
    second derivative.
    """
    ints = [] if config is None else config.to_ints()
    return torch.ops.gatepack.gate_penalty(
        logits, offsets, unit_cost, shared_size, shared_cost, closed, max_segment, estimator, ints
    )
