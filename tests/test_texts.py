"""Strided windows, bits per byte and what of a text is scored, against scoring token by token."""

import hashlib
import math

import pytest
import torch
from letters import BOS, EOS, LETTERS, ids_of, letter_tokenizer, merging_tokenizer
from tiny import VOCAB, tiny_model

from gatepack.texts import TextScore, score_text, sha256_of

DOCUMENTS = ["Gates open and close.", "What stays\nopen is packed.", "Short."]
STREAM = [0, *ids_of(DOCUMENTS[0]), 0, *ids_of(DOCUMENTS[1]), 0, *ids_of(DOCUMENTS[2])]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", torch.float32).eval()


@torch.no_grad()
def nats_one_by_one(model, ids, length, stride, special=(0, 1)):
    """-log p of each token that is not special, each from a forward of its own."""
    found = []
    for i in range(1, len(ids)):
        # The first window that reaches token i, moved left if it would run past the end.
        window = max(0, math.ceil((i + 1 - length) / stride))
        start = max(0, min(window * stride, len(ids) - length))
        if ids[i] not in special:
            logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1].double()
            found.append(-float(logits.log_softmax(0)[ids[i]]))
    return found


@pytest.mark.parametrize(
    ("length", "stride"), [(8, 4), (8, 7), (8, 1), (9, 4), (10, 3), (len(STREAM), 5), (200, 100)]
)
def test_every_token_is_scored_once_from_its_window(model, length, stride):
    score = score_text(model, letter_tokenizer(), DOCUMENTS, length=length, stride=stride)
    expected = nats_one_by_one(model, STREAM, length, stride)
    assert score.scores.nats.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-5)
    size = sum(len(document) for document in DOCUMENTS)
    assert len(expected) == score.bytes == size
    assert score.metrics()["perplexity"] == pytest.approx(math.exp(sum(expected) / size), rel=1e-5)
    bits = sum(expected) / math.log(2) / size
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert score.sha256 == hashlib.sha256("\0".join(DOCUMENTS).encode()).hexdigest()


def test_stride_is_half_a_window_by_default_and_batches_change_nothing(model):
    half = score_text(model, letter_tokenizer(), DOCUMENTS, length=8, stride=4, batch_size=1)
    default = score_text(model, letter_tokenizer(), DOCUMENTS, length=8, batch_size=5)
    torch.testing.assert_close(half.scores.nats, default.scores.nats)


def test_bits_count_bytes_and_do_not_depend_on_the_tokenizer():
    """A model that finds all tokens equally likely needs log2(vocabulary) bits for each."""
    model = tiny_model("llama", torch.float32)
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "she is there"
    for tokenizer, tokens in (
        (letter_tokenizer(), 12),
        (merging_tokenizer(("h", "e"), ("s", "he")), 9),
    ):
        score = score_text(model, tokenizer, [text], length=64)
        assert (len(score.scores.nats), score.bytes) == (tokens, 12)
        assert score.bits_per_byte == pytest.approx(tokens * math.log2(VOCAB) / 12, rel=1e-6)
        assert score.scores.perplexity == pytest.approx(VOCAB, rel=1e-5)
    # One unknown character of 3 bytes is one token.
    score = score_text(model, letter_tokenizer(), ["a\u20ac"], length=64)
    assert score.bits_per_byte == pytest.approx(2 * math.log2(VOCAB) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [
        (letter_tokenizer(bos=True), [LETTERS.index(BOS), *ids_of("ab"), 0, *ids_of("cd")]),
        (letter_tokenizer(), [LETTERS.index(EOS), *ids_of("ab"), 0, *ids_of("cd")]),
        (letter_tokenizer(eos=False), ids_of("abcd")),
    ],
)
def test_special_tokens_open_and_part_the_documents(model, tokenizer, ids):
    score = score_text(model, tokenizer, ["ab", "cd"], length=16)
    assert score.scores.nats.tolist() == pytest.approx(nats_one_by_one(model, ids, 16, 8), rel=2e-5)
    assert score.bytes == 4


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_allowed_windows_cut_the_text_and_its_bytes(model, windows):
    most = 8 + (windows - 1) * 4
    score = score_text(model, letter_tokenizer(), DOCUMENTS, length=8, windows=windows)
    expected = nats_one_by_one(model, STREAM[:most], 8, 4)
    assert score.scores.nats.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert score.bytes == len(expected)
    rest, cut = most - 1, []
    for document in DOCUMENTS:
        cut += [document[:rest]] if rest > 0 else []
        rest -= len(document) + 1
    assert score.sha256 == sha256_of(cut)


def test_text_is_cut_where_its_own_tokens_fit(model):
    tokenizer = merging_tokenizer(("a", "b"), ("ab", "ab"))
    text = "ab" * 50
    score = score_text(model, tokenizer, [text], length=6, windows=1)
    # Room for 5 tokens beside <eos>: "abab" four times, and "ab".
    assert (score.bytes, score.sha256) == (18, sha256_of([text[:18]]))
    assert len(score.scores.nats) == len(tokenizer([text[:18]])["input_ids"][0]) == 5
    assert len(tokenizer([text[:19]])["input_ids"][0]) == 6


def test_more_windows_than_the_text_has_are_no_limit(model):
    some = score_text(model, letter_tokenizer(), DOCUMENTS, length=8, windows=1000)
    whole = score_text(model, letter_tokenizer(), DOCUMENTS, length=8)
    assert some.sha256 == whole.sha256 and torch.equal(some.scores.nats, whole.scores.nats)


def test_joined_texts_weigh_by_tokens_and_bytes(model):
    parts = [score_text(model, letter_tokenizer(), [each], length=8) for each in DOCUMENTS]
    joined = TextScore.joined(parts)
    nats = [nat for part in parts for nat in part.scores.nats.tolist()]
    assert joined.scores.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)))
    assert joined.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / joined.bytes)
    assert joined.bytes == sum(part.bytes for part in parts)
    assert joined.sha256 == sha256_of(part.sha256 for part in parts)


def test_progress_counts_windows(model):
    seen = []
    score_text(
        model,
        letter_tokenizer(),
        DOCUMENTS,
        length=8,
        windows=5,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("documents", "tokenizer", "options", "message"),
    [
        (["a"], letter_tokenizer(eos=False), {}, "needs a token to predict, this one has 1 in all"),
        (["ab"], letter_tokenizer(), {"length": 1}, "length must be >= 2 tokens, got 1"),
        (["ab"], letter_tokenizer(), {"length": 8, "stride": 8}, r"stride must lie in 1..7.*got 8"),
        (["ab"], letter_tokenizer(), {"length": 8, "stride": 0}, r"stride must lie in 1..7.*got 0"),
        (["ab"], letter_tokenizer(), {"windows": -1}, "windows must be >= 0"),
        (["ab"], letter_tokenizer(), {"length": 4096}, "length is 4096 tokens, the model has 2048"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, documents, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        score_text(model, tokenizer, documents, **options)


def test_tokenizer_of_another_model_is_refused():
    model = tiny_model("llama", torch.float32, vocab_size=20)
    with pytest.raises(ValueError, match="gives token 6.*has embeddings for 20"):
        score_text(model, letter_tokenizer(), ["ab"], length=8)
