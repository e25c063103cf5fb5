"""FineGates' kurtosis weights: those of the tokens alone, however texts are padded."""

import pytest
import torch
from tiny import padded, tiny_model, token_ids

from gatepack.methods import FineGates
from gatepack.methods.fine_gates import counted_rows


def started(family):
    model = tiny_model(family, torch.float64).train()
    method = FineGates(
        noise=0.0, weighting="kurtosis", kurtosis_every=1, kurtosis_temperature=0.5, init_std=1.0
    )
    return model, method.start(model, 4)


def weights(family, inputs):
    model, training = started(family)
    for each in inputs:
        if isinstance(each, tuple):
            model.base_model(*each)
        else:
            model(**each)
    training._renew_weights()
    return training.unit_weights


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_padding_never_counts(family, side):
    ids = token_ids(3, 8)
    given = padded(ids, 5, side)
    if side == "left" and family in ("gpt2", "bert"):
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = weights(family, [{"input_ids": ids}])
    found = weights(family, [given])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-9)
    counted = weights(family, [{**given, "attention_mask": None}])
    assert (counted - expected).abs().max() > 1e-2 * expected.max()


def test_forwards_count_by_their_tokens():
    short, long = token_ids(1, 6, seed=1), token_ids(3, 8, seed=2)
    pads = padded(short, 2, "right")
    both = {
        "input_ids": torch.cat([pads["input_ids"], long]),
        "attention_mask": torch.cat([pads["attention_mask"], torch.ones_like(long)]),
    }
    expected = weights("llama", [both])
    found = weights("llama", [{"input_ids": short}, {"input_ids": long}])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-9)
    positional = weights("llama", [(both["input_ids"], both["attention_mask"])])
    assert torch.equal(positional, expected)


def test_gradient_checkpointing_counts_nothing_twice():
    first, second = padded(token_ids(2, 6, seed=1), 4, "left"), {"input_ids": token_ids(2, 7)}
    found = []
    for saving in (False, True):
        model, training = started("llama")
        if saving:
            model.gradient_checkpointing_enable()
        (model(**first).logits.sum() + model(**second).logits.sum()).backward()
        training.step()
        found.append(training.unit_weights)
    assert torch.equal(*found)


def test_rows_that_are_not_all_tokens():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    x = torch.randn(2, 3, 4)
    kept = x[mask]
    for given, expected in (
        (x, kept),
        (x.reshape(6, 4), kept),
        (kept, kept),
        (kept[None], kept),
        (x[:, -2:], torch.stack([x[0, 1], x[0, 2], x[1, 1]])),
        (x[:, 0], x[:, 0]),
    ):
        assert torch.equal(counted_rows(given, mask, "lm_head"), expected)
    with pytest.raises(ValueError, match=r"attention_mask: lm_head is given \[5, 4\]"):
        counted_rows(torch.randn(5, 4), mask, "lm_head")
