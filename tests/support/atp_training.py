"""What the tests of ATP share: tiny models with decisions, and steps of their training."""

import torch
from tiny import tiny_model, token_ids

from gatepack.methods import ATP

STEPS = 12
FAST = {"target": 0.6, "lora_rank": 3, "lora_dropout": 0.0, "generator_rate": 1e-2}


def generator_batches(n=2):
    return [token_ids(3, 7, seed=100 + i) for i in range(n)]


def started(family="llama", dtype=torch.float64, steps=STEPS, decide=True, **fields):
    model = tiny_model(family, dtype).train()
    training = ATP(**{**FAST, **fields}).start(model, steps, batches_of(model))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    if decide:
        training.decisions.set(torch.rand(len(training.decisions.hard)) > 0.4)
    return model, training


def batches_of(model):
    batches = generator_batches()
    if model.can_generate():
        return batches
    return [{"input_ids": ids, "labels": ids.sum(1) % 2} for ids in batches]


def loss_of(model, step):
    ids = token_ids(4, 8, seed=step)
    return model(input_ids=ids, labels=ids if model.can_generate() else ids.sum(1) % 2).loss


def train(model, training, optimizer=None, until=STEPS):
    if optimizer is None:
        optimizer = torch.optim.AdamW(training.weights(), lr=1e-2)
    while training.done < until:
        loss_of(model, training.done).backward()
        training.step()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer
