"""packed_linear: decode through a linear with packed rows and columns, and the residual."""

import torch
import torch.nn.functional as F
from _suite import Case, Contender, Work, bf16


def _call(t, r, c, *, full=None, residual=True):
    from gatepack.kernels import packed_linear_fn

    n, k = full or (r, c)
    lanes = {}
    if full:
        lanes = {"rows": torch.zeros(r, dtype=torch.int32), "out_features": n}
        lanes["cols"] = torch.zeros(c, dtype=torch.int32)
    accumulate = bf16(t, n, grad=False) if residual else None
    packed_linear_fn(bf16(t, k, grad=False), bf16(r, c, grad=False), accumulate=accumulate, **lanes)


AOT = {
    "compact t=1": lambda: _call(1, 4096, 8576),
    "full t=1": lambda: _call(1, 2432, 8576, full=(4096, 14336)),
    "smollm2 t=1": lambda: _call(1, 576, 920, residual=False),
    "compact t=8": lambda: _call(8, 4096, 8576),
    "full t=16": lambda: _call(16, 2432, 8576, full=(4096, 14336)),
    "full t=64": lambda: _call(64, 2432, 8576, full=(4096, 14336)),
}


def work(case: Case) -> Work:
    """down_proj with row and column gates, residual added, for at most 16 of the case's tokens."""
    from gatepack.kernels import packed_linear_fn, packed_linear_ref

    t, n, k = min(case.tokens, 16), case.shape.hidden, case.shape.mlp
    rows, cols = (_kept_lanes(size, case) for size in (n, k))
    x, residual = case.normal(t, k), case.normal(t, n)
    w = case.normal(len(rows), len(cols), scale=len(cols) ** -0.5)
    dense = case.normal(n, k, scale=k**-0.5)
    small_x, small_residual = case.normal(t, len(cols)), case.normal(t, len(rows))

    def packed(fn):
        return lambda x, w, residual: fn(
            x, w, rows=rows, cols=cols, out_features=n, accumulate=residual
        )

    def linear(x, w, residual):
        return residual + F.linear(x, w)

    inputs = (x, w, residual)
    return Work(
        contenders={
            "ours": Contender(packed(packed_linear_fn), inputs),
            "masked": Contender(packed(packed_linear_ref), inputs),
            "dense": Contender(linear, (x, dense, residual)),
            "oracle": Contender(linear, (small_x, w, small_residual)),
        },
        truth=Contender(packed(packed_linear_ref), tuple(i.double() for i in inputs)),
        flops=2 * t * w.numel(),
        bytes=w.element_size() * (w.numel() + t * (len(cols) + 2 * n)),
    )


def _kept_lanes(size, case):
    """round(kept * size) lanes to a multiple of 64, ascending, at random places."""
    kept = min(size, 64 * max(1, round(case.kept * size / 64)))
    return torch.randperm(size, device=case.device)[:kept].sort().values.to(torch.int32)
