"""A training step (forward + backward) of one part of a decoder layer, by every contender.

Base weights are frozen; gradients go to x, to the gates' logits and to LoRA where there is any.
ours and masked give the same results. finegates gates the rows and columns of the same linears, so
its results are others; dense and oracle have no gates.
"""

import contextlib
import copy
import dataclasses
import os

import torch
from _contenders import prune_mlp, why_missing, with_fine_gates, with_liger
from _models import MaskedModel, adapters_of, build, gate, packed_copy, plain, shared_copy, widths
from _suite import Case, Contender, Work
from torch import nn

from gatepack.layers import hf_model

_LINEARS = {
    "mlp": {"gate_proj", "up_proj", "down_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
}
_LINEARS["layer"] = _LINEARS["mlp"] | _LINEARS["attention"]


def part_of(model: nn.Module, part: str, x: torch.Tensor):
    """x -> y of one part of the first layer."""
    root = hf_model(model)
    layer = root.model.layers[0]
    if part == "mlp":
        return layer.mlp
    positions = torch.arange(x.shape[1], device=x.device)[None]
    cos_sin = tuple(t.detach() for t in root.model.rotary_emb(x, positions))
    module = layer.self_attn if part == "attention" else layer

    def run(x):
        out = module(x, position_embeddings=tuple(t.to(x.dtype) for t in cos_sin),
                     attention_mask=None)  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return run


@contextlib.contextmanager
def forced(backend: str):
    """GATEPACK_BACKEND inside."""
    before = os.environ.get("GATEPACK_BACKEND")
    os.environ["GATEPACK_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["GATEPACK_BACKEND"]
        else:
            os.environ["GATEPACK_BACKEND"] = before


def gated_contender(model: nn.Module, part: str, x: torch.Tensor, backend: str | None):
    """Draws a sample, chooses a path, and runs the part: what a forward of the model does."""
    root = hf_model(model)
    attachment, run = root.gatepack_gates.attachment, part_of(model, part, x)

    def forward(x, logits, *adapters):
        with forced(backend) if backend else contextlib.nullcontext():
            attachment.before_forward(root.model, (x,), {})
            return run(x)

    return Contender(forward, (x, root.gatepack_gates.logits, *adapters_of(model, _LINEARS[part])))


def masked_contender(masked: MaskedModel, part: str, x: torch.Tensor) -> Contender:
    run = part_of(masked.model, part, x)

    def forward(x, logits, *adapters):
        masked.put(logits)
        return run(x)

    return Contender(forward, (x, masked.logits, *adapters_of(masked.model, _LINEARS[part])))


def plain_contender(model: nn.Module, part: str, x: torch.Tensor, more=()) -> Contender:
    run = part_of(model, part, x)
    return Contender(lambda x, *_: run(x), (x, *adapters_of(model, _LINEARS[part]), *more))


def block_work(case: Case, part: str, units: tuple[str, ...]) -> Work | None:
    """The part of one layer; models that are no Llama lend it their widths."""
    base = build(case, layers=1, vocabulary=16, family="llama")
    x = case.normal(case.batch, case.tokens, case.shape.hidden, grad=True)
    gated = shared_copy(base)
    gates = gate(gated, case, units)
    masked = MaskedModel.of(shared_copy(base), gates)
    small = plain(packed_copy(gated))
    contenders = {
        "ours": gated_contender(gated, part, x, None),
        "masked": masked_contender(masked, part, x),
        "dense": plain_contender(base, part, x),
        "oracle": plain_contender(small, part, x),
    }
    skipped, differ = {}, ["dense", "oracle"]
    if case.device.startswith("cuda"):
        contenders["ours_triton"] = gated_contender(gated, part, x, "triton")
    reason = why_missing("liger_kernel", "liger-kernel")
    if reason or not case.device.startswith("cuda"):
        skipped["liger"] = reason or "needs a GPU"
    else:
        twin = MaskedModel.of(with_liger(shared_copy(base)), gates)
        contenders["liger"] = masked_contender(twin, part, x)
    if not case.lora:
        fine = shared_copy(base)
        linears = with_fine_gates(fine, _LINEARS[part], case.kept)
        logits = [p for linear in linears for p in (linear.rows, linear.columns)]
        contenders["finegates"] = plain_contender(fine, part, x, logits)
        differ.append("finegates")
        _add_torch_pruning(contenders, skipped, base, gates, part, x)
        differ.append("torch_pruning")
    # A compile of a layer takes a CPU half a minute, and no goal of a CPU is about the oracle's.
    one_compile = part == "layer" and not case.device.startswith("cuda")
    wide = masked.double()
    wide_x = x.detach().double().requires_grad_()
    return Work(
        contenders=contenders,
        truth=Contender(
            masked_contender(wide, part, wide_x).forward,
            (wide_x, wide.logits, *adapters_of(wide.model, _LINEARS[part])),
        ),
        **least(case, part, units, x.element_size()),
        differ=tuple(differ),
        needs_gpu=("liger",),
        graphs=("ours_triton",),
        compiles=("masked",) if one_compile else ("masked", "oracle"),
        skipped=skipped,
    )


def check_case(case: Case) -> Case:
    """At most 512 tokens of one sequence: torch keeps whole fp64 attention matrices."""
    return dataclasses.replace(case, tokens=min(case.tokens, 512), batch=1)


def _add_torch_pruning(contenders, skipped, base, gates, part, x) -> None:
    reason = why_missing("torch_pruning", "torch-pruning")
    if part != "mlp":
        reason = reason or (
            "its dependency graph does not carry grouped key/value heads through RoPE and reshape"
        )
    if reason:
        skipped["torch_pruning"] = reason
        return
    pruned = copy.deepcopy(base)
    (closed,) = (gates.closed[one.start : one.start + one.size] for _, one in gates.items())
    if closed.any():
        prune_mlp(hf_model(pruned).model.layers[0].mlp, closed.nonzero().squeeze(1), x)
    contenders["torch_pruning"] = plain_contender(pruned, part, x)


def least(case: Case, part: str, units: tuple[str, ...], size: int) -> dict[str, float]:
    """{"flops", "bytes"} of forward and backward to x over open units, each tensor moved once."""
    shape, rows = case.shape, case.batch * case.tokens
    open_units = widths(case, units)
    weights = flops = 0
    if part != "attention":
        weights += 3 * shape.hidden * open_units["channels"]
    if part != "mlp":
        lanes = open_units["heads"] * shape.head_dim
        kv_lanes = lanes * shape.kv_heads // shape.heads
        weights += 2 * shape.hidden * (lanes + kv_lanes)
        flops += 7 * 2 * lanes * case.batch * case.tokens * (case.tokens + 1) // 2
    flops += 2 * 2 * rows * weights
    adapters = 0
    if case.lora:
        # A x and B (A x), their gradients to x, A and B.
        adapters = case.lora * (weights // shape.hidden + 3 * shape.hidden)
        flops += 3 * 2 * rows * adapters
    return {"flops": flops, "bytes": size * (4 * rows * shape.hidden + 2 * weights + 3 * adapters)}
