"""scatter_add: the compact output of a row-gated linear, added into the residual."""

import torch
from _suite import Case, Contender, Work, bf16


def _call(t, d, capacity, gated):
    from gatepack.kernels import scatter_add_fn

    inputs = {"residual": bf16(t, d), "y": bf16(t, capacity)}
    if gated:
        inputs["z"] = torch.ones(d, requires_grad=True)
    out = scatter_add_fn(**inputs, open_set=torch.empty(d + 1, dtype=torch.int32))
    torch.autograd.grad(out, inputs.values(), torch.empty_like(out))


AOT = {
    "plain": lambda: _call(8192, 4096, 2560, False),
    "gated": lambda: _call(8192, 4096, 2560, True),
}


def work(case: Case) -> Work:
    """The output of o_proj behind row gates."""
    from gatepack.kernels import open_set_ref, scatter_add_fn, scatter_add_ref

    t, d = case.tokens, case.shape.hidden
    z = case.gate(d)
    open_set = open_set_ref(z.detach())
    capacity = round(case.kept * d)
    residual, y = case.normal(t, d, grad=True), case.normal(t, capacity, grad=True)
    inputs = (residual, y, z)

    def ours(residual, y, z):
        return scatter_add_fn(residual, y, open_set, z)

    def masked(residual, y, z):
        return scatter_add_ref(residual, y, open_set, z)

    return Work(
        contenders={"ours": Contender(ours, inputs), "masked": Contender(masked, inputs)},
        truth=Contender(masked, tuple(i.detach().double().requires_grad_() for i in inputs)),
        flops=0,
        bytes=residual.element_size() * t * (2 * d + 4 * capacity),
    )
