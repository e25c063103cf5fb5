"""What packing a model of many layers holds beyond the model."""

import pytest
import torch
from _harness import peak_bytes
from tiny import tiny_model

import gatepack as gp

# Llama 3 8B, at a twelfth of its width.
SHAPE = {
    "num_hidden_layers": 12,
    "hidden_size": 336,
    "intermediate_size": 1176,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def bytes_of(module) -> int:
    return sum(t.nbytes for t in module.state_dict().values())


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_one_layer_at_most_is_held_beside_the_model(share):
    sizes = {}

    # Made under the profiler too, which knows only then how much a freed weight gives back.
    def make_and_pack():
        model = tiny_model("llama", torch.float32, **SHAPE)
        sizes.update(layer=bytes_of(model.model.layers[0]), dense=bytes_of(model))
        gates = gp.attach(model, gp.GateConfig(noise=0.0))
        for name, gate in gates.items():
            gates.close(name, torch.arange(round(share * gate.size)))
        gp.pack(model)
        sizes.update(packed=bytes_of(model))

    peak = peak_bytes(make_and_pack, "cpu")
    layer, dense = sizes["layer"], sizes["dense"]
    assert 12 * layer > 0.9 * dense
    assert sizes["packed"] <= (1 - 0.9 * share) * dense
    of_units = 32 * SHAPE["num_hidden_layers"] * SHAPE["intermediate_size"]  # gates and indices
    assert dense <= peak <= dense + layer + of_units
