"""attention: a Llama attention with gated heads, projections and RoPE included; base frozen."""

from _blocks import block_work

UNITS = ("heads",)


def work(case):
    return block_work(case, "attention", UNITS)
