"""decoder_layer: norms, attention and MLP of a Llama with gated heads and channels."""

from _blocks import block_work, check_case

__all__ = ["check_case", "work"]

UNITS = ("heads", "channels")


def work(case):
    return block_work(case, "layer", UNITS)
