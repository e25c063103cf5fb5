"""Stage 2, kernels: what gated_linear refuses."""

import torch

from ._common import expect, expect_matrix, expect_operand

FORMS = ("gated", "masked")
CLOSED_GRADS = ("none", "exact", "sampled")


def check_tensors(x, w, bias, z_in, z_out, lora_a, lora_b, group_in, group_out):
    """Shapes, dtypes and devices, which the operator checks on fake tensors as well."""

    expect_operand("x", x)
    n, k = expect_matrix("w", w)
    expect("x", x, (*x.shape[:-1], k), x.dtype, x)
    expect("w", w, (n, k), x.dtype, x)
    expect("bias", bias, (n,), x.dtype, x)
    for name, size, group in (("group_in", k, group_in), ("group_out", n, group_out)):
        if group < 1 or size % group:
            raise ValueError(f"{name}: expected a divisor of {size}, got {group}")
    expect("z_in", z_in, (k // group_in,), torch.float32, x)
    expect("z_out", z_out, (n // group_out,), torch.float32, x)
    if (lora_a is None) != (lora_b is None):
        missing = "lora_a" if lora_a is None else "lora_b"
        raise ValueError(f"{missing}: expected a tensor beside the other LoRA factor, got None")
    if lora_a is not None:
        rank = lora_a.shape[0] if lora_a.dim() else 0
        expect("lora_a", lora_a, (rank, k), x.dtype, x)
        expect("lora_b", lora_b, (n, rank), x.dtype, x)


def check_settings(x, form, dropout, seed, closed_grad, closed_fraction):
    """Everything that is not a tensor of the layer."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected at least 0 and below 1, got {dropout}")
    if closed_grad not in CLOSED_GRADS:
        raise ValueError(f"closed_grad: expected one of {CLOSED_GRADS}, got {closed_grad!r}")
    if not 0 < closed_fraction <= 1:
        raise ValueError(f"closed_fraction: expected above 0 and at most 1, got {closed_fraction}")
    needed_by = (
        "dropout" if dropout else "closed_grad 'sampled'" if closed_grad == "sampled" else ""
    )
    if seed is None:
        if needed_by:
            raise ValueError(
                f"seed: expected an integer or an int64 tensor for {needed_by}, got None"
            )
    elif isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ValueError(
                f"seed: expected an int64 tensor of one element on {x.device}, got {seed.dtype} "
                f"{tuple(seed.shape)} on {seed.device}"
            )
    elif not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
