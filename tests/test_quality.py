"""Perplexity against its definition, logit differences against ones put in by hand."""

import copy
import math

import pytest
import torch
from tiny import VOCAB, tiny_model, token_ids

from gatepack import quality
from gatepack.quality import (
    TokenScores,
    calibration_error,
    evaluating,
    max_logit_difference,
    perplexity,
    token_scores,
)


def perplexity_by_hand(model, windows):
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0].double()
        for position, target in enumerate(window[1:]):
            exponentials = [math.exp(logit) for logit in logits[position].tolist()]
            losses.append(-math.log(exponentials[target] / sum(exponentials)))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_its_definition(batch_size):
    model = tiny_model("llama", torch.float32).eval()
    windows = token_ids(3, 7)
    expected = perplexity_by_hand(model, windows)
    assert perplexity(model, windows, batch_size) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_uniform_predictions_is_the_vocabulary():
    model = tiny_model("llama", torch.float32)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, token_ids(2, 9)) == pytest.approx(VOCAB, rel=1e-6)


@torch.no_grad()
def test_scores_are_those_of_the_tokens_asked_for():
    model = tiny_model("llama", torch.float32).eval()
    windows = token_ids(3, 7)
    scored = torch.zeros(3, 7, dtype=torch.bool)
    scored[0, 1], scored[0, 6], scored[2, 3] = True, True, True
    scores = token_scores(model, windows, scored, batch_size=2)
    p = model(input_ids=windows).logits.double().softmax(-1)
    rows = [p[0, 0], p[0, 5], p[2, 2]]
    targets = [int(windows[0, 1]), int(windows[0, 6]), int(windows[2, 3])]
    expected = [-math.log(row[target]) for row, target in zip(rows, targets, strict=True)]
    assert scores.nats.dtype == torch.float64
    assert scores.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert scores.confidence.tolist() == pytest.approx([float(row.max()) for row in rows], rel=1e-5)
    hits = [int(row.argmax()) == target for row, target in zip(rows, targets, strict=True)]
    assert scores.hit.tolist() == hits
    assert scores.perplexity == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)


@pytest.mark.parametrize(
    "scored",
    [torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9), torch.zeros(2, 8, dtype=torch.bool)],
)
def test_scored_tokens_of_another_form_are_refused(scored):
    with pytest.raises(ValueError, match=r"scored must be bool \[2, 9\] and False for each window"):
        token_scores(tiny_model("llama", torch.float32), token_ids(), scored)


def test_calibration_error_is_its_definition():
    confidence = torch.tensor([0.0, 0.1, 0.62, 0.65, 0.66, 0.95, 1.0])
    hit = torch.tensor([True, False, True, False, True, True, False])
    # Of 15 bins: 0 alone, 0.1 alone, three in (0.6, 0.667], two above 0.933.
    gaps = (1.0, 0.1, abs(2 - 1.93), abs(1 - 1.95))
    assert calibration_error(confidence, hit) == pytest.approx(sum(gaps) / 7)
    # In one bin, the signs cancel.
    assert calibration_error(confidence, hit, bins=1) == pytest.approx(abs(4 - 3.98) / 7, abs=1e-6)
    scores = TokenScores(torch.zeros(7), confidence, hit)
    assert scores.calibration_error == calibration_error(confidence, hit)


def test_calibration_error_of_nothing_or_nan():
    with pytest.raises(ValueError, match="must be \\[n >= 1\\]"):
        calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert math.isnan(calibration_error(torch.tensor([0.5, math.nan]), torch.tensor([True, False])))


def test_forwards_hold_no_more_logits_than_allowed(monkeypatch):
    model = tiny_model("llama", torch.float32)
    windows = token_ids(5, 8)
    expected = perplexity(model, windows, batch_size=5)
    rows = []
    model.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    monkeypatch.setattr(quality, "LOGITS_AT_ONCE", 2 * 8 * VOCAB)
    assert perplexity(model, windows, batch_size=5) == pytest.approx(expected, rel=1e-6)
    assert rows == [2, 2, 1]
    monkeypatch.setattr(quality, "LOGITS_AT_ONCE", 1)
    rows.clear()
    perplexity(model, windows)
    assert rows == [1] * 5


def test_progress_counts_windows():
    done = []
    perplexity(tiny_model("llama", torch.float32), token_ids(5, 4), 2, done.append)
    assert done == [2, 4, 5]


def test_evaluation_leaves_modes_and_gradients_alone():
    model = tiny_model("llama", torch.float32).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen = []
    model.register_forward_pre_hook(
        lambda module, args: seen.append(any(m.training for m in module.modules()))
    )
    perplexity(model, token_ids(1, 4))
    assert seen == [False]
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off():
    model = tiny_model("llama", torch.float32, attention_dropout=0.9).train()
    windows = token_ids(2, 9)
    assert perplexity(model, windows) == perplexity(model, windows)


def test_logit_difference_finds_the_one_that_was_put_in():
    a = tiny_model("llama", torch.float64)
    b = copy.deepcopy(a)
    assert max_logit_difference(a, b, token_ids(5, 6), batch_size=2) == 0.0
    target = token_ids(5, 6)[3, 2]

    def shift(module, args, kwargs, output):
        output.logits[..., 7] -= 0.25 * (kwargs["input_ids"] == target)

    b.register_forward_hook(shift, with_kwargs=True)
    assert max_logit_difference(a, b, token_ids(5, 6)) == pytest.approx(0.25, rel=1e-12)


def test_logit_difference_does_not_hide_nan():
    a = tiny_model("llama", torch.float32)
    b = copy.deepcopy(a)
    b.lm_head.weight.data[5, 0] = float("nan")
    assert math.isnan(max_logit_difference(a, b, token_ids(2, 4)))
    assert math.isnan(perplexity(b, token_ids(2, 4)))


def test_models_of_different_vocabulary_are_refused():
    a, b = tiny_model("llama", torch.float32), tiny_model("llama", torch.float32, vocab_size=101)
    with pytest.raises(ValueError, match="logits differ in shape"):
        max_logit_difference(a, b, token_ids(1, 4))


@pytest.mark.parametrize(
    "windows",
    [token_ids(1, 4).float(), token_ids(1, 4)[0], token_ids(1, 1), token_ids(0, 4)],
)
def test_windows_of_another_form_are_refused(windows):
    with pytest.raises(ValueError, match="windows must be integer token ids"):
        perplexity(tiny_model("llama", torch.float32), windows)


def test_batch_size_and_model_without_token_logits_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        perplexity(tiny_model("llama", torch.float32), token_ids(), batch_size=0)
    with pytest.raises(ValueError, match="gives no logits for each token"):
        perplexity(tiny_model("bert", torch.float32), token_ids())
