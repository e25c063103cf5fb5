"""Linears of an MLP with gates on rows and columns hand each other open channels only."""

import pytest
import torch
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack import paths


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("tokens", [1, 4, 8, 12, 16, 20, 24, 32, 48, 64])
def test_an_mlps_linears_agree_for_any_number_of_tokens(family, tokens, monkeypatch):
    """Also where their other sides, of which one is all open, would have them differ."""
    monkeypatch.setattr(paths, "CALL", 0)  # a call costs more than these small products
    model = tiny_model(family, torch.float32, max_position_embeddings=64)
    gates = gp.attach(model, gp.GateConfig(units=("rows", "columns"), noise=0.0))
    down = next(
        name for name in gates if name.endswith(("down_proj:columns", "0.output.dense:columns"))
    )
    up = next(n for n in gates if n.endswith(("up_proj:columns", "0.intermediate.dense:columns")))
    gates.close(down, range(20))
    gates.close(up, range(30))
    linear, seen = model.get_submodule(down.rpartition(":")[0]), []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    model(token_ids(1, tokens))
    assert seen == [40 if gates[down].path == "dense" else 20]
