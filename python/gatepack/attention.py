"""Stage 3, modules: gated_attention as a transformers attention implementation, "gatepack".

    import gatepack.attention                       # or gatepack.attach, before or after
    model.set_attn_implementation("gatepack")

On the "triton" path closed heads are skipped inside the kernel, at full width; on the "folded" path
and in models without gates all heads that are there run. Where Triton cannot run, the same masks go
to torch's scaled_dot_product_attention.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from gatepack.paths import has_kernels

NAME = "gatepack"
# What models pass that changes the scores (Gemma 2's tanh, gpt-oss's sinks, T5's bias).
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias")


def padding_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function,
    attention_mask=None, **_
):  # fmt: skip
    """transformers' padding mask as gated_attention takes it: bool [B, Skv], or None.

    Refuses patterns that are neither causal nor bidirectional (sliding windows, packed sequences)
    and static caches, whose unused keys lie behind the last query.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "attn_implementation='gatepack': expected a causal or bidirectional model without "
            "sliding windows or packed sequences; use attn_implementation='sdpa' for this model"
        )
    if not isinstance(q_offset, int) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"attn_implementation='gatepack': expected as many keys as tokens so far, got "
            f"{kv_length} keys for {q_offset} + {q_length} tokens; use a dynamic cache, or "
            "attn_implementation='sdpa' with a static one"
        )
    return None if attention_mask is None else attention_mask[:, -kv_length:].bool()


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """o [B, S, H, D] and no weights; query [B, H, S, D], key and value [B, Hkv, Skv, D].

    Refuses dropout on the attention weights, masks that are not [B, Skv], and whatever else changes
    the scores (UNSUPPORTED).
    """
    changed = next((name for name in UNSUPPORTED if others.get(name) is not None), None)
    if changed is not None:
        raise ValueError(
            f"{changed}: expected None with attn_implementation='gatepack', which has no such term "
            "in its scores; use attn_implementation='eager' for this model"
        )
    if dropout:
        raise ValueError(
            f"dropout: expected 0 with attn_implementation='gatepack', got {dropout}; set "
            "attention_dropout=0 in the model's config"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected shape [B, Skv] with attn_implementation='gatepack', got "
            f"{list(attention_mask.shape)}"
        )
    causal = module.is_causal if is_causal is None else is_causal
    if not has_kernels(query.device):
        return _sdpa(query, key, value, attention_mask, scaling, causal), None
    from gatepack.kernels import gated_attention_fn

    gate = getattr(module, "gatepack_heads", None)
    running = gate.running() if gate is not None and gate.path == "triton" else None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    o = gated_attention_fn(q, k, v, running, causal=causal, scale=scaling, key_mask=attention_mask)
    return o, None


def _sdpa(query, key, value, key_mask, scaling, causal) -> torch.Tensor:
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if causal:
        at = torch.arange(keys, device=query.device)
        mask = at <= at[-queries:, None]
    if key_mask is not None:
        rows = key_mask[:, None, None, :]
        mask = rows if mask is None else mask & rows
    if mask is not None:
        # A query that sees no key would give NaN; it gives 0, as in the kernel.
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    o = F.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    if mask is not None:
        o = o.masked_fill(blind, 0.0)
    return o.transpose(1, 2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
