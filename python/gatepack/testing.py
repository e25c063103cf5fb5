"""What tests and benchmarks share: error against fp64, poisoned outputs, named model shapes."""

import contextlib
import dataclasses
from unittest import mock

import torch


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Widths of one transformer: the residual, the MLP, and its heads."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


MODEL_SHAPES = {
    "minilm-l6": ModelShape(hidden=384, mlp=1536, heads=12, kv_heads=12, head_dim=32),
    "smollm2-135m": ModelShape(hidden=576, mlp=1536, heads=9, kv_heads=3, head_dim=64),
    "roberta-base": ModelShape(hidden=768, mlp=3072, heads=12, kv_heads=12, head_dim=64),
    "llama-2-7b": ModelShape(hidden=4096, mlp=11008, heads=32, kv_heads=32, head_dim=128),
    "llama-3-8b": ModelShape(hidden=4096, mlp=14336, heads=32, kv_heads=8, head_dim=128),
}


def assert_close_to_fp64(
    name: str,
    got: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    ref64: torch.Tensor,
    factor: float = 2.0,
    dtype: torch.dtype | None = None,
    terms: float = 0.0,
) -> None:
    """max |got - ref64| <= factor * max |torch_same_dtype - ref64| + floor,
    floor = eps(dtype) * max |ref64| + eps(got.dtype) * terms.

    torch_same_dtype is what torch itself computes in the working dtype, so that no tolerance is
    made up here: only the factor (2 for outputs, 3 for gradients) and a floor of one unit in the
    last place, for the few numbers on which torch happens to be exact. dtype is the working dtype,
    by default that of got; a fp32 gate gradient made from bf16 tensors says bf16. terms is the
    largest sum of |terms| behind one number, for long sums that cancel.
    """
    assert got.shape == ref64.shape, f"{name}: shape {got.shape}, expected {ref64.shape}"
    assert got.dtype == torch_same_dtype.dtype, f"{name}: {got.dtype}"
    if got.numel() == 0:
        return
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} values are not finite"
    error = (got.double() - ref64).abs().max().item()
    theirs = (torch_same_dtype.double() - ref64).abs().max().item()
    floor = torch.finfo(dtype or got.dtype).eps * ref64.abs().max().item()
    floor += torch.finfo(got.dtype).eps * terms
    allowed = factor * theirs + floor
    assert error <= allowed, f"{name}: error {error:.3e}, torch {theirs:.3e}, allowed {allowed:.3e}"


@contextlib.contextmanager
def poisoned_empty():
    """torch.empty, empty_like and new_empty give NaN (the largest integer, True) inside.

    An output element that a kernel forgets to write then fails the comparison instead of holding
    a zero by chance.
    """

    def poison(make):
        def poisoned(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(torch.iinfo(out.dtype).max)

        return poisoned

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)),
    ):
        yield
