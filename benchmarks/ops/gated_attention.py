"""gated_attention: causal attention with head gates, in sequences of up to 2048 tokens."""

import torch
import torch.nn.functional as F
from _suite import Case, Contender, Work, bf16

SEQUENCE = 2048  # tokens


def _call(
    batch, tokens, heads, kv_heads, lanes, *, gated=True, varlen=False, make=bf16, **settings
):
    from gatepack.kernels import gated_attention_fn

    sizes = (batch * tokens,) if varlen else (batch, tokens)
    q, k, v = (make(*sizes, count, lanes) for count in (heads, kv_heads, kv_heads))
    if varlen:
        starts = torch.zeros(batch + 1, dtype=torch.int32)
        settings |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        settings |= {"max_seqlen_q": tokens, "max_seqlen_k": tokens}
    leaves = [q, k, v, torch.ones(heads, requires_grad=True)] if gated else [q, k, v]
    o = gated_attention_fn(*leaves, **settings)
    torch.autograd.grad(o, leaves, torch.empty_like(o))


def _padded(batch, tokens, *sizes, **settings):
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    _call(batch, tokens, *sizes, key_mask=mask, **settings)


def _fp32(*shape):
    return bf16(*shape).detach().float().requires_grad_()


AOT = {
    "causal": lambda: _call(2, 4096, 32, 8, 128),
    "no gate": lambda: _call(2, 4096, 32, 8, 128, gated=False),
    "encoder": lambda: _call(8, 512, 12, 12, 64, causal=False),
    "head_dim 64": lambda: _call(4, 2048, 9, 3, 64),
    "padded": lambda: _padded(2, 4096, 32, 8, 128),
    "varlen": lambda: _call(2, 4096, 32, 8, 128, varlen=True),
    "window": lambda: _call(2, 4096, 32, 8, 128, window=1024),
    "fp32 256": lambda: _call(1, 256, 4, 2, 256, make=_fp32),
    "fp32 padded": lambda: _padded(1, 256, 4, 2, 256, make=_fp32, causal=False),
}


def work(case: Case) -> Work:
    """Gradients of q, k, v and z. oracle: the heads that whole open groups would leave."""
    from gatepack.kernels import gated_attention_fn, gated_attention_ref

    shape, tokens = case.shape, min(SEQUENCE, case.tokens)
    batch, group, lanes = case.tokens // tokens, shape.heads // shape.kv_heads, shape.head_dim
    if case.tokens % tokens:
        return None
    q = case.normal(batch, tokens, shape.heads, lanes, grad=True)
    k, v = (case.normal(batch, tokens, shape.kv_heads, lanes, grad=True) for _ in range(2))
    z = case.gate(shape.heads)

    def dense(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2)

    def masked(q, k, v, z):
        return dense(q, k, v) * z.to(q.dtype)[:, None]

    def folded(q, k, v, z):
        heads = z.detach().nonzero().squeeze(1)
        q_open, z_open = q.index_select(2, heads), z.index_select(0, heads)
        k_open, v_open = (x.index_select(2, heads // group) for x in (k, v))
        o = masked(q_open, k_open, v_open, z_open)
        return torch.zeros_like(q).index_copy(2, heads, o)

    open_groups = (z.detach() != 0).view(-1, group).any(1).sum().item()
    kept = round(case.kept * shape.heads)
    kv_kept = max(1, round(kept / group))
    small = [
        case.normal(batch, tokens, count, lanes, grad=True)
        for count in (kv_kept * group, kv_kept, kv_kept)
    ]
    inputs = (q, k, v, z)
    pairs = batch * kept * tokens * (tokens + 1) // 2
    return Work(
        contenders={
            "ours": Contender(gated_attention_fn, inputs),
            "folded": Contender(folded, inputs),
            "masked": Contender(masked, inputs),
            "dense": Contender(dense, (q, k, v)),
            "oracle": Contender(dense, tuple(small)),
        },
        truth=Contender(
            gated_attention_ref, tuple(x.detach().double().requires_grad_() for x in inputs)
        ),
        # Forward q k^T and p v; backward the scores again, dp, dv, dk, dq.
        flops=7 * 2 * pairs * lanes,
        bytes=q.element_size() * case.tokens * lanes * (6 * kept + 6 * open_groups),
    )
