"""Stage 4, methods: how good a language model is, and how far two of them are apart."""

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from gatepack.hf import hf_model

LOGITS_AT_ONCE = 64 * 1024**2


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: torch.Tensor,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> float:
    """exp(mean over tokens of -log p(next token)) over windows [n, length] of token ids.

    Each window gives length - 1 predictions, all of equal weight. Runs in eval mode (and restores
    it) without gradients; log-probabilities are fp32 and their sum fp64. batch_size is an upper
    bound: a forward never holds more than 64 Mi logits. progress is called with the number of
    windows done. Raises ValueError for windows of another form or a model without token logits.
    """
    _check(windows, shortest=2)
    total = torch.zeros((), dtype=torch.float64)
    done = 0
    with evaluating(model):
        for ids in windows.split(_rows(model, windows, batch_size)):
            logits = token_logits(model, ids)
            for row, targets in zip(logits, ids.to(logits.device), strict=True):
                loss = nn.functional.cross_entropy(row[:-1].float(), targets[1:], reduction="sum")
                total += loss.double().cpu()
            done += len(ids)
            if progress is not None:
                progress(done)
    return (total / (len(windows) * (windows.shape[1] - 1))).exp().item()


@torch.no_grad()
def max_logit_difference(
    a: nn.Module, b: nn.Module, windows: torch.Tensor, batch_size: int = 4
) -> float:
    """max |logits_a - logits_b| over windows [n, length] of token ids, both models in eval mode.

    NaN if either model gives one. Raises ValueError if the models' vocabularies differ in size.
    """
    _check(windows, shortest=1)
    largest = torch.zeros((), dtype=torch.float64)
    with evaluating(a), evaluating(b):
        for ids in windows.split(_rows(a, windows, batch_size)):
            left = token_logits(a, ids)
            right = token_logits(b, ids).to(left.device)
            if left.shape != right.shape:
                raise ValueError(
                    f"the models' logits differ in shape: {tuple(left.shape)}, {tuple(right.shape)}"
                )
            for row, other in zip(left, right, strict=True):
                wide = torch.promote_types(torch.promote_types(row.dtype, other.dtype), torch.float)
                gap = (row.to(wide) - other.to(wide)).abs().max()
                largest = torch.maximum(largest, gap.double().cpu())
    return largest.item()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode and gives every submodule its own mode back afterwards.

    Modules that came in between, as gates do that follow an adapter, take the model's mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def token_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, length, vocabulary] of token ids [B, length]; ValueError if the model has none."""
    accepted = forward_arguments(model)
    cache = {"use_cache": False} if "use_cache" in accepted else {}
    logits = getattr(model(input_ids=ids.to(input_device(model)), **cache), "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"{type(hf_model(model)).__name__} gives no logits for each token")
    return logits


def forward_arguments(model: nn.Module) -> set[str]:
    """Names that the forward of a transformers model takes, looking inside a PEFT wrapper."""
    return set(inspect.signature(hf_model(model).forward).parameters)


def input_device(model: nn.Module) -> torch.device:
    return hf_model(model).get_input_embeddings().weight.device


def vocabulary_size(model: nn.Module) -> int:
    return hf_model(model).get_input_embeddings().weight.shape[0]


def _rows(model: nn.Module, windows: torch.Tensor, batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    affordable = LOGITS_AT_ONCE // (windows.shape[1] * vocabulary_size(model))
    return max(1, min(batch_size, affordable))


def _check(windows: torch.Tensor, shortest: int) -> None:
    integer = not windows.is_floating_point() and not windows.is_complex()
    if not integer or windows.dim() != 2 or len(windows) < 1 or windows.shape[1] < shortest:
        raise ValueError(
            f"windows must be integer token ids [n >= 1, length >= {shortest}], "
            f"got {windows.dtype} {list(windows.shape)}"
        )
