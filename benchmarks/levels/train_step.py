"""train_step: loss, gradients and optimizer of a whole language model, base frozen.

Gates of all heads and channels train, and LoRA where case.lora says so. The optimizer (AdamW) has a
learning rate of 0: the work of a step, and the same weights in each. dense is PEFT's LoRA without
gates; without LoRA, where nothing of it would train, it takes the gradient of the embeddings.
Checked on 2 layers, timed on all. Compiled masks are timed at the layer: see decoder_layer.
"""

import dataclasses

import torch
from _contenders import why_missing, with_liger
from _models import (
    MaskedModel,
    adapters_of,
    build,
    gate,
    optimizer_step,
    packed_copy,
    plain,
    shared_copy,
)
from _suite import Case, Contender, Work

from gatepack.layers import hf_model

CHECK = {"layers": 2, "batch": 1, "tokens": 64}


def work(case: Case) -> Work:
    base = build(case)
    root = hf_model(base)
    ids = torch.randint(root.config.vocab_size, (case.batch, case.tokens), device=case.device)
    gated = shared_copy(base)
    gates = gate(gated, case, ("heads", "channels"))
    masked = MaskedModel.of(shared_copy(base), gates)
    small = plain(packed_copy(gated))
    contenders = {
        "ours": _gated(gated, gates, ids),
        "masked": _masked(masked, ids),
        "dense": _plain(base, ids),
        "oracle": _plain(small, ids),
    }
    skipped = {}
    reason = why_missing("liger_kernel", "liger-kernel")
    if reason or not case.device.startswith("cuda"):
        skipped["liger"] = reason or "needs a GPU"
    else:
        twin = MaskedModel.of(with_liger(shared_copy(base)), gates)
        contenders["liger"] = _masked(twin, ids)
    checkable = case.layers is not None
    wide = masked.double() if checkable else masked
    return Work(
        contenders=contenders,
        truth=_masked(wide, ids),
        **least(case, root, small, ids),
        differ=("dense", "oracle"),
        needs_gpu=("liger",),
        graphs=(),
        compiles=(),
        skipped=skipped,
    )


def _embedded(model, ids) -> tuple[torch.Tensor, ...]:
    """What a step takes a gradient of beside gates: LoRA, or else the embedded tokens."""
    adapters = adapters_of(model)
    if adapters:
        return tuple(adapters)
    embed = hf_model(model).get_input_embeddings()
    return (embed(ids).detach().requires_grad_(),)


def _loss(model, ids, leaves) -> torch.Tensor:
    if adapters_of(model):
        return model(input_ids=ids, labels=ids).loss
    return model(inputs_embeds=leaves[0], labels=ids).loss


def _gated(model, gates, ids) -> Contender:
    leaves = _embedded(model, ids)

    def forward(logits, *leaves):
        return _loss(model, ids, leaves) + 0.0 * gates.penalty()

    inputs = (gates.logits, *leaves)
    return Contender(forward, inputs, optimizer_step(inputs))


def _masked(masked: MaskedModel, ids) -> Contender:
    leaves = _embedded(masked.model, ids)

    def forward(logits, *leaves):
        masked.put(logits)
        return _loss(masked.model, ids, leaves)

    inputs = (masked.logits, *leaves)
    return Contender(forward, inputs, optimizer_step(inputs))


def _plain(model, ids) -> Contender:
    leaves = _embedded(model, ids)
    return Contender(lambda *leaves: _loss(model, ids, leaves), leaves, optimizer_step(leaves))


def least(case: Case, root, small, ids) -> dict[str, float]:
    """{"flops", "bytes"}: forward and backward through what is open, and the output layer."""
    rows = ids.numel()
    blocks = [p for n, p in small.named_parameters() if "layers." in n and p.dim() == 2]
    weights = sum(p.numel() for p in blocks if not p.requires_grad)
    adapters = sum(p.numel() for p in blocks if p.requires_grad)
    shape, head = case.shape, root.get_output_embeddings().weight.numel()
    lanes = sum(
        p.shape[1] for n, p in small.named_parameters() if n.endswith("o_proj.weight")
        or n.endswith("o_proj.base_layer.weight")
    )  # fmt: skip
    attention = 7 * 2 * lanes * case.batch * case.tokens * (case.tokens + 1) // 2
    flops = rows * (4 * (weights + head) + 6 * adapters) + attention
    size = torch.empty((), dtype=case.dtype).element_size()
    return {"flops": flops, "bytes": size * (2 * (weights + head) + 2 * rows * shape.hidden)}


def check_case(case: Case) -> Case:
    """The small case on which every contender is compared with fp64."""
    return dataclasses.replace(case, **CHECK)
