"""attention: a Llama attention with gated heads, projections and RoPE included; base frozen."""

from _blocks import block_work, check_case

__all__ = ["check_case", "work"]

UNITS = ("heads",)


def work(case):
    return block_work(case, "attention", UNITS)
