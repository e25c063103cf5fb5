"""Tiny packed models with chosen sizes, and modules of theirs that transformers runs."""

import sys

import pytest
import torch
from tiny import for_family, set_gates, tiny_model

import gatepack as gp

# Closed heads and kept channels of each of two layers.
UNEVEN = {"closed": ([1], [0, 1, 2]), "widths": (16, 24)}
EVEN = {"closed": ([1, 4], [0, 5]), "widths": (24, 24)}
CHANNELS = {"closed": ([], []), "widths": (24, 24)}


def packed_model(model_type="llama", closed=((), ()), widths=(40, 40), **overrides):
    """A tiny_model in float32 and eval mode, packed to these sizes."""
    model = tiny_model(model_type, torch.float32, **overrides).eval()
    gates = gp.attach(
        model, for_family(model_type, gp.GateConfig(noise=0.0, target=0.5, width_multiple=1))
    )
    set_gates(gates, "open")
    heads, channels = (
        [name for name, gate in gates.items() if gate.kind == kind]
        for kind in ("heads", "channels")
    )
    for name, units in zip(heads, closed if heads else (), strict=True):
        gates.close(name, list(units))
    for name, width in zip(channels, widths, strict=True):
        gates.close(name, list(range(width, gates.gates[name].size)))
    gp.pack(model)
    return model


def spoil(model, size=1e-3):
    """Moves the weights of one channel by a fraction of the largest, in place; the model."""
    with torch.no_grad():
        weight = next(p for name, p in model.named_parameters() if "0.mlp.down_proj" in name)
        weight[:, 0] += size * weight.abs().max()
    return model


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Keeps the code that transformers copies out of folders out of the home directory."""
    import transformers.dynamic_module_utils as utils

    monkeypatch.setattr(utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
