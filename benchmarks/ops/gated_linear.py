"""gated_linear: head gates on o_proj with LoRA, channels of down_proj, row gates, both forms."""

import torch
import torch.nn.functional as F
from _suite import Case, Contender, Work, bf16

from gatepack.functional import FoldedLinear


def _call(t, n, k, *, gates=(), rank=0, channel_major=False, settings=None, **groups):
    from gatepack.kernels import gated_linear_fn

    inputs = {"x": bf16(t, k), "w": bf16(k, n).t() if channel_major else bf16(n, k)}
    if "z_in" in gates:
        inputs["z_in"] = torch.ones(k // groups.get("group_in", 1), requires_grad=True)
    if "z_out" in gates:
        inputs["z_out"] = torch.ones(n // groups.get("group_out", 1), requires_grad=True)
        inputs["bias"] = bf16(n)
    if rank:
        inputs["lora_a"], inputs["lora_b"] = bf16(rank, k), bf16(n, rank)
    y = gated_linear_fn(**inputs, **groups, **settings or {})
    torch.autograd.grad(y, inputs.values(), torch.empty_like(y))


def _compact(t, n, k):
    """down_proj [N, K], stored channel-major, on the open channels of an MLP."""
    from gatepack.kernels import choose_config
    from gatepack.kernels._common import arch_of
    from gatepack.kernels.gated_matmul import gated_matmul, gated_outer
    from gatepack.kernels.open_sets import Axis

    tiles = choose_config("gated_linear", (t, n, k), torch.bfloat16, arch_of(torch.device("cpu")))
    units = torch.empty(k + 1, dtype=torch.int32)
    gated = Axis(k, torch.empty(k), units, compact=True, capacity=k // 2)
    applied = gated._replace(z=None)
    x, dy, w = bf16(t, k // 2), bf16(t, n), bf16(k, n).t()
    gated_matmul(x, w, applied, Axis(n), tiles.fwd)
    gated_matmul(x, w, gated, Axis(n), tiles.fwd)
    gated_matmul(dy, w.t(), Axis(n), gated, tiles.dx, aux=x)
    gated_outer(dy, x, Axis(n), gated, tiles.dw, w)


AOT = {
    "dense": lambda: _call(4096, 4096, 4096),
    "heads+lora": lambda: _call(4096, 4096, 4096, gates=("z_in",), rank=16, group_in=128),
    "channels": lambda: _call(4096, 4096, 14336, gates=("z_in",), channel_major=True),
    "rows+bias": lambda: _call(4096, 14336, 4096, gates=("z_out",)),
    "masked+drop": lambda: _call(
        4096, 4096, 4096, gates=("z_out",), rank=16,
        settings={"form": "masked", "dropout": 0.1, "seed": 1, "closed_grad": "sampled"},
    ),
    "heads+drop": lambda: _call(
        4096, 4096, 4096, gates=("z_in",), rank=16, group_in=128,
        settings={"dropout": 0.1, "seed": 1, "closed_grad": "exact"},
    ),
    "compact": lambda: _compact(4096, 4096, 14336),
}  # fmt: skip


def work(case: Case) -> Work:
    """o_proj behind head gates, weights frozen: gradients of x and z."""
    from gatepack.kernels import gated_linear_fn, gated_linear_ref

    inner = case.shape.heads * case.shape.head_dim
    x = case.normal(case.tokens, inner, grad=True)
    w = case.normal(case.shape.hidden, inner, scale=inner**-0.5)
    z = case.gate(case.shape.heads)
    lanes = case.shape.head_dim

    def masked(x, w, z):
        return gated_linear_ref(x, w, z_in=z, group_in=lanes)

    def folded(x, w, z):
        units = (z.detach() > 0).nonzero().squeeze(1)
        cols = (units[:, None] * lanes + torch.arange(lanes, device=x.device)).reshape(-1)
        z_open = z.index_select(0, units)
        return FoldedLinear.apply(
            x.index_select(1, cols), w, None, z_open, None, None, cols, lanes, 1
        )

    kept = round(case.kept * case.shape.heads) * lanes
    small_x = case.normal(case.tokens, kept, grad=True)
    small_w = case.normal(case.shape.hidden, kept)
    t, n, size = case.tokens, case.shape.hidden, x.element_size()
    return Work(
        contenders={
            "ours": Contender(
                lambda x, w, z: gated_linear_fn(x, w, z_in=z, group_in=lanes), (x, w, z)
            ),
            "folded": Contender(folded, (x, w, z)),
            "masked": Contender(masked, (x, w, z)),
            "dense": Contender(F.linear, (x, w)),
            "oracle": Contender(F.linear, (small_x, small_w)),
        },
        truth=Contender(
            masked, tuple(i.detach().double().requires_grad_(i.requires_grad) for i in (x, w, z))
        ),
        flops=2 * 2 * t * n * kept,
        bytes=size * (3 * t * kept + 2 * t * n + 2 * n * kept),
    )
