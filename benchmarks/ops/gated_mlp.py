"""gated_mlp: a SwiGLU MLP with channel gates, weights frozen, trained, and with LoRA."""

import torch
import torch.nn.functional as F
from _contenders import why_missing
from _suite import Case, Contender, Work, bf16, modules


def _call(t, f, k, *, gated=True, two=False, frozen=True, rank=0, bias=False, **settings):
    from gatepack.kernels import gated_mlp_fn

    weights = [
        None if two else bf16(f, k, grad=not frozen), bf16(f, k, grad=not frozen),
        bf16(f, k, grad=not frozen).t() if gated else bf16(k, f, grad=not frozen),
    ]  # fmt: skip
    x, z = bf16(t, k), torch.ones(f, requires_grad=True) if gated else None
    named = {}
    if bias:
        named |= {"bias_a": bf16(f), "bias_u": bf16(f), "bias_d": bf16(k)}
    leaves = [x, z, *weights, *named.values()]
    if rank:
        for name in ("lora_of_a", "lora_of_u", "lora_of_d"):
            size, out = (f, k) if name == "lora_of_d" else (k, f)
            named[name] = bf16(rank, size), bf16(out, rank), 2.0
            leaves += named[name][:2]
    y = gated_mlp_fn(x, *weights, z, **named, **settings)
    leaves = [t for t in leaves if t is not None and t.requires_grad]
    torch.autograd.grad(y, leaves, torch.empty_like(y))


AOT = {
    "channels": lambda: _call(8192, 14336, 4096, capacity=9216),
    "weights": lambda: _call(8192, 14336, 4096, frozen=False),
    "lora+bias": lambda: _call(8192, 14336, 4096, rank=16, bias=True),
    "dense": lambda: _call(8192, 14336, 4096, gated=False),
    "packed": lambda: _call(8192, 8704, 4096, packed=True, rank=16),
    "two matrices": lambda: _call(4096, 3072, 768, two=True, activation="gelu"),
}


def work(case: Case) -> Work:
    """Weights frozen, w_d channel-major: gradients of x and z."""
    from gatepack.kernels import gated_mlp_fn, gated_mlp_ref

    swiglu = modules(["gated_swiglu"])["gated_swiglu"]
    t, k, f = case.tokens, case.shape.hidden, case.shape.mlp
    x, z = case.normal(t, k, grad=True), case.gate(f)
    w_a, w_u = (case.normal(f, k, scale=k**-0.5) for _ in range(2))
    w_d = case.normal(f, k, scale=f**-0.5).t()
    kept, capacity = round(case.kept * f), swiglu.capacity_of(case)

    def folded(x, w_a, w_u, w_d, z):
        channels = z.detach().nonzero().squeeze(1)
        w_a, w_u, w_d, z = (w.index_select(0, channels) for w in (w_a, w_u, w_d.t(), z))
        return gated_mlp_fn(x, w_a, w_u, w_d.t(), z, packed=True)

    def dense(x, w_a, w_u, w_d):
        return F.linear(F.silu(F.linear(x, w_a)) * F.linear(x, w_u), w_d)

    small = [case.normal(kept, k, scale=k**-0.5) for _ in range(2)]
    small.append(case.normal(k, kept, scale=kept**-0.5))
    inputs = (x, w_a, w_u, w_d, z)
    contenders = {
        "ours": Contender(lambda *i: gated_mlp_fn(*i, capacity=capacity), inputs),
        "folded": Contender(folded, inputs),
        "masked": Contender(gated_mlp_ref, inputs),
        "dense": Contender(dense, (x, w_a, w_u, w_d.contiguous())),
        "oracle": Contender(dense, (x, *small)),
    }
    if silu_mul := swiglu.liger_silu_mul():

        def liger(x, w_a, w_u, w_d, z):
            h = silu_mul(F.linear(x, w_a), F.linear(x, w_u))
            return F.linear(h * z.to(h.dtype), w_d)

        contenders["liger"] = Contender(liger, inputs)
    reason = why_missing("liger_kernel", "liger-kernel")
    return Work(
        contenders=contenders,
        truth=Contender(
            gated_mlp_ref,
            tuple(i.detach().double().requires_grad_(i.requires_grad) for i in inputs),
        ),
        flops=2 * 2 * 3 * t * k * kept,
        bytes=x.element_size() * (4 * t * k + 6 * t * kept + 6 * k * kept),
        needs_gpu=("ours", "folded", "liger"),
        skipped={"liger": reason} if reason else {},
    )
