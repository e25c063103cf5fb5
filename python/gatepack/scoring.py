"""Stage 4, methods: multiple-choice questions, scored by what a model finds likeliest."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gatepack.data import json_lines, read_text
from gatepack.layers import hf_model
from gatepack.quality import (
    calibration_error,
    evaluating,
    forward_arguments,
    input_device,
    token_scores,
)
from gatepack.texts import start_token

TEMPLATE = "Question: {question}\nAnswer:"
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Question:
    """prompt: what precedes a choice, template filled in. answer: index into choices."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    def texts(self) -> list[str]:
        """prompt + choice, with a space between them unless either side has white space there."""
        spaced = self.prompt[-1:].isspace()
        return [
            f"{self.prompt}{'' if spaced or choice[0].isspace() else ' '}{choice}"
            for choice in self.choices
        ]


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + choice, one row per choice, and how many they share as context.

    context: leading tokens that are not scored, the same for every choice. truncated: tokens
    dropped from the left because the model has no positions for them.
    """

    rows: list[list[int]]
    context: int
    truncated: int = 0


@dataclass(frozen=True)
class ChoiceScores:
    """log_p: one fp64 [choices] per question, log p(choice | prompt) summed over its tokens.

    truncated: questions that lost tokens on the left.
    """

    questions: tuple[Question, ...]
    log_p: tuple[torch.Tensor, ...]
    truncated: int

    def hits(self, per_byte: bool = False) -> torch.Tensor:
        """Whether the best choice is the answer, bool [questions]; the first of equals is best.

        per_byte: log p is divided by the UTF-8 bytes of the choice, so that length does not count.
        """
        return torch.tensor(
            [
                not log_p.isnan().any() and self._best(question, log_p, per_byte)
                for question, log_p in zip(self.questions, self.log_p, strict=True)
            ]
        )

    @staticmethod
    def _best(question: Question, log_p: torch.Tensor, per_byte: bool) -> bool:
        if per_byte:
            log_p = log_p / torch.tensor([len(choice.encode()) for choice in question.choices])
        return int(log_p.argmax()) == question.answer

    @property
    def calibration_error(self) -> float:
        """Of the highest of softmax(log p) over a question's choices, in 15 bins of equal width."""
        confidence = torch.stack([log_p.softmax(0).max() for log_p in self.log_p])
        return calibration_error(confidence, self.hits())

    @property
    def chance(self) -> float:
        """Accuracy that guessing would have on average."""
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)


def load_questions(path: Path) -> list[Question]:
    """Questions of a .jsonl file: {"question" or "prompt", "choices": [...], "answer"} per line.

    A "prompt" is used as it stands; a "question" becomes "Question: ...\\nAnswer:". answer is the
    index of the right choice, from 0, or its letter, from "A". Other fields are ignored and blank
    lines skipped. Raises ValueError naming file and line for anything else, and for an empty file.
    """
    path = Path(path)
    questions = [_question(*line) for line in json_lines(path, read_text(path))]
    if not questions:
        raise ValueError(f"{path} is empty")
    return questions


def encode_question(question: Question, tokenizer, positions: int | None = None) -> Encoded:
    """Token ids of prompt + choice, encoded together, with the boundary between the two.

    Encoding the two apart would give tokens that the model never sees where a token spans the
    boundary. The context is what all choices and the prompt alone share from the left: a token that
    spans the boundary is scored with the choice, and for every choice from the same place on, so
    that the sums stay comparable. A tokenizer that opens its texts with a bos token does so here,
    and where no token is shared a bos (or eos) token is the context. positions: rows longer than
    this lose context on the left, equally many tokens for each choice. Raises ValueError if a
    choice adds no token or does not fit.
    """
    texts = [question.prompt, *question.texts()]
    prompt, *rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    context = min(_shared(prompt, row) for row in rows)
    for choice, row in zip(question.choices, rows, strict=True):
        if len(row) == context:
            raise ValueError(f"the choice {choice!r} adds no token to its prompt")
    opening = [start_token(tokenizer)] if context == 0 or _opens(tokenizer) else []
    if opening == [None]:
        raise ValueError(f"the prompt {question.prompt!r} gives no token to predict a choice from")
    excess = 0
    if positions is not None:
        excess = max(0, len(opening) + max(map(len, rows)) - positions)
    if excess and excess >= len(opening) + context:
        raise ValueError(f"a choice is longer than the model's {positions} positions")
    rows = [opening + row[excess:] for row in rows]
    return Encoded(rows, len(opening) + context - excess, excess)


def score_questions(
    model: nn.Module,
    tokenizer,
    questions: Sequence[Question],
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> ChoiceScores:
    """log p(choice | prompt) of every choice, by a causal language model.

    A prompt runs once for all its choices, which continue its key/value cache; without a cache that
    can be copied, each choice runs with its prompt. The scores are those of one forward per choice
    up to rounding. batch_size: choices per forward, at most, padded on the right, where a causal
    model does not look. progress is called with the number of choices done. Raises ValueError as
    encode_question does, naming the question, and for batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    positions = getattr(hf_model(model).config, "max_position_embeddings", None)
    encoded = []
    for number, question in enumerate(questions, 1):
        try:
            encoded.append(encode_question(question, tokenizer, positions))
        except ValueError as error:
            raise ValueError(f"question {number}: {error}") from error
    found = []
    done = 0
    with evaluating(model):
        for each in encoded:
            prompt = _prompt(model, each.rows[0][: each.context])
            parts = []
            for start in range(0, len(each.rows), batch_size):
                rows = each.rows[start : start + batch_size]
                if prompt is None:
                    parts.append(_log_p(model, rows, each.context))
                else:
                    parts.append(_continued(model, prompt, [row[each.context :] for row in rows]))
                done += len(rows)
                if progress is not None:
                    progress(done)
            found.append(torch.cat(parts))
    return ChoiceScores(tuple(questions), tuple(found), sum(each.truncated > 0 for each in encoded))


def wilson_interval(hits: int, count: int, z: float = _Z95) -> tuple[float, float]:
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n): where the true rate lies, at 95 %.

    p = hits / count (Wilson 1927). Unlike the normal interval it stays in [0, 1] and is not empty
    for 0 or all hits. Raises ValueError for count < 1.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"hits must lie in 0..count with count >= 1, got {hits} of {count}")
    p, spread = hits / count, z * z / count
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    low, high = ((p + spread / 2 + side * half) / (1 + spread) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def _opens(tokenizer) -> bool:
    """Whether the tokenizer itself opens a text with its bos token."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer(["a"], verbose=False)["input_ids"][0][:1] == [bos]


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens a and b have in common from the left."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))


@dataclass(frozen=True)
class _Prompt:
    """What a prompt leaves behind: its cache, and log p of the token after it, [vocabulary]."""

    cache: object
    next_token: torch.Tensor


@torch.no_grad()
def _prompt(model: nn.Module, ids: list[int]) -> _Prompt | None:
    """A prompt run once, or None for a model whose cache cannot go on for several choices."""
    accepted = forward_arguments(model)
    if not {"past_key_values", "use_cache"} <= accepted:
        return None
    last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    tokens = torch.tensor([ids], device=input_device(model))
    output = model(input_ids=tokens, use_cache=True, **last)
    cache = getattr(output, "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):
        return None
    return _Prompt(cache, output.logits[0, -1].float().log_softmax(-1))


@torch.no_grad()
def _continued(model: nn.Module, prompt: _Prompt, choices: list[list[int]]) -> torch.Tensor:
    """log p of each choice after the prompt, fp64 [choices]."""
    device = prompt.next_token.device
    log_p = prompt.next_token[torch.tensor([c[0] for c in choices], device=device)].double()
    width = max(map(len, choices)) - 1
    if width == 0:
        return log_p.cpu()
    padded = torch.tensor([c + [0] * (width + 1 - len(c)) for c in choices], device=device)
    cache = copy.deepcopy(prompt.cache)
    cache.batch_repeat_interleave(len(choices))
    ids = padded[:, :-1].to(input_device(model))
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits.to(device)
    found = logits.float().log_softmax(-1).gather(-1, padded[:, 1:, None]).squeeze(-1)
    lengths = torch.tensor([len(c) - 1 for c in choices], device=device)
    scored = torch.arange(width, device=device) < lengths[:, None]
    return (log_p + found.double().masked_fill(~scored, 0.0).sum(1)).cpu()


def _log_p(model: nn.Module, rows: list[list[int]], context: int) -> torch.Tensor:
    """Sum of log p of each row's tokens from context on, fp64 [rows]."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(width)
    scored = (places >= context) & (places < lengths)
    nats = token_scores(model, ids, scored, len(rows)).nats
    return -torch.stack([part.sum() for part in nats.split(scored.sum(1).tolist())])


def _question(where: str, record) -> Question:
    if not isinstance(record, dict) or not {"question", "prompt"} & record.keys():
        raise ValueError(f"{where} must be an object with a field `question` or `prompt`")
    field = "prompt" if "prompt" in record else "question"
    prompt, choices = record[field], record.get("choices")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: `{field}` must be a string with text, got {prompt!r}")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{where}: `choices` must be a list of 2 strings or more, got {choices!r}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{where}: every choice must be a string with text, got {choice!r}")
    if field == "question":
        prompt = TEMPLATE.format(question=prompt)
    return Question(prompt, tuple(choices), _answer(record.get("answer"), len(choices), where))


def _answer(answer, count: int, where: str) -> int:
    index = answer
    if isinstance(answer, str) and len(answer.strip()) == 1:
        index = ord(answer.strip().upper()) - ord("A")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise ValueError(
            f"{where}: `answer` must be an index in 0..{count - 1} or a letter in "
            f"A..{chr(ord('A') + count - 1)}, got {answer!r}"
        )
    return index
