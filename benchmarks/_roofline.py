"""What counted FLOPs and bytes say a step should take on chips that are not at hand.

Each contender of a goal is a list of phases, kernel by kernel as its code launches them; a phase
takes the longer of its FLOPs and its bytes at the chip's sustained rates, and no launch is faster
than the host issues it. The first measured run tests these numbers; nothing is fitted to one.
"""

import dataclasses
import json
import math
from pathlib import Path

from gatepack.testing import MODEL_SHAPES


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak bf16 FLOP/s without sparsity and HBM bytes/s of the data sheet; multiprocessors."""

    arch: str
    flops: float
    bytes: float
    multiprocessors: int


CHIPS = {
    "A100": Chip("sm_80", 312e12, 2.04e12, 108),  # SXM, 80 GB
    "H100": Chip("sm_90", 989e12, 3.35e12, 132),  # SXM
    "H200": Chip("sm_90", 989e12, 4.8e12, 132),
    "B200": Chip("sm_100", 2250e12, 8.0e12, 148),
}
# Assumptions, the same for every contender: what a vendor's large matmul and a large copy sustain
# of the data sheet, and what the host needs to issue one eager launch or one node of a graph.
MATMUL, STREAM = 0.75, 0.9
EAGER_LAUNCH, GRAPH_NODE = 5e-6, 1.2e-6
# Triton's matmuls in the place of the vendor's, where the whole grid fits its waves.
TRITON = 0.85
BF16 = 2  # bytes


@dataclasses.dataclass(frozen=True)
class Phase:
    """One kernel. triton: one of this package's matmuls."""

    flops: float = 0.0
    bytes: float = 0.0
    triton: bool = False


def matmul(m: float, n: float, k: float, passes: float = 0.0, triton: bool = False) -> Phase:
    """[m, k] times [k, n], and `passes` more tensors [m, n] read or written in the epilogue."""
    return Phase(2 * m * n * k, BF16 * (m * k + k * n + m * n * (1 + passes)), triton)


def stream(elements: float) -> Phase:
    return Phase(0.0, BF16 * elements)


def mlp(contender: str, shape, tokens: int, kept: float, lora: int = 0) -> list[Phase]:
    """Forward and backward of a SwiGLU MLP: base frozen, gradients of x, gates and LoRA."""
    t, k = tokens, shape.hidden
    ours, small = contender == "ours", contender in ("ours", "oracle", "oracle, compiled")
    f = round(kept * shape.mlp) if small else shape.mlp
    gated, fused = (
        contender in ("masked", "compiled"),
        contender in ("compiled", "oracle, compiled"),
    )
    if ours:
        # Packing three matrices; gate and up with SwiGLU; down; dh with the backward of SwiGLU; dx.
        phases = [stream(2 * f * k)] * 3 + [
            Phase(2 * 2 * t * f * k, BF16 * (t * k + 2 * f * k + 3 * t * f), True),
            matmul(t, k, f, triton=True),
            matmul(t, f, k, passes=3, triton=True),
            Phase(2 * 2 * t * f * k, BF16 * (2 * t * f + 2 * f * k + t * k), True),
        ]
        return phases + _lora_fused(t, k, f, lora)
    phases = [matmul(t, f, k)] * 2 + [matmul(t, k, f)]  # forward
    phases += [matmul(t, f, k)] + [matmul(t, k, f)] * 2 + [stream(3 * t * k)]  # backward
    if fused:
        phases += [stream(3 * t * f), stream(6 * t * f)]
    else:
        phases += [stream(2 * t * f), stream(3 * t * f)]  # silu, product
        phases += [stream(3 * t * f)] * 3  # two products and silu's gradient
        if gated:  # product with z, its gradient, and z's
            phases += [stream(2 * t * f)] * 2 + [stream(3 * t * f), stream(t * f)]
    return phases + _lora_eager(t, k, f, lora)


def _lora_fused(t, k, f, r) -> list[Phase]:
    """A x, and the gradients of A, B and A x; B rides in the matmuls."""
    if not r:
        return []
    down = [matmul(t, r, k, triton=True)] * 2 + [matmul(t, r, f, triton=True)]
    return down + [Phase(4 * t * r * (k + f), BF16 * t * (k + f))] * 3


def _lora_eager(t, k, f, r) -> list[Phase]:
    """PEFT: A, B, scaling and a sum per linear, and what autograd does with them."""
    if not r:
        return []
    phases = []
    for n_in, n_out in ((k, f), (k, f), (f, k)):
        phases += [matmul(t, r, n_in), matmul(t, n_out, r), stream(2 * t * n_out)]
        phases += [stream(3 * t * n_out), stream(2 * t * n_out)]  # sum; gradient of the scaling
        phases += [matmul(t, r, n_out), matmul(t, n_in, r), stream(3 * t * n_in)]
        phases += [matmul(r, n_in, t), matmul(n_out, r, t)]
    return phases


def decoder_layer(contender: str, shape, batch: int, tokens: int, kept: float) -> list[Phase]:
    """mlp, and attention of the open groups of heads, norms and residuals at full width."""
    t, k = batch * tokens, shape.hidden
    groups = round(kept * shape.kv_heads) if contender in ("ours", "oracle") else shape.kv_heads
    kv = groups * shape.head_dim
    q = kv * shape.heads // shape.kv_heads
    phases = mlp(contender, shape, t, kept)
    for n in (q, kv, kv):
        phases += [matmul(t, n, k), matmul(t, k, n)]
    phases += [matmul(t, k, q), matmul(t, q, k)]
    flash = 2 * batch * tokens * (tokens + 1) / 2 * q
    phases += [Phase(2 * flash, BF16 * t * (2 * q + 2 * kv))]
    phases += [Phase(5 * flash, BF16 * t * (4 * q + 4 * kv))]
    phases += [stream(6 * t * (q + kv))] * 2  # RoPE
    phases += [stream(2 * t * k)] * 2 + [stream(4 * t * k)] * 2  # norms
    phases += [stream(3 * t * k)] * 4  # residuals
    if contender == "ours":
        phases += [stream(2 * k * (q + kv))] * 2
    return phases


def decode(contender: str, shape, layers: int, vocabulary: int, kept: float) -> list[Phase]:
    """One token: every weight once."""
    small = contender in ("ours", "oracle")
    per_layer = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    per_layer += 3 * shape.hidden * shape.mlp
    per_layer *= kept if small else 1.0
    kernels = 18  # matmuls, norms, RoPE, attention, cache and products of a layer
    one = Phase(2 * per_layer / kernels, BF16 * per_layer / kernels)
    return [one] * kernels * layers + [matmul(1, vocabulary, shape.hidden)]


def finegates_step(contender: str, shape, layers: int, rows: int) -> list[Phase]:
    """A RoBERTa layer's six linears with row and column gates, all open; attention is left out."""
    k, f = shape.hidden, shape.mlp
    phases = []
    for n, m in ((k, k),) * 4 + ((f, k), (k, f)):
        if contender == "ours":
            phases += [stream(2 * n * m), matmul(rows, n, m), matmul(rows, m, n)]
            phases += [stream(2 * rows * m), stream(2 * rows * n)]  # gradients of the gates
        else:
            phases += [matmul(rows, n, m), matmul(rows, m, n)]
            phases += [stream(rows * (2 * m + 4 * n))] + [stream(rows * (6 * m + 7 * n))]
            phases += [Phase()] * 24  # two gate vectors: sampled, penalised, differentiated
    return phases * layers


def saved(contender: str, shape, rows: int, kept: float) -> float:
    """Elements that a decoder layer's forward keeps for its backward, and the packed weights."""
    k, small = shape.hidden, contender in ("ours", "oracle")
    f = shape.mlp * (kept if small else 1.0)
    groups = round(kept * shape.kv_heads) if small else shape.kv_heads
    kv = groups * shape.head_dim
    q = kv * shape.heads // shape.kv_heads
    # Two residuals and two normed inputs; q, k, v before and after RoPE, o; a, u, h (silu(a) too).
    tokens = rows * (4 * k + 3 * q + 4 * kv + (3 if contender == "ours" else 4) * f)
    return tokens + (k * (3 * f + 2 * (q + kv)) if contender == "ours" else 0.0)


def seconds(phases: list[Phase], chip: Chip, tail: float = 1.0, graph: bool = False) -> float:
    """The sum of the phases; tail: the part of their waves that the grids of our kernels fill."""
    launch = GRAPH_NODE if graph else EAGER_LAUNCH
    total = 0.0
    for phase in phases:
        sustained = MATMUL * (TRITON * tail if phase.triton else 1.0)
        work = max(phase.flops / chip.flops / sustained, phase.bytes / chip.bytes / STREAM)
        total += max(work, launch)
    return total


def predicted(goal, chip: Chip, facts: list[dict]) -> float | None:
    """What goal.measure should come out as on a chip; None where nothing is counted."""
    case = goal.case
    shape = MODEL_SHAPES.get(case.get("model"))
    if goal.bench == "fold_pack":
        return 1.0  # as many bytes as the copy
    if goal.bench != "level":
        return None
    batch, tokens, kept = case.get("batch", 1), case["tokens"], case["kept"]
    if goal.name == "mlp":
        make = lambda who: mlp(who, shape, tokens, kept, case.get("lora", 0))  # noqa: E731
    elif goal.name == "decoder_layer":
        make = lambda who: decoder_layer(who, shape, batch, tokens, kept)  # noqa: E731
    elif goal.name == "decode":
        make = lambda who: decode(who, shape, 32, 128256, kept)  # noqa: E731
    else:
        make = lambda who: finegates_step(who, shape, 12, batch * tokens)  # noqa: E731
    if goal.measure == "peak":
        rows = batch * tokens
        return saved("ours", shape, rows, kept) / saved(goal.against, shape, rows, kept)
    graph = goal.name == "decode"
    tail = wave_share(facts, chip, "gated_mlp") if goal.name != "decode" else 1.0
    ours = seconds(make("ours"), chip, tail, graph)
    if goal.measure == "read":
        return sum(phase.bytes for phase in make("ours")) / ours / (chip.bytes * STREAM)
    return seconds(make(goal.against), chip, graph=graph) / ours


def wave_share(facts: list[dict], chip: Chip, op: str) -> float:
    """The least filled last wave among an op's matmuls: blocks / (waves * resident blocks).

    facts: rows of aot.py, grids at model shapes. A persistent kernel has one wave and fills it.
    """
    shares = [1.0]
    for row in facts:
        if row["op"] != op or row["arch"] != chip.arch or not row["has_dot"]:
            continue
        slots = chip.multiprocessors * (row["resident"] or 1)
        waves = math.ceil(row["grid"] / slots)
        if waves > 1:
            shares.append(row["grid"] / (waves * slots))
    return min(shares)


def read_facts(path: Path) -> list[dict]:
    """Rows that aot.py wrote; none without the file."""
    return json.loads(path.read_text()) if path.is_file() else []
