"""Stage 4, methods: perplexity, bits per byte and calibration of a model on running text."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gatepack.data import separator_token
from gatepack.layers import hf_model
from gatepack.quality import TokenScores, token_scores, vocabulary_size


@dataclass(frozen=True)
class TextScore:
    """One text's scores. bytes and sha256: of the UTF-8 text that was scored, not of its file."""

    scores: TokenScores
    bytes: int
    sha256: str

    @property
    def bits_per_byte(self) -> float:
        """sum over tokens of -log2 p(token) / UTF-8 bytes of the text."""
        return self.scores.nats.sum().item() / math.log(2) / self.bytes

    def metrics(self) -> dict[str, float]:
        return {
            "perplexity": self.scores.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "calibration_error": self.scores.calibration_error,
        }

    @classmethod
    def joined(cls, parts: Sequence["TextScore"]) -> "TextScore":
        digest = sha256_of(part.sha256 for part in parts)
        scores = TokenScores.joined([part.scores for part in parts])
        return cls(scores, sum(part.bytes for part in parts), digest)


def score_text(
    model: nn.Module,
    tokenizer,
    documents: Sequence[str],
    *,
    length: int = 512,
    stride: int | None = None,
    windows: int = 0,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> TextScore:
    """-log p of every token of the documents, given those before it in a strided window.

    The documents follow each other, a bos (else eos, else sep) token before the first and an eos
    (else sep) token between them; these are context and never scored. Windows of length tokens
    begin stride tokens apart and each scores what the one before did not, so that every token is
    scored once, with at least length - stride tokens before it unless the text begins there. The
    last window ends with the text. windows: at most so many; the document in which they end is cut
    so that its tokens fit, and only the text before the cut counts as scored. Every byte of it
    counts, so bits per byte are comparable between tokenizers wherever the text is the same
    (windows=0). Without any special token the first token is not scored, but its bytes count.
    progress is called with (windows done, of how many). Raises ValueError for a text without two
    tokens, token ids that the model has no embedding for, or windows longer than its positions.
    """
    ids, scored, documents = windows_of(model, tokenizer, documents, length, stride, windows)
    tell = None if progress is None else lambda done: progress(done, len(ids))
    scores = token_scores(model, ids, scored, batch_size, tell)
    size = sum(len(document.encode()) for document in documents)
    return TextScore(scores, size, sha256_of(documents))


def windows_of(
    model: nn.Module,
    tokenizer,
    documents: Sequence[str],
    length: int,
    stride: int | None,
    windows: int,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(token ids [n, length], which of them are scored, the documents as cut), as of score_text."""
    stride = check_windows(length, stride, windows)
    check_length(model, length, "length")
    most = length + (windows - 1) * stride if windows else None
    stream = _stream(documents, tokenizer, most)
    if max(stream.ids) >= vocabulary_size(model):
        raise ValueError(
            f"the tokenizer gives token {max(stream.ids)}, the model has embeddings for "
            f"{vocabulary_size(model)}: they do not belong together"
        )
    return *_strided(stream, length, stride), stream.documents


def check_length(model: nn.Module, length: int, name: str) -> None:
    """ValueError, with the name of the setting, for more tokens than a model has positions."""
    positions = getattr(hf_model(model).config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"{name} is {length} tokens, the model has {positions} positions")


@dataclass
class _Stream:
    """Tokens of a text and its special tokens, which of them are text, and the text itself."""

    ids: list[int]
    is_text: list[bool]
    documents: list[str]

    def add(self, tokens: Sequence[int], is_text: bool) -> None:
        self.ids += tokens
        self.is_text += [is_text] * len(tokens)


def _stream(documents: Sequence[str], tokenizer, most: int | None) -> _Stream:
    def encode(text: str) -> list[int]:
        return tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]

    opening, separator = start_token(tokenizer), separator_token(tokenizer)
    stream = _Stream([], [], [])
    for document in documents:
        special = separator if stream.documents else opening
        before = [] if special is None else [special]
        tokens = encode(document)
        cut = most is not None and len(stream.ids) + len(before) + len(tokens) > most
        if cut:
            document, tokens = _cut(document, encode, most - len(stream.ids) - len(before))
        if tokens:
            stream.add(before, False)
            stream.add(tokens, True)
            stream.documents.append(document)
        if cut:
            break
    if not any(stream.is_text[1:]):
        raise ValueError(f"a text needs a token to predict, this one has {len(stream.ids)} in all")
    return stream


def _cut(document: str, encode, room: int) -> tuple[str, list[int]]:
    """A start of a document whose own tokens fit into room; with a character more they do not.

    Found by bisection, so that any tokenizer will do.
    """
    fits, too_long = 0, len(document)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(encode(document[:middle])) <= room:
            fits = middle
        else:
            too_long = middle
    return document[:fits], encode(document[:fits]) if fits else []


def _strided(stream: _Stream, length: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(windows, which of their tokens are scored), [n, length]; shorter for a shorter text."""
    ids, is_text = torch.tensor(stream.ids), torch.tensor(stream.is_text)
    length = min(length, len(ids))
    starts = [*range(0, len(ids) - length, stride), len(ids) - length]
    windows = torch.stack([ids[start : start + length] for start in starts])
    scored = torch.stack([is_text[start : start + length] for start in starts])
    scored[0, 0] = False
    for row, (before, start) in enumerate(zip(starts, starts[1:], strict=False), 1):
        scored[row, : before + length - start] = False
    return windows, scored


def check_windows(length: int, stride: int | None, windows: int) -> int:
    """The stride in use, length // 2 for None; ValueError if the three do not go together."""
    if length < 2:
        raise ValueError(f"length must be >= 2 tokens, got {length}")
    used = length // 2 if stride is None else stride
    if not 1 <= used < length:
        raise ValueError(
            f"stride must lie in 1..{length - 1}, below length so that every token has context, "
            f"got {stride}"
        )
    if windows < 0:
        raise ValueError(f"windows must be >= 0 (0 for all), got {windows}")
    return used


def start_token(tokenizer) -> int | None:
    """What stands before the first token of a text: bos, else eos, else sep, else nothing."""
    names = ("bos_token_id", "eos_token_id", "sep_token_id")
    tokens = [getattr(tokenizer, name, None) for name in names]
    return next((token for token in tokens if token is not None), None)


def sha256_of(parts: Iterable[str]) -> str:
    """SHA-256 of texts in their order, with a NUL between them."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
