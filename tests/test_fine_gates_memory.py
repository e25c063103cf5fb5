"""What a FineGates step holds on a CPU, beside the same gates multiplied in at full width."""

import copy

import pytest
import torch
from _harness import peak_bytes
from _models import mask_rows_columns
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack.methods import FineGates

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}


def trained_step(closed: float, frozen: bool):
    """(ours, masked): a step of a small encoder each, a part of the units of each side closed."""
    model = tiny_model("bert", torch.float32, max_position_embeddings=128, **SIZES).train()
    FineGates(noise=0.0).start(model, 4)
    gates = gp.gates_of(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gates.logits *= 0.4  # fractional gates, which have gradients
    for name, gate in gates.items():
        order = torch.randperm(gate.size, generator=generator)
        gates.close(name, order[: round(closed * gate.size)])
    if frozen:
        gates.freeze()
    dense = copy.deepcopy(model)
    gp.detach(dense)
    masked, _ = mask_rows_columns(dense, gates)
    batch = {"input_ids": token_ids(3, 100), "labels": torch.tensor([0, 1, 0])}
    return (
        lambda: model(**batch).loss.backward(),
        lambda: masked(lambda model: model(**batch).loss).backward(),
    )


def saved_bytes(step) -> int:
    """Bytes of all storages, each once, that a forward saves for its backward."""
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("closed", [0.0, 0.23, 0.4])
def test_a_step_holds_no_more_than_a_masked_one(closed, frozen):
    ours, masked = trained_step(closed, frozen)
    first_layer = 3 * 4 * 128 * 128  # q, k and v, whose weights a masked step need not keep
    assert saved_bytes(ours) <= saved_bytes(masked) + first_layer
    # For the time of one product: a packed weight, and lanes on their way into the widest tensor.
    largest = 4 * 512 * (128 + 300)
    assert peak_bytes(ours, "cpu") <= peak_bytes(masked, "cpu") + largest
