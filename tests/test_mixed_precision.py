"""Methods in bf16, with gradient checkpointing in a Trainer, and on a base in fp16."""

import copy
import math

import pytest
import torch
from _models import mask_rows_columns
from tiny import tiny_model, token_ids
from trainers import METHODS, STEPS, cut_off_and_resumed, logged, trainer

import gatepack as gp
from gatepack.methods import FineGates
from gatepack.testing import assert_close_to_fp64

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", METHODS)
def test_a_trainer_in_bf16_with_checkpointing(name, tmp_path):
    seen = set()

    def note(module, args, output):
        in_backward = torch._C._current_graph_task_id() != -1
        if module.training:
            seen.add((output[0].dtype, in_backward))

    def make(*arguments):
        run = trainer(name, *arguments, bf16=True, gradient_checkpointing=True)
        run.model.model.layers[0].self_attn.register_forward_hook(note)
        return run

    whole, resumed = cut_off_and_resumed(make, tmp_path)
    assert seen == {(BF16, False), (BF16, True)}
    losses = logged(whole, "loss")
    assert len(losses) == STEPS and all(map(math.isfinite, losses.values()))
    assert logged(resumed, "loss") == losses
    gates = gp.gates_of(whole.model)
    assert gates.frozen and abs(gates.kept_fraction() - METHODS[name][1]) <= 0.005
    assert gates.logits.dtype == torch.float32


def fine_gates(base, dtype, **fields):
    """A model in fp32 with the weights of one in a lower precision, in dtype, and its training."""
    model = copy.deepcopy(base).to(dtype).train()
    training = FineGates(noise=0.0, trains="gates", **fields).start(model, 4)
    with torch.no_grad():
        training.gates.logits *= 0.4  # fractional gates, which have gradients
    return model, training


def autocast_loss(model, ids):
    with torch.autocast("cpu", BF16):
        return model(input_ids=ids, labels=ids).loss


def test_fine_gates_on_fp16_with_bf16_activations():
    base, ids = tiny_model("llama", torch.float16), token_ids(4, 8)
    model, training = fine_gates(base, torch.float16)
    autocast_loss(model, ids).backward()
    found = training.gradient

    def masked(dtype, loss_of):
        dense, other = fine_gates(base, dtype)
        gp.detach(dense)
        run, logits = mask_rows_columns(dense, other.gates)
        run(lambda dense: loss_of(dense, ids)).backward()
        return logits.grad

    theirs = masked(torch.float16, autocast_loss)
    truth = masked(torch.float64, lambda dense, ids: dense(input_ids=ids, labels=ids).loss)
    assert_close_to_fp64("dlogits", found, theirs, truth.double(), factor=3, dtype=BF16)


def test_fine_gates_on_fp16_keep_their_logits_in_fp32():
    base, losses = tiny_model("llama", torch.float16), []
    model, training = fine_gates(base, torch.float16, learning_rate=1e-4)
    gates = training.gates
    model.half()
    before = gates.logits.detach().clone()
    for step in range(4):
        loss = autocast_loss(model, token_ids(4, 8, seed=step))
        loss.backward()
        training.step()
        losses.append(float(loss.detach()))
        assert gates.logits.dtype == torch.float32 and training.gradient is None
    assert all(map(math.isfinite, losses))
    moved = (gates.logits.detach() - before).abs()
    assert moved.isfinite().all() and (moved > 0).all()
    # Steps of 1e-4 are less than fp16 can add to a logit above 0.25, of which there are some.
    assert (gates.logits.detach() != gates.logits.detach().half().float()).any()
    weights = {p.dtype for p in model.parameters() if p is not gates.logits}
    assert weights == {torch.float16}
