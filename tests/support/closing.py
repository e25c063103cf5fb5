"""A CloseAndRepair, batches for it, and an encoder with LoRA."""

import pytest
import torch
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.methods import CloseAndRepair

STEPS = 6
GATES = gp.GateConfig(target=0.6, noise=0.0, width_multiple=4, equal_layers=False)
METHOD = CloseAndRepair(GATES, close=0.5, calibration_batches=2, bars=False)


def labelled(count, seed=0):
    """Batches of padded rows with a label each."""
    found = []
    for step in range(count):
        ids = token_ids(4, 8, seed=seed + step)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.sum(1) % 2})
    return found


def texts(count, seed=0):
    rows = [token_ids(4, 8, seed=seed + step) for step in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def with_lora(family="bert", **fields):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=["classifier"], **fields
    )
    return peft.get_peft_model(tiny_model(family, torch.float32), lora)
