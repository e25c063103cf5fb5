"""Forward passes of a whole model without gradients: prefill of a prompt, decode of one token.

ours is gatepack.pack's model, oracle the same sizes in nn.Linear, masked the dense model with the
gates multiplied in. Where gates were fractional, all three give the same logits.
"""

import dataclasses

import torch
from _models import MaskedModel, build, gate, packed_copy, plain, shared_copy
from _suite import Case, Contender, Work
from torch import nn
from transformers import DynamicCache, StaticCache


def inference_work(case: Case, make, least) -> Work:
    """make(model, ids): a function without arguments that gives the logits of one pass. least: what
    the pass of a packed model of these sizes needs, {"flops", "bytes"}."""
    base = build(case).eval()
    generator = torch.Generator().manual_seed(2)
    vocabulary = base.config.vocab_size
    ids = torch.randint(vocabulary, (case.batch, case.tokens), generator=generator).to(case.device)
    gated = shared_copy(base)
    gates = gate(gated, case, ("heads", "channels"))
    gated.eval()
    masked = MaskedModel.of(shared_copy(base), gates)
    with torch.no_grad():
        masked.put(masked.logits)
    packed = packed_copy(gated).eval()
    models = {
        "ours": packed,
        "masked": masked.model,
        "dense": base,
        "oracle": plain(shared_copy(packed)),
    }
    wide = masked.double()
    with torch.no_grad():
        wide.put(wide.logits)
    contenders = {name: _contender(make(model, ids)) for name, model in models.items()}
    return Work(
        contenders=contenders,
        truth=_contender(make(wide.model, ids)),
        **least(sizes(case, packed)),
        differ=("dense",),
        needs_gpu=(),
        compiles=(),
    )


def _contender(run) -> Contender:
    return Contender(torch.no_grad()(run), ())


def prefill_of(model: nn.Module, ids: torch.Tensor):
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def decode_of(model: nn.Module, ids: torch.Tensor):
    """The token behind a prompt, again and again: the cache is put back after each."""
    length = ids.shape[1]
    token = ids[:, -1:].clone()
    if ids.device.type == "cuda":
        # Fixed addresses, so that the pass can be captured; each one writes the same place.
        cache = StaticCache(config=model.config, max_cache_len=length + 64)
    else:
        cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    position = torch.full_like(token, length)

    def run():
        logits = model(
            input_ids=token, past_key_values=cache, position_ids=position, use_cache=True
        ).logits
        if isinstance(cache, StaticCache):
            for layer in cache.layers:
                layer.cumulative_length.sub_(1)
        else:
            cache.crop(-1)
        return logits

    return run


def check_case(case: Case) -> Case:
    """The same with 2 layers: fp64 weights of a large model would not fit beside it."""
    return dataclasses.replace(case, layers=2)


def sizes(case: Case, packed: nn.Module) -> dict[str, int]:
    """Parameters of the blocks and of the output layer, and bytes of the keys and values."""
    head = packed.get_output_embeddings().weight
    named = [(n, p) for n, p in packed.named_parameters() if "layers." in n]
    lanes = sum(p.shape[0] for n, p in named if n.endswith("k_proj.weight"))
    return {
        "blocks": sum(p.numel() for _, p in named),
        "head": head.numel(),
        "cache": 2 * case.batch * case.tokens * lanes * head.element_size(),
        "element": head.element_size(),
    }
