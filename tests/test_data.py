"""Documents from files, their split, token windows, and the order in which training reads them."""

import json

import pytest
import torch

from gatepack.data import (
    BLOCK_CHARACTERS,
    batches,
    load_documents,
    split_documents,
    to_windows,
)


class CharacterTokenizer:
    """One token per character, its code point."""

    def __init__(self, eos_token_id=0, sep_token_id=None):
        self.eos_token_id, self.sep_token_id = eos_token_id, sep_token_id

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_default_is_the_reference_manual_in_topic_order():
    from pydoc_data.topics import topics

    documents = load_documents(None)
    assert len(documents) == len(topics) > 50
    assert documents[0] == topics[min(topics)] and documents[-1] == topics[max(topics)]


def test_text_file_is_cut_between_paragraphs_and_loses_nothing(tmp_path):
    paragraphs = [f"{i} " + "x" * 700 for i in range(10)]
    file = write(tmp_path / "a.txt", "\n\n".join(paragraphs))
    documents = load_documents(file)
    assert [len(document.split("\n\n")) for document in documents] == [3, 3, 3, 1]
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert all(len(document) >= BLOCK_CHARACTERS for document in documents[:-1])


def test_long_paragraph_is_cut_between_lines(tmp_path):
    lines = [f"{i} " + "y" * 90 for i in range(100)]
    documents = load_documents(write(tmp_path / "a.txt", "\r\n".join(lines)))
    assert len(documents) == 5
    assert "\n".join(documents).split("\n") == lines


@pytest.mark.parametrize("content", ["  one\n\ttwo\n", "\ufeff  one\n\ttwo"])
def test_short_text_file_is_one_document_with_its_indentation(tmp_path, content):
    assert load_documents(write(tmp_path / "a.TXT", content)) == ["  one\n\ttwo"]


def test_jsonl_keeps_texts_and_skips_blanks(tmp_path):
    texts = ["first\u2028same line", "\n\nsecond", "  "]
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    file = write(tmp_path / "a.jsonl", content + "\n\n")
    assert load_documents(str(file)) == texts[:2]


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.jsonl", ".hidden/d.txt", "e.md"):
        write(tmp_path / name, json.dumps({"text": name}) if name.endswith("l") else name)
    assert load_documents(tmp_path) == ["a/c.jsonl", "a/z.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n ", "a.txt is empty"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl holds no text"),
        ("a.txt", b"fine\xff", "a.txt is not UTF-8: byte 4"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl line 2 is not JSON"),
        (
            "a.jsonl",
            b'\n{"texts": "x"}',
            "a.jsonl line 2 must be an object with a string field `text`, has texts",
        ),
        ("a.jsonl", b'{"text": 3}', "line 1 must be an object with a string field `text`"),
        ("a.jsonl", b'["text"]', "line 1 must be an object with a string field `text`"),
        ("a.jsonl", b'{"text": "ab\\ud800"}', "line 1 is not JSON: a lone surrogate"),
        ("a.csv", b"x", "must end in .txt or .jsonl"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_documents(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_path_and_folder_without_text_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.txt does not exist"):
        load_documents(tmp_path / "nothing.txt")
    write(tmp_path / "readme.md", "x")
    with pytest.raises(ValueError, match=r"is a folder without \.txt or \.jsonl files"):
        load_documents(tmp_path)


def test_split_holds_out_every_sixth():
    train, held_out = split_documents(list("abcdefghijklmn"))
    assert held_out == list("agm")
    assert train == list("bcdefhijkln")


@pytest.mark.parametrize(("documents", "every"), [([], 6), (["a"], 6), (["a", "b"], 1)])
def test_split_refuses_an_empty_part(documents, every):
    with pytest.raises(ValueError, match="at least 2|2 documents or more"):
        split_documents(documents, every)


def test_windows_join_documents_with_eos_and_drop_the_rest():
    windows = to_windows(["abc", "", "de"], CharacterTokenizer(eos_token_id=1), 3)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[97, 98, 99], [1, 1, 100]]


@pytest.mark.parametrize(("sep", "expected"), [(2, [97, 2, 98]), (None, [97, 98])])
def test_windows_without_eos_use_sep_or_nothing(sep, expected):
    tokenizer = CharacterTokenizer(eos_token_id=None, sep_token_id=sep)
    assert to_windows(["a", "b"], tokenizer, len(expected)).tolist() == [expected]


@pytest.mark.parametrize(("documents", "count"), [(["ab", "c"], 4), ([], 0)])
def test_too_few_tokens_are_counted(documents, count):
    with pytest.raises(ValueError, match=f"has {count} tokens and one window needs 5"):
        to_windows(documents, CharacterTokenizer(), 5)


def test_batches_visit_each_window_once_an_epoch():
    windows = torch.zeros(11, 4, dtype=torch.int64)
    order = batches(windows, batch_size=3, steps=8, seed=5)
    assert order.shape == (8, 3) and order.dtype == torch.int64
    for epoch in order[:6].reshape(2, 9):
        assert len(set(epoch.tolist())) == 9 and 0 <= epoch.min() and epoch.max() < 11
    assert not torch.equal(order[:3], order[3:6])


def test_batches_are_resumable_and_depend_on_the_seed():
    windows = torch.zeros(7, 4, dtype=torch.int64)
    short, long = (batches(windows, 2, steps, seed=1) for steps in (4, 9))
    assert torch.equal(short, long[:4])
    assert not torch.equal(batches(windows, 2, 9, seed=2), long)
    assert batches(windows, 2, 0, seed=1).shape == (0, 2)


@pytest.mark.parametrize("batch_size", [0, 4])
def test_batch_larger_than_the_text_is_refused(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must lie between 1 .* \(3\), got"):
        batches(torch.zeros(3, 4, dtype=torch.int64), batch_size, 1, 0)
