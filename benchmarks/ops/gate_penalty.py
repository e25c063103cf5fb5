"""gate_penalty: expected cost of every head and channel gate of a model of 32 layers."""

import torch
from _suite import Case, Contender, Work

from gatepack.budget import Costs
from gatepack.estimators import STG
from gatepack.gates import GateSpec

LAYERS = 32


def _call(estimator, shared=True):
    from gatepack.kernels import gate_penalty_fn

    sizes = [32, 14336] * LAYERS
    logits = torch.empty(sum(sizes), requires_grad=True)
    offsets = torch.empty(len(sizes) + 1, dtype=torch.int32)
    closed = torch.empty(logits.numel(), dtype=torch.bool)
    costs = [torch.empty(len(sizes))]
    if shared:
        costs += [torch.empty(len(sizes), dtype=torch.int32), torch.empty(len(sizes))]
    settings = {"max_segment": max(sizes), "estimator": estimator, "closed": closed}
    cost = gate_penalty_fn(logits, offsets, *costs, **settings)
    torch.autograd.grad(cost, logits, torch.empty_like(cost))


AOT = {
    "stg": lambda: _call("stg"),
    "stg means": lambda: _call("stg", shared=False),
    "hard_concrete": lambda: _call("hard_concrete"),
    "gumbel": lambda: _call("gumbel"),
}


def work(case: Case) -> Work:
    """Expected kept parameters of 32 layers; tokens and the open fraction play no part."""
    from gatepack.kernels import gate_penalty_fn

    shape, device = case.shape, case.device
    shared = shape.heads // shape.kv_heads
    rows = shape.hidden * shape.head_dim
    specs = {}
    for layer in range(LAYERS):
        specs[f"{layer} heads"] = GateSpec(
            "heads", shape.heads, shape.head_dim, 2 * rows, shared, 2 * rows
        )
        specs[f"{layer} channels"] = GateSpec("channels", shape.mlp, 1, 3 * shape.hidden)

    def of(field, dtype):
        return torch.tensor([getattr(s, field) for s in specs.values()], dtype=dtype, device=device)

    sizes = of("size", torch.int32)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)
    logits = torch.randn(int(sizes.sum()), device=device, requires_grad=True)
    unit_cost, shared_cost = of("unit_cost", torch.float32), of("shared_cost", torch.float32)
    shared_size = of("shared_size", torch.int32)
    costs, estimator = Costs(specs, fixed=0), STG(sigma=0.1)

    def ours(logits):
        cost = gate_penalty_fn(
            logits, offsets, unit_cost, shared_size, shared_cost, max_segment=shape.mlp
        )
        return cost.sum() / costs.total

    def masked(logits):
        return costs.expected(estimator.open_probability(logits))

    return Work(
        contenders={"ours": Contender(ours, (logits,)), "masked": Contender(masked, (logits,))},
        truth=Contender(masked, (logits.detach().double().requires_grad_(),)),
        flops=0,
        bytes=logits.numel() * 4 * 3,
    )
