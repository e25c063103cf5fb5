"""mlp: a Llama MLP whose channels are gated; base frozen, gradients of x, logits and LoRA."""

from _blocks import block_work

UNITS = ("channels",)


def work(case):
    return block_work(case, "mlp", UNITS)
