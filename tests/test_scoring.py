"""Multiple choice: files, the boundary between prompt and choice, scores, and the interval."""

import json
import math

import pytest
import torch
from letters import LETTERS, ids_of, letter_tokenizer, merging_tokenizer
from tiny import tiny_model

from gatepack import scoring
from gatepack.scoring import (
    ChoiceScores,
    Question,
    encode_question,
    load_questions,
    score_questions,
    wilson_interval,
)

QUESTIONS = [
    Question("Which is open?", ("a gate", "the closed one", "x"), 0),
    Question("Short: ", ("yes", "no"), 1),
    Question("A much longer prompt that needs padding.", (" left", "right", "up", "down"), 2),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", torch.float32).eval()


@torch.no_grad()
def log_p_alone(model, context, rest):
    """log p(rest | context), from one forward without padding."""
    logits = model(input_ids=torch.tensor([context + rest])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(rest))


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_files_have_questions_or_prompts_and_indices_or_letters(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"question": "Open?", "choices": ["yes", "no"], "answer": 1, "id": "more"},
        "",
        {"prompt": "Open? ", "choices": ["a", "b", "c"], "answer": "c"},
        "\u2028".join(['{"prompt": "p', 'q", "choices": ["a", "b"], "answer": "A"}']),
    )
    assert load_questions(path) == [
        Question("Question: Open?\nAnswer:", ("yes", "no"), 1),
        Question("Open? ", ("a", "b", "c"), 2),
        Question("p\u2028q", ("a", "b"), 0),
    ]


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must be an object with a field `question` or `prompt`"),
        ({**GOOD, "prompt": " "}, "line 2: `prompt` must be a string with text, got ' '"),
        ({**GOOD, "choices": ["a"]}, "line 2: `choices` must be a list of 2 strings or more"),
        ({**GOOD, "choices": "ab"}, "line 2: `choices` must be a list"),
        ({**GOOD, "choices": ["a", ""]}, "line 2: every choice must be a string with text, got ''"),
        ({**GOOD, "choices": ["a", 3]}, "line 2: every choice must be a string with text, got 3"),
        ({**GOOD, "answer": 2}, r"line 2: `answer` must be an index in 0..1 or a letter in A..B"),
        ({**GOOD, "answer": -1}, "line 2: `answer` .* got -1"),
        ({**GOOD, "answer": True}, "line 2: `answer` .* got True"),
        ({**GOOD, "answer": "C"}, "line 2: `answer` .* got 'C'"),
        ({**GOOD, "answer": "a or b"}, "line 2: `answer` .* got 'a or b'"),
        ({"prompt": "p", "choices": ["a", "b"]}, "line 2: `answer` .* got None"),
        (
            '{"prompt": "\\ud800", "choices": ["a", "b"], "answer": 0}',
            "line 2 is not JSON: a lone surrogate",
        ),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"q.jsonl {message}"):
        load_questions(write(tmp_path / "q.jsonl", GOOD, line))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "q.jsonl is empty"), (b"\n \n", "is empty"), (b'{"a\xff', "is not UTF-8: byte 3")],
)
def test_file_without_questions_is_named(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match="none.jsonl cannot be read"):
        load_questions(tmp_path / "none.jsonl")


def test_one_space_parts_prompt_and_choice():
    assert Question("p:", ("a", " b"), 0).texts() == ["p: a", "p: b"]
    assert Question("p:\n", ("a", " b"), 0).texts() == ["p:\na", "p:\n b"]


def test_boundary_lies_behind_the_prompt():
    encoded = encode_question(QUESTIONS[0], letter_tokenizer())
    assert encoded.context == len("Which is open?")
    assert encoded.rows == [ids_of(text) for text in QUESTIONS[0].texts()]


def test_token_across_the_boundary_is_scored_for_every_choice(model):
    tokenizer = merging_tokenizer((" ", "y"))
    letters = tokenizer.get_vocab()
    # "x " alone is [x, space]; with "y" the space becomes part of " y".
    question = Question("x ", ("y", "z"), 0)
    encoded = encode_question(question, tokenizer)
    assert encoded.rows == [
        [letters["x"], letters[" y"]],
        [letters["x"], letters[" "], letters["z"]],
    ]
    assert encoded.context == 1
    scores = score_questions(model, tokenizer, [question]).log_p[0].tolist()
    expected = [log_p_alone(model, row[:1], row[1:]) for row in encoded.rows]
    assert scores == pytest.approx(expected, rel=1e-5)


def test_bos_opens_where_the_tokenizer_does_so_or_nothing_is_shared():
    bos = LETTERS.index("<bos>")
    opens = letter_tokenizer(bos=True, opens=True)
    assert encode_question(QUESTIONS[1], opens).rows[0] == [bos, *ids_of("Short: yes")]
    assert encode_question(QUESTIONS[1], opens).context == 1 + len("Short: ")
    silent = letter_tokenizer(bos=True)
    assert encode_question(QUESTIONS[1], silent).rows[0] == ids_of("Short: yes")
    merged = Question(" ", ("y", "z"), 0)
    encoded = encode_question(merged, merging_tokenizer((" ", "y")))
    assert (encoded.context, encoded.rows[0][0], len(encoded.rows[0])) == (1, 0, 2)


def test_long_prompt_loses_its_beginning_for_every_choice_alike():
    tokenizer = letter_tokenizer(bos=True, opens=True)
    question = Question("0123456789", ("a", "bcd"), 0)
    encoded = encode_question(question, tokenizer, positions=9)
    bos = LETTERS.index("<bos>")
    assert encoded.rows == [[bos, *ids_of("6789 a")], [bos, *ids_of("6789 bcd")]]
    assert (encoded.context, encoded.truncated) == (5, 6)
    assert encode_question(question, tokenizer, positions=15).truncated == 0
    assert encode_question(question, tokenizer, positions=5).context == 1
    with pytest.raises(ValueError, match="a choice is longer than the model's 4 positions"):
        encode_question(question, tokenizer, positions=4)
    with pytest.raises(ValueError, match="longer than the model's 4 positions"):
        encode_question(question, letter_tokenizer(), positions=4)
    assert encode_question(question, letter_tokenizer(), positions=5).context == 1


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_batches_give_what_one_forward_per_choice_gives(model, batch_size, cached, monkeypatch):
    if not cached:
        monkeypatch.setattr(scoring, "_prompt", lambda model, ids: None)
    done = []
    scores = score_questions(model, letter_tokenizer(), QUESTIONS, batch_size, done.append)
    for question, log_p in zip(QUESTIONS, scores.log_p, strict=True):
        context = ids_of(question.prompt)
        expected = [
            log_p_alone(model, context, ids_of(text)[len(context) :]) for text in question.texts()
        ]
        assert log_p.tolist() == pytest.approx(expected, rel=1e-5)
    assert done[-1] == 9 and scores.truncated == 0


def test_prompt_runs_once_for_all_its_choices(model):
    widths = []
    with model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    ):
        score_questions(model, letter_tokenizer(), QUESTIONS[1:])
    # " left" and " right" (a space before it) share the prompt; the last letter predicts nothing.
    assert [tuple(shape) for shape in widths] == [(1, 7), (2, 2), (1, 40), (4, 5)]


def test_model_without_a_cache_runs_each_choice_with_its_prompt(model):
    class Bare(torch.nn.Module):
        """A model as a plain forward, which knows no cache."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids, use_cache=False)

    bare = score_questions(Bare(model), letter_tokenizer(), QUESTIONS).log_p
    for found, expected in zip(
        bare, score_questions(model, letter_tokenizer(), QUESTIONS).log_p, strict=True
    ):
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_best_choice_is_raw_or_per_byte():
    questions = (
        Question("p", ("aaaa", "b"), 0),
        Question("p", ("a", "bb"), 1),
        Question("p", ("\u20ac", "bb"), 0),
    )
    log_p = tuple(
        torch.tensor(each, dtype=torch.float64)
        for each in ([-4.0, -2.0], [-1.0, -3.0], [-2.0, -1.5])
    )
    scores = ChoiceScores(questions, log_p, 0)
    assert scores.hits().tolist() == [False, False, False]
    # -1 against -2 per byte; -1 against -1.5; -2/3 against -0.75.
    assert scores.hits(per_byte=True).tolist() == [True, False, True]
    assert scores.chance == 0.5
    # softmax of two is a logistic of the difference: 0.88, 0.88, 0.62, each wrong.
    sure = [1 / (1 + math.exp(-gap)) for gap in (2.0, 2.0, 0.5)]
    assert scores.calibration_error == pytest.approx(sum(sure) / 3)


def test_nan_is_no_hit():
    nan = (torch.tensor([math.nan, -1.0], dtype=torch.float64),)
    scores = ChoiceScores((Question("p", ("a", "b"), 0),), nan, 0)
    assert scores.hits().tolist() == [False]
    assert math.isnan(scores.calibration_error)


def test_choice_without_tokens_is_named_with_its_question(model):
    class Deaf:
        bos_token_id = eos_token_id = sep_token_id = None

        def __call__(self, texts, add_special_tokens, verbose):
            return {"input_ids": [[7, 8] for _ in texts]}

    with pytest.raises(ValueError, match="question 1: the choice 'yes' adds no token"):
        score_questions(model, Deaf(), [QUESTIONS[1]])


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Published examples: Newcombe 1998 table I (81/263, 15/148, 0/20, 1/29), method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(hits, count, low, high):
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(count - hits, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("hits", "count"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(hits, count):
    with pytest.raises(ValueError, match="hits must lie in 0..count"):
        wilson_interval(hits, count)
