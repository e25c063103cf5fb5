"""Short trainings by every kind of method, in one process or one rank of two."""

import torch
import torch.distributed as dist
from tiny import tiny_model, token_ids
from torch.nn.parallel import DistributedDataParallel

import gatepack as gp

STEPS = 6


def gates_training(model):
    gp.attach(model, gp.GateConfig(target=0.6, width_multiple=4))
    return gp.GateTraining(model, STEPS)


def fine_gates(model):
    method = gp.methods.FineGates(
        budget=0.6, learning_rate=0.05, weighting="kurtosis", kurtosis_every=2, trains="all"
    )
    return method.start(model, STEPS)


def atp(model):
    method = gp.methods.ATP(lora_rank=2, lora_dropout=0.0, generator_rate=1e-2)
    return method.start(model, STEPS, [token_ids(2, 6, seed=50)])


STARTS = {"gates": gates_training, "fine_gates": fine_gates, "atp": atp}


def run(name: str, rank: int = 0, ranks: int = 1):
    """Trains on rank's share of each batch of 4; the model and its training."""
    torch.set_num_threads(1)
    model = tiny_model("llama", torch.float32).train()
    training = STARTS[name](model)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(training.weights(), lr=0.05)
    for step in range(STEPS):
        ids = token_ids(4, 6, seed=step)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        training.step()
        optimizer.step()
        optimizer.zero_grad()
    training.finish()
    return model, training


def worker(rank: int, name: str, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, training = run(name, rank, 2)
    torch.save(
        {"model": model.state_dict(), "training": training.state_dict()}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()
