"""gated_swiglu: channel gates on gate_proj and up_proj, alone, with LoRA and biases, packed."""

import torch
import torch.nn.functional as F
from _contenders import why_missing
from _suite import Case, Contender, Work, bf16


def _call(t, f, k, *, gated=True, two=False, rank=0, bias=False, **settings):
    from gatepack.kernels import gated_swiglu_fn

    leaves = x, w_a, w_u = bf16(t, k), None if two else bf16(f, k), bf16(f, k)
    z = torch.ones(f, requires_grad=True) if gated else None
    named = {}
    if bias:
        named |= {"bias_a": bf16(f), "bias_u": bf16(f)}
    leaves += (z, *named.values())
    if rank:
        for name in ("lora_of_a", "lora_of_u"):
            named[name] = bf16(rank, k), bf16(f, rank), 2.0
            leaves += named[name][:2]
    h = gated_swiglu_fn(x, w_a, w_u, z, **named, **settings)
    torch.autograd.grad(h, [t for t in leaves if t is not None], torch.empty_like(h))


AOT = {
    "channels": lambda: _call(4096, 14336, 4096, capacity=9216),
    "recompute": lambda: _call(4096, 14336, 4096, capacity=9216, recompute=True),
    "lora+bias": lambda: _call(4096, 14336, 4096, rank=16, bias=True),
    "dense": lambda: _call(4096, 14336, 4096, gated=False),
    "two matrices": lambda: _call(4096, 3072, 768, two=True, activation="gelu"),
}


def capacity_of(case: Case) -> int:
    """Slots for the open channels of a case: their number, up to the next multiple of 256."""
    return min(case.shape.mlp, -(-round(case.kept * case.shape.mlp) // 256) * 256)


def liger_silu_mul():
    """silu(a) * u of liger_kernel, or None where that is not installed."""
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerSiLUMulFunction.apply


def work(case: Case) -> Work:
    """Weights frozen: gradients of x and z; h is compact, then brought to one width for all."""
    from gatepack.kernels import gated_swiglu_fn

    t, k, f = case.tokens, case.shape.hidden, case.shape.mlp
    x, z = case.normal(t, k, grad=True), case.gate(f)
    w_a, w_u = (case.normal(f, k, scale=k**-0.5) for _ in range(2))
    capacity, kept = capacity_of(case), round(case.kept * f)
    channels = z.detach().nonzero().squeeze(1)

    def masked(x, w_a, w_u, z):
        h = F.silu(F.linear(x, w_a)) * F.linear(x, w_u) * z.to(x.dtype)
        return F.pad(h.index_select(1, channels), (0, capacity - kept))

    def folded(x, w_a, w_u, z):
        rows = [w.index_select(0, channels) for w in (w_a, w_u, z)]
        return F.pad(gated_swiglu_fn(x, *rows, packed=True), (0, capacity - kept))

    def dense(x, w_a, w_u):
        return F.silu(F.linear(x, w_a)) * F.linear(x, w_u)

    small = [case.normal(kept, k, scale=k**-0.5) for _ in range(2)]
    inputs = (x, w_a, w_u, z)
    contenders = {
        "ours": Contender(lambda *i: gated_swiglu_fn(*i, capacity=capacity), inputs),
        "folded": Contender(folded, inputs),
        "masked": Contender(masked, inputs),
        "dense": Contender(dense, (x, w_a, w_u)),
        "oracle": Contender(dense, (x, *small)),
    }
    if silu_mul := liger_silu_mul():

        def liger(x, w_a, w_u, z):
            h = silu_mul(F.linear(x, w_a), F.linear(x, w_u)) * z.to(x.dtype)
            return F.pad(h.index_select(1, channels), (0, capacity - kept))

        contenders["liger"] = Contender(liger, inputs)
    reason = why_missing("liger_kernel", "liger-kernel")
    return Work(
        contenders=contenders,
        truth=Contender(
            masked, tuple(i.detach().double().requires_grad_(i.requires_grad) for i in inputs)
        ),
        flops=2 * 2 * 2 * t * k * kept,
        bytes=x.element_size() * (2 * t * k + 6 * t * kept + 4 * k * kept),
        needs_gpu=("ours", "folded", "liger"),
        skipped={"liger": reason} if reason else {},
    )
