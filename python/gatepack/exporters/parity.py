"""Stage 6, export: that what another program loads computes what was exported."""

import math
from collections.abc import Callable

import torch
from torch import nn

from gatepack.models import without_bars
from gatepack.quality import (
    ParityError,
    evaluating,
    input_device,
    perplexity,
    token_logits,
    vocabulary_size,
)
from gatepack.rounding import LEEWAY, Apart, compare

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 5, 8, 16
# Perplexity of a file with other arithmetic (llama.cpp's, or 8-bit weights) over the model's own.
PERPLEXITY_BOUND = 1.01


def default_windows(model: nn.Module) -> torch.Tensor:
    """Random token ids [2, 32], the same each time: for models that come without a text."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_size(model), (2, 32), generator=generator)


def compare_logits(model: nn.Module, other: nn.Module, windows: torch.Tensor, what: str) -> dict:
    """Figures of the two models' logits on windows [n, length]; ParityError past rounding."""
    sample = windows[:4]
    if hasattr(other, "to"):
        other = other.to(input_device(model))
    return {
        "consumer": what,
        **compare(model, other, sample, what),
        "perplexity": {"model": perplexity(model, sample), "export": perplexity(other, sample)},
    }


def check_reloaded(source, folder, windows: torch.Tensor, **options) -> dict:
    """compare_logits with what transformers' auto class loads from a folder."""
    import transformers

    auto = auto_class(source.stock_class().__name__)
    implementation = source.config._attn_implementation
    with without_bars():
        loaded = getattr(transformers, auto).from_pretrained(
            folder, dtype=source.model.dtype, attn_implementation=implementation, **options
        )
    what = f"transformers {transformers.__version__}, {auto}"
    if auto != "AutoModelForCausalLM":
        return _compare_outputs(source.model, loaded, windows, what)
    return compare_logits(source.model, loaded, windows, what)


def auto_class(name: str) -> str:
    """LlamaForCausalLM -> AutoModelForCausalLM; GPT2LMHeadModel likewise; or ValueError."""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM"
    head = name.partition("For")[2]
    if head in ("SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering"):
        return f"AutoModelFor{head}"
    raise ValueError(f"{name} has no head that export knows: expected ...ForCausalLM or the like")


@torch.no_grad()
def _compare_outputs(model, other, windows, what: str) -> dict:
    """As compare_logits, for heads that do not give logits for each token."""
    other = other.to(input_device(model))
    sample = windows[:4].to(input_device(model))
    with evaluating(model), evaluating(other):
        ours, theirs = (each(sample)[0] for each in (model, other))
    difference = (ours.double() - theirs.double()).abs().max().item()
    if difference != 0:
        raise ParityError(f"{what} gives outputs that differ from the model's by {difference:.3g}")
    return {"consumer": what, "max_abs_difference": difference, "bound": 0.0}


def refuse_perplexity(ours: float, theirs: float, what: str, effect: Apart | None = None) -> None:
    """ParityError if two perplexities are more than 1 % apart, and further than rounding explains.

    effect: of rounding on n tokens, whose mean is uncertain by its spread / sqrt(n).
    """
    apart = abs(math.log(theirs / ours))
    allowed = math.log(PERPLEXITY_BOUND)
    if effect is not None:
        spread = effect.nats.square().mean().sqrt().item()
        allowed = max(allowed, LEEWAY * spread / math.sqrt(len(effect.nats)))
    if not apart <= allowed:
        raise ParityError(
            f"{what} has perplexity {theirs:.4g} where the model has {ours:.4g}: more than "
            f"{math.expm1(allowed):.2g} apart"
        )


def torch_logits(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits of one text, fp32 [n, vocabulary], on the CPU."""
    with torch.no_grad():
        return token_logits(model, torch.tensor([ids]))[0].float().cpu()


def prompts_of(windows: torch.Tensor) -> list[list[int]]:
    """PROMPTS pieces of the windows, spread over all of them."""
    flat = windows.reshape(-1)
    starts = torch.linspace(0, max(len(flat) - PROMPT_TOKENS, 0), PROMPTS).long().tolist()
    return [flat[start : start + PROMPT_TOKENS].tolist() for start in starts]


def greedy_tokens(
    logits_of: Callable[[list[int]], torch.Tensor], prompt: list[int], count: int
) -> list[int]:
    """The likeliest next token, count times; logits_of: ids [n] -> logits [n, vocabulary]."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(ids)[-1].argmax()))
    return ids[len(prompt) :]
