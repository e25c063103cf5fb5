"""Two processes: the same gates and decisions on every rank, from gradients of all of them."""

import socket

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_model

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.STARTS)
def test_ranks_agree_with_one_process_on_the_whole_batch(name, tmp_path):
    mp.spawn(ranks.worker, (name, free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("model", "training"):
        assert first[part].keys() == second[part].keys()
        for key, tensor in first[part].items():
            assert torch.equal(tensor, second[part][key]), key
    model, training = ranks.run(name)
    whole = model.state_dict()
    for key, tensor in first["model"].items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=1e-4, msg=key)
    # Saved by two ranks, loaded by one.
    fresh = tiny_model("llama", torch.float32).train()
    resumed = ranks.STARTS[name](fresh)
    resumed.load_state_dict(first["training"])
    assert resumed.done == ranks.STEPS
    assert bool(resumed.state_dict()["frozen"])
