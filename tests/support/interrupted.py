"""Trainer runs that are cut off, as the tests of resuming need them."""

import torch
from transformers import TrainerCallback

from gatepack.callback import GateCallback


class StopAt(TrainerCallback):
    """Saves and stops after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_save = state.global_step == self.step


class NoFinish(GateCallback):
    """A run that is killed never sees on_train_end."""

    def on_train_end(self, args, state, control, **_):
        pass


def same(found, expected):
    """Two state dicts are equal, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
