"""Stage 4, methods: multiple-choice questions, scored by what a model finds likeliest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gatepack.data import json_lines, read_text
from gatepack.hf import hf_model
from gatepack.quality import calibration_error, evaluating, token_scores
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

    Choices of similar length share a forward, padded on the right, where a causal model does not
    look; the scores are those of one forward per choice up to rounding. progress is called with the
    number of choices done. Raises ValueError as encode_question does, naming the question, and for
    batch_size < 1.
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
    jobs = [(row, each.context) for each in encoded for row in each.rows]
    log_p = torch.zeros(len(jobs), dtype=torch.float64)
    longest_first = sorted(range(len(jobs)), key=lambda job: -len(jobs[job][0]))
    done = 0
    with evaluating(model):
        for start in range(0, len(jobs), batch_size):
            batch = longest_first[start : start + batch_size]
            log_p[batch] = _log_p(model, [jobs[job] for job in batch])
            done += len(batch)
            if progress is not None:
                progress(done)
    parts = log_p.split([len(question.choices) for question in questions])
    return ChoiceScores(tuple(questions), parts, sum(each.truncated > 0 for each in encoded))


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


def _log_p(model: nn.Module, jobs: list[tuple[list[int], int]]) -> torch.Tensor:
    """Sum of log p from a row's context to its end, fp64 [rows]."""
    width = max(len(row) for row, _ in jobs)
    ids = torch.zeros(len(jobs), width, dtype=torch.int64)
    scored = torch.zeros(len(jobs), width, dtype=torch.bool)
    for place, (row, context) in enumerate(jobs):
        ids[place, : len(row)] = torch.tensor(row)
        scored[place, context : len(row)] = True
    nats = token_scores(model, ids, scored, len(jobs)).nats
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
