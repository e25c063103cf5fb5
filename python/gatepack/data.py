"""Stage 4, methods: text for fine-tuning, from files or from what every Python carries."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gatepack.files import files_in, parse_json

BLOCK_CHARACTERS = 2000
_SUFFIXES = (".txt", ".jsonl")


def load_documents(path: str | os.PathLike | None) -> list[str]:
    """Documents of a .txt or .jsonl file, or of every such file below a folder, sorted by path.

    None gives Python's own reference manual, one document per topic of pydoc_data in sorted order:
    about 110,000 tokens, which differ a little between Python versions. A .txt file is cut where
    paragraphs end into documents of at least 2,000 characters, and where lines end if a paragraph
    is longer than that, so that one file can be split too. A .jsonl file has one object with a
    string field `text` per line; blank lines and blank texts are skipped. Hidden files of a folder
    are skipped. Raises ValueError naming the file (and line) if it does not exist, has another
    suffix, holds no text, is not UTF-8 or has a bad line, and for a folder without usable files.
    """
    if path is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    return [document for file in _files(Path(path)) for document in _documents(file)]


def split_documents(documents: Sequence[str], every: int = 6) -> tuple[list[str], list[str]]:
    """(train, held out): documents 0, every, 2 * every, ... are held out, the others train.

    Raises ValueError if either part would be empty.
    """
    if every < 2:
        raise ValueError(f"every must be at least 2, got {every}: nothing is left to train on")
    if len(documents) < 2:
        raise ValueError(f"a split needs 2 documents or more, got {len(documents)}: give more text")
    train = [document for i, document in enumerate(documents) if i % every]
    return train, list(documents[::every])


def to_windows(documents: Sequence[str], tokenizer, length: int) -> torch.Tensor:
    """Token windows, int64 [n, length], of the documents joined by the tokenizer's eos token.

    No other special token is added (sep stands in for a missing eos), and the remainder of less
    than a window is dropped. Raises ValueError if there is not one whole window.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    tokens = _joined_tokens(documents, tokenizer)
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens and one window needs {length}: "
            "give more text or a smaller length"
        )
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def batches(windows: torch.Tensor, batch_size: int, steps: int, seed: int) -> torch.Tensor:
    """Which windows each training step reads, int64 [steps, batch_size].

    Every epoch visits the windows in its own random order and drops the last incomplete batch. Row
    i depends only on seed and on i's epoch, so a resumed run skips rows and reads what it would
    have read. Raises ValueError if a batch is larger than the set of windows.
    """
    if not 1 <= batch_size <= len(windows):
        raise ValueError(
            f"batch_size must lie between 1 and the number of windows ({len(windows)}), "
            f"got {batch_size}"
        )
    per_epoch = len(windows) // batch_size
    epochs = [
        np.random.default_rng((seed, epoch)).permutation(len(windows))[: per_epoch * batch_size]
        for epoch in range(-(-steps // per_epoch))
    ]
    order = np.concatenate(epochs) if epochs else np.empty(0, dtype=np.int64)
    return torch.from_numpy(order.astype(np.int64)).reshape(-1, batch_size)[:steps]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir():
        files = [file for file in files_in(path) if _usable(file.relative_to(path))]
        if not files:
            raise ValueError(f"{path} is a folder without .txt or .jsonl files")
        return files
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} must end in .txt or .jsonl")
    return [path]


def _usable(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.suffix.lower() in _SUFFIXES


def _documents(file: Path) -> list[str]:
    text = read_text(file)
    found = _texts(file, text) if file.suffix.lower() == ".jsonl" else _blocks(text)
    documents = [document for document in found if document.strip()]
    if not documents:
        raise ValueError(f"{file} is empty" if not text.strip() else f"{file} holds no text")
    return documents


def read_text(file: Path) -> str:
    """A file's text, without a byte order mark; ValueError naming the file if it is not UTF-8."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte {error.start} does not decode") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _blocks(text: str) -> Iterator[str]:
    """Cuts text where paragraphs (of long paragraphs, lines) end, into >= BLOCK_CHARACTERS each."""
    block, size = [], 0
    for piece in _pieces(text):
        block.append(piece)
        size += len(piece)
        if size >= BLOCK_CHARACTERS:
            yield "".join(block).strip("\n")
            block, size = [], 0
    yield "".join(block).strip("\n")


def _pieces(text: str) -> Iterator[str]:
    for paragraph in re.findall(r".+?(?:\n\s*\n|\Z)", text, re.DOTALL):
        if len(paragraph) <= BLOCK_CHARACTERS:
            yield paragraph
        else:
            yield from re.findall(r"[^\n]*\n|[^\n]+", paragraph)


def json_lines(file: Path, text: str) -> Iterator[tuple[str, object]]:
    """("FILE line N", its value) for each line of a .jsonl file that is not blank.

    Raises ValueError, with the same words in front, for a line that is not JSON or that holds a
    lone surrogate, which no tokenizer takes.
    """
    # Not splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                value = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            yield where, value


def _texts(file: Path, text: str) -> Iterator[str]:
    for where, record in json_lines(file, text):
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            has = f", has {', '.join(record)}" if isinstance(record, dict) else ""
            raise ValueError(f"{where} must be an object with a string field `text`{has}")
        yield document


def separator_token(tokenizer) -> int | None:
    """What stands between two texts: eos, else sep, else nothing."""
    eos = tokenizer.eos_token_id
    return tokenizer.sep_token_id if eos is None else eos


def _joined_tokens(documents: Sequence[str], tokenizer) -> list[int]:
    if not documents:
        return []
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    separator = separator_token(tokenizer)
    tokens = list(encoded[0])
    for ids in encoded[1:]:
        if separator is not None:
            tokens.append(separator)
        tokens.extend(ids)
    return tokens
