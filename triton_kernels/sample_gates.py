"""Stage 2, kernels: gate values and open sets of all gates of a model, in one launch.

With u ~ U(0, 1) from Philox and eps = +-sqrt(2) erfinv(u), standard normal, one gate is

    stg            z = clamp(raw, 0, 1),  raw = tanh(l) + 0.5 + sigma eps
    hard_concrete  z = clamp(raw, 0, 1),  raw = 1.2 s - 0.1,  s = sigmoid((l + logit(u)) / (2/3))
    gumbel         z = 1[score >= 0],     score = l + 3 - log(-log u)

    dl = dz * 1[0 < raw < 1] * (1 - tanh^2 l)                 stg
    dl = dz * 1[0 < raw < 1] * 1.2 s (1 - s) / (2/3)          hard_concrete
    dl = dz * soft (1 - soft) / 0.4, soft = sigmoid(score / 0.4)   gumbel, straight through

Without noise eps, logit(u) and -log(-log u) are 0, and s = sigmoid(l). The noise of gate number n
is a word of Philox under the key `seed` and the counter (draw, n // 4): it depends on neither the
device nor the launch, and the backward draws it again instead of reading it.

Source: Yamada et al. 2020, arXiv 1810.04247, shifted as in FineGates, arXiv 2412.12951 (stg);
Louizos et al. 2018, arXiv 1712.01312 (hard_concrete); ATP, arXiv 2412.14426 (gumbel).
"""

import math

import torch
import triton
import triton.language as tl

from ._common import check_device, config_of, philox, philox_uniform, refuse_second_derivative
from ._configs import Panel
from .open_sets import open_set_ref

ESTIMATORS = ("stg", "hard_concrete", "gumbel")

# Hard concrete: temperature and stretch. Gumbel: temperature and offset.
BETA, GAMMA, ZETA = tl.constexpr(2 / 3), tl.constexpr(-0.1), tl.constexpr(1.1)
TEMPERATURE, OFFSET = tl.constexpr(0.4), tl.constexpr(3.0)


def sample_gates_ref(
    logits, offsets, *, seed=0, draw=None, estimator="stg", sigma=0.1, noise=True, closed=None
):
    """(z, open) of sample_gates_fn in plain torch; the same uniform numbers, any floating dtype."""
    check_estimator(estimator)
    if noise:
        position = torch.arange(logits.numel(), device=logits.device)
        words = torch.stack(philox(seed, (draw.reshape(()) << 32) + position // 4))
        word = words.gather(0, (position % 4)[None]).squeeze(0)
        u = philox_uniform(word).to(logits.dtype)
    if estimator == "gumbel":
        gumbel = -torch.log(-torch.log(u + 1e-10) + 1e-10) if noise else 0.0
        soft = torch.sigmoid((logits + OFFSET.value + gumbel) / TEMPERATURE.value)
        z = (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())
    else:
        if estimator == "stg":
            sign = torch.where(word < 2**31, 1.0, -1.0) if noise else 0.0
            normal = sign * math.sqrt(2) * torch.erfinv(u) if noise else 0.0
            raw = torch.tanh(logits) + 0.5 + sigma * normal
        else:
            score = (logits + torch.logit(u, eps=1e-6)) / BETA.value if noise else logits
            raw = torch.sigmoid(score) * (ZETA.value - GAMMA.value) + GAMMA.value
        z = torch.where((raw > 0) & (raw < 1), raw, raw.detach().clamp(0, 1))
    if closed is not None:
        z = z.masked_fill(closed, 0.0)
    segments = torch.split(z.detach(), offsets.diff().tolist())
    open_sets = [open_set_ref(segment) for segment in segments]
    return z, torch.cat([offsets.new_empty(0), *open_sets])


@triton.jit
def tanh(x):
    """tanh x; the largest error, next to 0, is that of 1 + tanh x."""
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)


@triton.jit
def _erfinv(u):
    """erfinv u for u in [0, 1), relative error 4e-7. Source: Giles 2010, single precision."""
    w = -tl.log((1.0 - u) * (1.0 + u))
    c = w - 2.5
    center = 2.81022636e-08
    center = center * c + 3.43273939e-07
    center = center * c - 3.5233877e-06
    center = center * c - 4.39150654e-06
    center = center * c + 0.00021858087
    center = center * c - 0.00125372503
    center = center * c - 0.00417768164
    center = center * c + 0.246640727
    center = center * c + 1.50140941
    t = tl.sqrt(tl.maximum(w, 5.0)) - 3.0
    tail = -0.000200214257
    tail = tail * t + 0.000100950558
    tail = tail * t + 0.00134934322
    tail = tail * t - 0.00367342844
    tail = tail * t + 0.00573950773
    tail = tail * t - 0.0076224613
    tail = tail * t + 0.00943887047
    tail = tail * t + 1.00167406
    tail = tail * t + 2.83297682
    return tl.where(w < 5.0, center, tail) * u


@triton.jit
def _unrounded(
    l, first, seed, draw, sigma, ESTIMATOR: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr
):
    """raw, or gumbel's score, of the gates first .. first + BLOCK - 1; first % 4 = 0."""
    if NOISE:
        counter = (draw << 32) + (first // 4 + tl.arange(0, BLOCK // 4))
        word_0, word_1, word_2, word_3 = tl.randint4x(seed, counter)
        word = tl.interleave(tl.interleave(word_0, word_2), tl.interleave(word_1, word_3))
        u = tl.uint_to_uniform_float(word)
    if ESTIMATOR == "stg":
        unrounded = tanh(l) + 0.5
        if NOISE:
            normal = 1.4142135623730951 * _erfinv(u)
            unrounded += sigma * tl.where(word.to(tl.int32, bitcast=True) < 0, -normal, normal)
    elif ESTIMATOR == "hard_concrete":
        if NOISE:
            u = tl.minimum(tl.maximum(u, 1e-6), 1.0 - 1e-6)
            l = (l + tl.log(u / (1.0 - u))) / BETA
        unrounded = tl.sigmoid(l) * (ZETA - GAMMA) + GAMMA
    else:
        unrounded = l + OFFSET
        if NOISE:
            unrounded -= tl.log(1e-10 - tl.log(u + 1e-10))
    return unrounded


@triton.jit
def _gate(
    position, inside, logits_ptr, closed_ptr, stride_l, stride_c, first, seed, draw, sigma,
    ESTIMATOR: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z fp32 [BLOCK] at `position`, 0 where not `inside`; a NaN logit gives a NaN gate."""
    l = tl.load(logits_ptr + position.to(tl.int64) * stride_l, mask=inside, other=0.0)
    x = _unrounded(l, first, seed, draw, sigma, ESTIMATOR, NOISE, BLOCK)
    if ESTIMATOR == "gumbel":
        z = tl.where(x >= 0, 1.0, tl.where(x < 0, 0.0, x))
    else:
        z = tl.where(x <= 0, 0.0, tl.where(x >= 1, 1.0, x))
    if closed_ptr is not None:
        closed = tl.load(closed_ptr + position.to(tl.int64) * stride_c, mask=inside, other=1)
        inside = inside & (closed == 0)
    return tl.where(inside, z, 0.0)


@triton.jit(do_not_specialize=["seed"])
def _sample_gates_fwd_kernel(
    logits_ptr,  # fp32 [N]
    offsets_ptr,  # int32 [S + 1]
    closed_ptr,  # uint8 [N] or None
    draw_ptr,  # int64 [1] or None
    z_ptr,  # fp32 [N]
    open_ptr,  # int32 [N + S]
    drawn_ptr,  # int64 [1]: a copy of draw, or unused
    stride_l,
    stride_c,
    seed,
    sigma,
    ESTIMATOR: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    draw = tl.full([], 0, tl.int64)
    if NOISE:
        draw = tl.load(draw_ptr)
        if segment == 0:
            tl.store(drawn_ptr, draw)
    # All tiles are gone through twice, to count the open units and to place them. One loop does
    # both, so that the same instructions give the same z. Philox counters begin at multiples of 4.
    first_tile = start // 4 * 4
    tiles = tl.cdiv(end - first_tile, BLOCK)
    open_ptr += start + segment
    n_open = 0
    open_before = 0
    for step in range(0, 2 * tiles):
        if step == tiles:
            n_open = open_before
            open_before = 0
        first = first_tile + step % tiles * BLOCK
        position = first + tl.arange(0, BLOCK)
        inside = (position >= start) & (position < end)
        z = _gate(
            position, inside, logits_ptr, closed_ptr, stride_l, stride_c, first, seed, draw,
            sigma, ESTIMATOR, NOISE, BLOCK,
        )  # fmt: skip
        unit = position - start
        is_open = (z != 0).to(tl.int32)
        open_until = open_before + tl.cumsum(is_open, axis=0)
        slot = tl.where(is_open > 0, open_until - 1, n_open + unit - open_until)
        placing = inside & (step >= tiles)
        tl.store(z_ptr + position, z, mask=placing)
        tl.store(open_ptr + slot, unit, mask=placing)
        open_before += tl.sum(is_open, axis=0)
    tl.store(open_ptr + (end - start), n_open)


@triton.jit(do_not_specialize=["seed"])
def _sample_gates_bwd_kernel(
    dz_ptr,  # fp32 [N]
    logits_ptr,  # fp32 [N]
    closed_ptr,  # uint8 [N] or None
    drawn_ptr,  # int64 [1]
    dlogits_ptr,  # fp32 [N]
    N,
    stride_dz,
    stride_l,
    stride_c,
    seed,
    sigma,
    ESTIMATOR: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    position = (first + tl.arange(0, BLOCK)).to(tl.int64)
    moves = position < N
    draw = tl.full([], 0, tl.int64)
    if NOISE:
        draw = tl.load(drawn_ptr)
    l = tl.load(logits_ptr + position * stride_l, mask=moves, other=0.0)
    x = _unrounded(l, first, seed, draw, sigma, ESTIMATOR, NOISE, BLOCK)
    if ESTIMATOR == "gumbel":
        slope = tl.sigmoid(x / TEMPERATURE) * tl.sigmoid(-x / TEMPERATURE) / TEMPERATURE
    else:
        moves = moves & (x > 0) & (x < 1)
        if ESTIMATOR == "stg":
            slope = 4.0 * tl.sigmoid(2.0 * l) * tl.sigmoid(-2.0 * l)
        else:
            s = (x - GAMMA) / (ZETA - GAMMA)
            slope = (ZETA - GAMMA) * s * (1.0 - s) / (BETA if NOISE else 1.0)
    if closed_ptr is not None:
        moves = moves & (tl.load(closed_ptr + position * stride_c, mask=moves, other=1) == 0)
    dz = tl.load(dz_ptr + position * stride_dz, mask=moves, other=0.0)
    tl.store(dlogits_ptr + position, tl.where(moves, dz * slope, 0.0), mask=position < N)


def check_estimator(estimator):
    """Raise ValueError unless the estimator is known."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {ESTIMATORS}, got {estimator!r}")


def check_segments(logits, offsets, estimator, closed):
    """Raise ValueError unless the tensors describe gates in segments and the estimator is known."""
    if logits.dim() != 1:
        raise ValueError(f"logits: expected one dimension, got shape {tuple(logits.shape)}")
    if logits.dtype != torch.float32:
        raise ValueError(f"logits: expected dtype torch.float32, got {logits.dtype}")
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype != torch.int32:
        raise ValueError(
            "offsets: expected int32 [segments + 1], got "
            f"{offsets.dtype} of shape {tuple(offsets.shape)}"
        )
    check_estimator(estimator)
    if closed is not None and (closed.dtype != torch.bool or closed.shape != logits.shape):
        raise ValueError(
            f"closed: expected bool of shape {tuple(logits.shape)}, got "
            f"{closed.dtype} of shape {tuple(closed.shape)}"
        )
    for name, tensor in (("offsets", offsets), ("closed", closed)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"{name}: expected device {logits.device} (that of logits), got {tensor.device}"
            )


def _check(logits, offsets, draw, closed, max_segment, estimator, sigma, noise):
    check_segments(logits, offsets, estimator, closed)
    if max_segment < 0:
        raise ValueError(f"max_segment: expected at least 0, got {max_segment}")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma: expected a finite number >= 0, got {sigma}")
    if not noise:
        return
    if draw is None or draw.dtype != torch.int64 or draw.numel() != 1:
        got = None if draw is None else f"{draw.dtype} of shape {tuple(draw.shape)}"
        raise ValueError(f"draw: expected one int64 for the noise, got {got}")
    if draw.device != logits.device:
        raise ValueError(
            f"draw: expected device {logits.device} (that of logits), got {draw.device}"
        )


def bytes_of(flags):
    """A view of bools as uint8, the type that a kernel loads; None stays None."""
    return None if flags is None else flags.view(torch.uint8)


def _panel(config, size, device):
    return config_of(Panel, "sample_gates", config, (size,), torch.float32, device)


_FORWARD = (
    "(Tensor logits, Tensor offsets, Tensor? draw, Tensor? closed, int max_segment, int seed, "
    "str estimator, float sigma, bool noise, int[] config) -> (Tensor z, Tensor open, Tensor drawn)"
)
_BACKWARD = (
    "(Tensor dz, Tensor logits, Tensor drawn, Tensor? closed, int seed, str estimator, "
    "float sigma, bool noise, int[] config) -> Tensor"
)


@torch.library.custom_op("gatepack::sample_gates", mutates_args=(), schema=_FORWARD)
def _sample_gates(
    logits, offsets, draw, closed, max_segment, seed, estimator, sigma, noise, config
):
    """z, the open sets, and the draw that the backward repeats (empty without noise)."""
    _check(logits, offsets, draw, closed, max_segment, estimator, sigma, noise)
    check_device("sample_gates", logits)
    n, segments = logits.numel(), offsets.numel() - 1
    z = torch.empty_like(logits, memory_format=torch.contiguous_format)
    open_sets = logits.new_empty(n + segments, dtype=torch.int32)
    drawn = logits.new_empty(int(noise), dtype=torch.int64)
    if segments:
        panel = _panel(config, max_segment, logits.device)
        with torch.cuda.device_of(logits):
            _sample_gates_fwd_kernel[(segments,)](
                logits, offsets.contiguous(), bytes_of(closed), draw, z, open_sets, drawn,
                logits.stride(0), 0 if closed is None else closed.stride(0), seed, sigma,
                ESTIMATOR=estimator, NOISE=noise, BLOCK=panel.columns, num_warps=panel.num_warps,
            )  # fmt: skip
    return z, open_sets, drawn


@_sample_gates.register_fake
def _(logits, offsets, draw, closed, max_segment, seed, estimator, sigma, noise, config):
    _check(logits, offsets, draw, closed, max_segment, estimator, sigma, noise)
    n, segments = logits.shape[0], offsets.shape[0] - 1
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        logits.new_empty(n + segments, dtype=torch.int32),
        logits.new_empty(int(noise), dtype=torch.int64),
    )


@torch.library.custom_op("gatepack::sample_gates_backward", mutates_args=(), schema=_BACKWARD)
def _sample_gates_backward(dz, logits, drawn, closed, seed, estimator, sigma, noise, config):
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    n = logits.numel()
    if n:
        panel = _panel(config, 1024, logits.device)
        with torch.cuda.device_of(logits):
            _sample_gates_bwd_kernel[(triton.cdiv(n, panel.columns),)](
                dz, logits, bytes_of(closed), drawn, dlogits, n, dz.stride(0), logits.stride(0),
                0 if closed is None else closed.stride(0), seed, sigma,
                ESTIMATOR=estimator, NOISE=noise, BLOCK=panel.columns, num_warps=panel.num_warps,
            )  # fmt: skip
    return dlogits


@_sample_gates_backward.register_fake
def _(dz, logits, drawn, closed, seed, estimator, sigma, noise, config):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):
    logits, _, _, closed, _, seed, estimator, sigma, noise, config = inputs
    _, open_sets, drawn = output
    ctx.mark_non_differentiable(open_sets, drawn)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, drawn, closed)
    ctx.args = seed, estimator, sigma, noise, config


def _backward(ctx, dz, *_):
    if dz is None:
        return (None,) * 10
    dlogits = torch.ops.gatepack.sample_gates_backward(dz, *ctx.saved_tensors, *ctx.args)
    return dlogits, *(None,) * 9


_sample_gates.register_autograd(_backward, setup_context=_save_for_backward)
_sample_gates_backward.register_autograd(refuse_second_derivative("sample_gates"))


def sample_gates_fn(
    logits: torch.Tensor,
    offsets: torch.Tensor,
    *,
    max_segment: int,
    seed: int = 0,
    draw: torch.Tensor | None = None,
    estimator: str = "stg",
    sigma: float = 0.1,
    noise: bool = True,
    closed: torch.Tensor | None = None,
    config: Panel | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = estimator(logits + noise) and the open set of each segment, in one launch.

    logits fp32 [N], any stride. offsets int32 [S + 1], ascending from 0 to N: segment s, one gate
    vector, is logits[offsets[s] : offsets[s + 1]]. max_segment: about the longest segment, which
    picks the tile; any value gives right results. estimator: "stg" (noise of deviation sigma),
    "hard_concrete" or "gumbel" (hard gates, gradient of the soft ones). noise=False leaves the
    noise out. closed bool [N]: gates that are 0 whatever their logit, without gradient.

    seed, draw: the noise is a function of seed, draw and position alone, the same bits on every
    rank. draw, one int64 on the device of logits, is read when the kernel runs: a captured CUDA
    graph draws anew on each replay if draw is incremented in between, also within the graph.

    Gives z fp32 [N] and open int32 [N + S]; open[offsets[s] + s : offsets[s + 1] + s + 1] is the
    open set of segment s as other kernels take it: open units ascending, closed units ascending,
    count. A NaN logit gives a NaN gate, which counts as open. Gradient: dlogits from dz; the noise
    is drawn again. config None takes the tile of choose_config.

    Refuses, with ValueError: shapes, dtypes or devices that do not fit, an unknown estimator,
    noise without a draw, a negative sigma, CPU tensors outside Triton's interpreter.
    RuntimeError: a second derivative.
    """
    ints = [] if config is None else config.to_ints()
    return torch.ops.gatepack.sample_gates(
        logits, offsets, draw, closed, max_segment, seed, estimator, sigma, noise, ints
    )[:2]
