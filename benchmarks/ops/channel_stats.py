"""channel_stats: calibration statistics of the MLP's inner activation."""

import torch
from _suite import Case, Contender, Work, bf16


def _call(t, c, mask=True, shift=False):
    from gatepack.kernels import channel_stats_fn

    token_mask = torch.empty(t, dtype=torch.bool) if mask else None
    channel_stats_fn(bf16(t, c), token_mask, torch.empty(c) if shift else None)


AOT = {
    "plain": lambda: _call(2048, 14336, mask=False),
    "mask": lambda: _call(2048, 14336),
    "mask+shift": lambda: _call(2048, 14336, shift=True),
}


def work(case: Case) -> Work:
    """A tenth of the tokens is padding; the open fraction plays no part."""
    from gatepack.kernels import channel_stats_fn, channel_stats_ref

    x = case.normal(case.tokens, case.shape.mlp)
    token_mask = torch.rand(case.tokens, device=case.device) < 0.9

    def ours(x):
        return tuple(channel_stats_fn(x, token_mask))

    def masked(x):
        return tuple(channel_stats_ref(x, token_mask))

    return Work(
        contenders={"ours": Contender(ours, (x,)), "masked": Contender(masked, (x,))},
        truth=Contender(masked, (x.double(),)),
        flops=0,
        bytes=x.numel() * x.element_size(),
    )
