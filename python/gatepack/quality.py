"""Stage 4, methods: how good a language model is, and how far two of them are apart."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from gatepack.layers import hf_model, layers_of

LOGITS_AT_ONCE = 64 * 1024**2


class ParityError(FloatingPointError):
    """A model does not compute what the one that it was made from did."""


@dataclass(frozen=True)
class TokenScores:
    """What a model said of each scored token, in the order of the windows.

    nats: -log p(token), fp64 [n]. confidence: probability of the likeliest token, fp32 [n]. hit:
    whether that was the token, bool [n].
    """

    nats: torch.Tensor
    confidence: torch.Tensor
    hit: torch.Tensor

    @property
    def perplexity(self) -> float:
        """exp(mean over tokens of -log p)."""
        return self.nats.mean().exp().item()

    @property
    def calibration_error(self) -> float:
        return calibration_error(self.confidence, self.hit)

    @classmethod
    def joined(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@torch.no_grad()
def token_scores(
    model: nn.Module,
    windows: torch.Tensor,
    scored: torch.Tensor | None = None,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> TokenScores:
    """-log p(token | tokens before it in its window) over windows [n, length] of token ids.

    scored, bool [n, length]: which tokens count; by default all but the first of each window, which
    nothing precedes. Runs in eval mode (and restores it) without gradients; log-probabilities are
    fp32. batch_size is an upper bound: a forward never holds more than 64 Mi logits. progress is
    called with the number of windows done. Raises ValueError for windows of another form, a scored
    first token, or a model without token logits.
    """
    _check(windows, shortest=2)
    if scored is None:
        scored = torch.ones_like(windows, dtype=torch.bool)
        scored[:, 0] = False
    elif scored.dtype != torch.bool or scored.shape != windows.shape or bool(scored[:, 0].any()):
        raise ValueError(
            f"scored must be bool {list(windows.shape)} and False for each window's first token, "
            f"got {scored.dtype} {list(scored.shape)}"
        )
    rows = _rows(model, windows, batch_size)
    parts = []
    done = 0
    with evaluating(model):
        for ids, wanted in zip(windows.split(rows), scored.split(rows), strict=True):
            logits = token_logits(model, ids)
            places = zip(logits, ids.to(logits.device), wanted.to(logits.device), strict=True)
            for row, targets, mask in places:
                parts.append(_token_scores(row[:-1][mask[1:]].float(), targets[mask]))
            done += len(ids)
            if progress is not None:
                progress(done)
    scores = TokenScores.joined(parts)
    return TokenScores(scores.nats.double().cpu(), scores.confidence.cpu(), scores.hit.cpu())


def _token_scores(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    nats = nn.functional.cross_entropy(logits, targets, reduction="none")
    highest, guess = logits.max(-1)
    return TokenScores(nats, (highest - logits.logsumexp(-1)).exp(), guess == targets)


def perplexity(
    model: nn.Module,
    windows: torch.Tensor,
    batch_size: int = 4,
    progress: Callable[[int], None] | None = None,
) -> float:
    """exp(mean over tokens of -log p(next token)) over windows [n, length] of token ids.

    Each window gives length - 1 predictions, all of equal weight; their mean is fp64. The rest is
    as in token_scores.
    """
    return token_scores(model, windows, None, batch_size, progress).perplexity


def calibration_error(confidence: torch.Tensor, hit: torch.Tensor, bins: int = 15) -> float:
    """sum over bins of n_b / n * |mean(hit) - mean(confidence)|, in bins of equal width.

    confidence [n] in [0, 1]; hit bool [n]. Bin b holds confidences in (b / bins, (b + 1) / bins],
    and bin 0 also those of 0 (Guo et al. 2017, section 2, with 15 bins). NaN if a confidence is.
    Raises ValueError for nothing to average.
    """
    if confidence.shape != hit.shape or confidence.dim() != 1 or len(hit) == 0:
        raise ValueError(
            f"confidence and hit must be [n >= 1], got {list(confidence.shape)}, {list(hit.shape)}"
        )
    if confidence.isnan().any():
        return math.nan
    confidence = confidence.double()
    bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, hit.double() - confidence)
    return gaps.abs().sum().item() / len(hit)


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


@torch.no_grad()
def rounding_bound(model: nn.Module, windows: torch.Tensor) -> tuple[float, float]:
    """(bound, largest |logit|): how far rounding may take the logits of two equal models apart.

    One rounding of the running sum per sublayer and linear, added up in the worst direction: eps *
    layers * linears per layer * largest |logit|.
    """
    with evaluating(model):
        largest = float(token_logits(model, windows).abs().max())
    layers = layers_of(hf_model(model))
    roundings = len(layers) * len(layers[0].family.linears)
    return torch.finfo(hf_model(model).dtype).eps * roundings * largest, largest


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
