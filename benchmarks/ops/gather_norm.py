"""gather_norm: RMSNorm before q, k and v with column gates; LayerNorm before one linear."""

import torch
from _suite import Case, Contender, Work, bf16


def _call(t, d, consumers, *, gated=True, kind="rms", frozen=False):
    from gatepack.kernels import gather_norm_fn

    weight = bf16(d, grad=not frozen)
    leaves = [bf16(t, d)] + ([] if frozen else [weight])
    bias = gates = None
    if kind == "layer":
        bias = bf16(d)
        leaves.append(bias)
    if gated:
        gates = [torch.ones(d, requires_grad=True) for _ in range(consumers)]
        leaves += gates
    open_sets = [torch.empty(d + 1, dtype=torch.int32) for _ in range(consumers)]
    capacities = [5 * d // 8] * consumers
    ys = gather_norm_fn(
        leaves[0], weight, bias, open_sets=open_sets, capacities=capacities, gates=gates, kind=kind
    )
    torch.autograd.grad(ys, leaves, [torch.empty_like(y) for y in ys])


AOT = {
    "q, k, v": lambda: _call(8192, 4096, 3),
    "gate, up, frozen": lambda: _call(8192, 4096, 2, gated=False, frozen=True),
    "layer": lambda: _call(8192, 768, 1, kind="layer"),
    "wide": lambda: _call(2048, 16384, 2),
}


def work(case: Case) -> Work:
    """Column gates of q, k and v; the norm's weight is frozen."""
    from gatepack.kernels import gather_norm_fn, gather_norm_ref, open_set_ref

    t, d = case.tokens, case.shape.hidden
    x, weight = case.normal(t, d, grad=True), case.normal(d)
    gates = [case.gate(d) for _ in range(3)]
    settings = {
        "open_sets": [open_set_ref(z.detach()) for z in gates],
        "capacities": [round(case.kept * d)] * 3,
    }

    def of(fn):
        return lambda x, weight, *gates: tuple(fn(x, weight, gates=list(gates), **settings))

    inputs = (x, weight, *gates)
    wide = tuple(i.detach().double().requires_grad_(i.requires_grad) for i in inputs)
    return Work(
        contenders={
            "ours": Contender(of(gather_norm_fn), inputs),
            "masked": Contender(of(gather_norm_ref), inputs),
        },
        truth=Contender(of(gather_norm_ref), wide),
        flops=0,
        bytes=x.element_size() * t * (3 * d + 6 * round(case.kept * d)),
    )
