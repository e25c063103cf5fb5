"""column_dot: the gradient of a channel gate from two activations."""

import torch
from _suite import Case, Contender, Work, bf16


def _call(t, n):
    from gatepack.kernels import column_dot_fn

    a, b = bf16(t, n), bf16(t, n)
    y = column_dot_fn(a, b)
    torch.autograd.grad(y, (a, b), torch.empty_like(y))


AOT = {"residual": lambda: _call(8192, 4096), "mlp": lambda: _call(8192, 14336)}


def work(case: Case) -> Work:
    """The MLP's width; the open fraction plays no part."""
    from gatepack.kernels import column_dot_fn, column_dot_ref

    a, b = (case.normal(case.tokens, case.shape.mlp, grad=True) for _ in range(2))
    wide = tuple(t.detach().double().requires_grad_() for t in (a, b))
    return Work(
        contenders={
            "ours": Contender(column_dot_fn, (a, b)),
            "masked": Contender(column_dot_ref, (a, b)),
        },
        truth=Contender(column_dot_ref, wide),
        flops=0,
        bytes=a.numel() * a.element_size() * (2 + 4),
    )
