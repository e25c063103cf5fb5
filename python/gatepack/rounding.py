"""Stage 4, methods: whether two models that should compute the same do, as far as rounding lets
them.

How much rounding matters is the model's own: one that was cut badly may multiply it by thousands.
So where logits are further apart than in any sound model, they are compared with what happens to
the model's own logits when the inputs of its linears are rounded.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gatepack.quality import ParityError, evaluating, rounding_bound, token_logits

# How much more another program's rounding may do than as much of it does in torch. On
# SmolLM2-135M, whole and cut to a perplexity of 27,000, llama.cpp takes 0.87 to 1.09 times as much.
LEEWAY = 4.0
# Quantiles over tokens: in a model that rounding tells on, single tokens may go anywhere.
_LEVELS = (0.5, 0.9)
Roundings = Mapping[nn.Module, Callable[[torch.Tensor], torch.Tensor]]


def compare(model: nn.Module, other: nn.Module, windows: torch.Tensor, what: str) -> dict:
    """Figures of the two models' logits on windows [n, length]; ParityError past rounding.

    Rounding explains rounding_bound for all tokens or else, by refuse_beyond, what a unit in the
    last place of the inputs of the model's linears does. what: the other model, for the message.
    """
    found = Apart.of(logits_by_window(model, windows), logits_by_window(other, windows), windows)
    roundings = dict.fromkeys(linears_of(model), last_place)
    return judge(found, model, windows, lambda: rounding_effect(model, windows, roundings), what)


def judge(
    found: "Apart",
    model: nn.Module,
    windows: torch.Tensor,
    effect: Callable[[], "Apart"],
    what: str,
) -> dict:
    """compare's figures of logits that are there; effect() is of the other's rounding."""
    bound, largest = rounding_bound(model, windows[:1])
    figures = {"max_abs_difference": found.largest, "bound": bound, "largest_logit": largest}
    if not found.largest <= bound:
        figures["rounding"] = refuse_beyond(found, effect(), what)
    return figures


@dataclass(frozen=True)
class Apart:
    """How far two models' answers to the same windows [n, length] are apart, token by token.

    logits: max |difference| over the vocabulary, fp64 [n * length]. nats: difference of -log p of
    the next token, fp64 [n * (length - 1)].
    """

    logits: torch.Tensor
    nats: torch.Tensor

    @classmethod
    def of(cls, ours: Iterable, theirs: Iterable, windows: torch.Tensor) -> "Apart":
        """ours, theirs: logits [length, vocabulary] of each window, on the CPU."""
        logits, nats = [], []
        for row, left, right in zip(windows.cpu(), ours, theirs, strict=True):
            if left.shape != right.shape:
                raise ValueError(
                    f"the models' logits differ in shape: {tuple(left.shape)}, {tuple(right.shape)}"
                )
            logits.append((left.double() - right.double()).abs().amax(-1))
            both = (
                cross_entropy(each[:-1].float(), row[1:].long(), reduction="none").double()
                for each in (left, right)
            )
            nats.append(next(both) - next(both))
        return cls(torch.cat(logits), torch.cat(nats))

    @property
    def largest(self) -> float:
        return self.logits.max().item()


@torch.no_grad()
def logits_by_window(model: nn.Module, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits [length, vocabulary] of one window after another, in eval mode, on the CPU."""
    for ids in windows.split(1):
        with evaluating(model):
            logits = token_logits(model, ids)[0].cpu()
        yield logits


def linears_of(model: nn.Module) -> list[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


def last_place(x: torch.Tensor) -> torch.Tensor:
    """x, a third of it a unit in the last place higher and a third lower, always the same."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-1, 2, x.shape, generator=generator).to(x)
    return x * (1 + torch.finfo(x.dtype).eps * steps)


def rounding_effect(model: nn.Module, windows: torch.Tensor, roundings: Roundings) -> Apart:
    """How far a model's logits move where its modules get rounding(input)."""

    def rounded() -> Iterator[torch.Tensor]:
        for ids in windows.split(1):
            with rounding_inputs(roundings):
                logits = next(logits_by_window(model, ids))
            yield logits

    return Apart.of(logits_by_window(model, windows), rounded(), windows)


@contextlib.contextmanager
def rounding_inputs(roundings: Roundings) -> Iterator[None]:
    """Modules get rounding(input) in the place of their first input meanwhile."""
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, rounding=rounding: (rounding(args[0]), *args[1:])
        )
        for module, rounding in roundings.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_beyond(found: Apart, effect: Apart, what: str) -> dict:
    """ParityError if logits are further apart than rounding, whose effect it is, explains.

    Returns the median and the 90th percentile over tokens of both.
    """
    levels = torch.tensor(_LEVELS, dtype=torch.float64)
    figures = {
        "levels": list(_LEVELS),
        "found": found.logits.quantile(levels).tolist(),
        "rounding": effect.logits.quantile(levels).tolist(),
    }
    for level, mine, other in zip(*figures.values(), strict=True):
        if not mine <= LEEWAY * other:
            raise ParityError(
                f"{what} gives logits that differ from the model's by {mine:.3g} where rounding "
                f"alone makes {other:.3g} (the {level:.0%} quantile over tokens)"
            )
    return figures
