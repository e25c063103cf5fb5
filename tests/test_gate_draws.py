"""All gates of a model are drawn together: one draw for each forward, however many layers."""

import importlib
from collections import Counter

import pytest
import torch
from tiny import tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

import gatepack as gp

UNITS = [("heads", "channels"), ("rows", "columns")]
IDS = token_ids()


class Calls(TorchDispatchMode):
    """Counts gatepack's ops; random: how many numbers each op with a generator has drawn."""

    def __init__(self):
        super().__init__()
        self.random, self.ops = [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(argument.name == "generator" for argument in func._schema.arguments):
            self.random.append(result.numel())
        elif func.namespace == "gatepack":
            self.ops[func._opname] += 1
        return result


def gated(units, layers):
    model = tiny_model("llama", torch.float32, num_hidden_layers=layers).train()
    gates = gp.attach(model, gp.GateConfig(units=units, noise=0.3, target=0.6, width_multiple=4))
    return model, gates


def backward(model, ids=IDS):
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("units", UNITS)
def test_one_draw_for_all_layers(units, layers):
    model, gates = gated(units, layers)
    per_layer = 2 if units == UNITS[0] else 14
    assert len(gates) == per_layer * layers
    for forwards in (1, 2):
        with Calls() as calls:
            for _ in range(forwards):
                backward(model)
        assert calls.random == [gates.logits.numel()] * forwards
    model.eval()
    with Calls() as calls, torch.no_grad():
        model(IDS)
    assert calls.random == []


@pytest.mark.parametrize("units", UNITS)
def test_one_launch_for_all_layers(units, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("GATEPACK_BACKEND", "triton")
    kernels = importlib.import_module("gatepack.kernels.sample_gates")
    kernel, grids = kernels._sample_gates_fwd_kernel, []

    class Launches:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_sample_gates_fwd_kernel", Launches())
    model, gates = gated(units, 2)
    with Calls() as calls:
        backward(model, IDS[:1, :4])
    assert grids == [(len(gates),)] and calls.random == []
    assert calls.ops["sample_gates"] == calls.ops["sample_gates_backward"] == 1
    assert gates.logits.grad.abs().max() > 0
