"""What calibration reads, and the model that it leaves as it was."""

import pytest
import torch
from tiny import padded, tiny_model, token_ids

from gatepack.calibration import frozen, label_count, token_rows, with_labels


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_labels_are_counted_as_the_loss_averages_them(model_type, side):
    model = tiny_model(model_type)
    inputs = padded(token_ids(3, 8), 5, side)
    if model_type == "bert":
        inputs["labels"] = torch.tensor([0, 1, -100])
    inputs = with_labels(model, inputs)
    output = model(**inputs)
    logits, labels = output.logits, inputs["labels"]
    if model_type == "llama":
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    found = output.loss * label_count(model, inputs["labels"])
    torch.testing.assert_close(found.float(), total, rtol=1e-5, atol=1e-5)


def test_rows_are_those_of_tokens():
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(token_rows(x, None), x.reshape(6, 4))
    assert torch.equal(token_rows(x, mask), torch.stack([x[0, 0], x[0, 2], x[1, 2]]))
    assert torch.equal(token_rows(x.reshape(6, 4), mask), token_rows(x, mask))


def test_frozen_gives_everything_back():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    first, second, *_ = model.parameters()
    second.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), torch.no_grad(), frozen(model, but=[second]):
        assert torch.is_grad_enabled() and not any(m.training for m in model.modules())
        assert [p for p in model.parameters() if p.requires_grad] == [second]
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
