"""Short trainings by every kind of method, in one process or one rank of two."""

import functools
import gc
import os
import socket
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from interrupted import NoFinish, StopAt, same
from tiny import tiny_model, token_ids
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gatepack as gp
from gatepack.layers import GATES_NAME
from gatepack.modules import base_linear

STEPS = 6
WHOLE = StateDictOptions(full_state_dict=True)
FINE_GATES = gp.methods.FineGates(
    budget=0.6, learning_rate=0.05, weighting="kurtosis", kurtosis_every=2, trains="all"
)
# Of a rank that two processes share unevenly.
ATP = gp.methods.ATP(lora_rank=3, lora_dropout=0.0, generator_rate=1e-2)
CLOSING = gp.methods.CloseAndRepair(
    gp.GateConfig(target=0.6, noise=0.0, width_multiple=4, equal_layers=False),
    close=(0.25, 0.5),
    bars=False,
)


def gates_training(model):
    gp.attach(model, gp.GateConfig(target=0.6, width_multiple=4))
    return gp.GateTraining(model, STEPS)


def distilled(model):
    gp.Distillation(hidden_weight=0.5).start(model.requires_grad_(False))
    training = gates_training(model)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)
    return training


def fine_gates(model):
    return FINE_GATES.start(model, STEPS)


def atp(model, **fields):
    return replace(ATP, **fields).start(model, STEPS, [token_ids(2, 6, seed=50)])


def close_and_repair(model):
    # Of other batches on each rank, of which the first decides.
    rank = dist.get_rank() if dist.is_initialized() else 0
    return CLOSING.start(model, STEPS, [token_ids(4, 6, seed=50 + rank)])


def proximal(model):
    return atp(model, regulariser="proximal", proximal_rate=1e-5)


STARTS = {
    "gates": gates_training,
    "fine_gates": fine_gates,
    "atp": atp,
    "close_and_repair": close_and_repair,
    "atp_proximal": proximal,
    "distilled": distilled,
}


def shard(model, by_layer: bool) -> None:
    """FSDP2 on every layer and the rest, or on all at once; the logits each rank needs whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers if by_layer else ():
        fully_shard(layer, mesh=mesh)
    gates = getattr(model, GATES_NAME, None)
    fully_shard(model, mesh=mesh, ignored_params=set() if gates is None else {gates.logits})


def accelerated(model, optimizer):
    """Both from accelerate's own FSDP2, told to leave the gates alone as its users are.

    accelerate reads an FSDP plugin for the types of accelerators only (AcceleratorState.__init__)
    and would take DDP for MULTI_CPU in silence, so the type is set here; the rest runs on gloo.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        ignored_modules=f".*{GATES_NAME}.*",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator.prepare(model, optimizer)


def run(
    name: str, rank: int = 0, ranks: int = 1, wrap: str = "ddp", load=None, save=None, stop=STEPS
):
    """Trains on rank's share of each batch of 4; the model and its training.

    load, save: folders of a checkpoint to go on from, and to leave after `stop` steps.
    """
    torch.set_num_threads(1)
    model = tiny_model("llama", torch.float32).train()
    training = STARTS[name](model)
    wrapped = model
    if ranks > 1 and wrap in ("fsdp", "fsdp_at_once"):
        shard(model, by_layer=wrap == "fsdp")
    elif ranks > 1 and wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(training.weights(), lr=0.05, momentum=0.5)
    if ranks > 1 and wrap == "accelerate":
        wrapped, optimizer = accelerated(model, optimizer)
    if load is not None:
        _load(load, model, training, optimizer)
    for step in range(training.done, stop):
        ids = token_ids(4, 6, seed=step)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        training.step()
        optimizer.step()
        optimizer.zero_grad()
    if save is not None:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "training": training.state_dict()}
        dcp.save(state, checkpoint_id=save)
    if stop == STEPS:
        training.finish()
    return model, training


def _load(folder: str, model, training, optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    # What the gates' state holds depends on how far they were; its names are in the checkpoint.
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    gates = {
        name.removeprefix("training."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith("training.")
    }
    state = {"model": weights, "optimizer": moments, "training": gates}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    training.load_state_dict(state["training"])


def spawn(job, *arguments, count: int = 2) -> None:
    """job(rank, port, *arguments) in so many processes."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    mp.spawn(job, (port, *arguments), nprocs=count)


def states_in(folder, count: int = 2) -> dict:
    """What every one of so many ranks has left there, which all agree on."""
    first, *others = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count))
    for other in others:
        for part in ("model", "training"):
            same(other[part], first[part])
    return first


def without_key_bias(state: dict) -> dict:
    """What adds to all keys alike moves no softmax: its gradient is rounding, enlarged by Adam."""
    biases = {key: torch.cat(t.chunk(3)[::2]) for key, t in state.items() if "in_proj_bias" in key}
    return {**state, **biases}


def as_torchrun_does(rank: int, ranks: int, port: int) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, ranks, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})


def of_two(job):
    """job(rank, ...) as one of two ranks: (rank, port, ...)."""

    @functools.wraps(job)
    def run(rank: int, port: int, *arguments) -> None:
        as_torchrun_does(rank, 2, port)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        job(rank, *arguments)
        # gloo's threads let go of tensors late, which aborts where the interpreter is gone by then
        # (pytorch/pytorch#179291): the model that they are of goes first, with job's locals.
        gc.collect()
        dist.destroy_process_group()

    return run


@of_two
def worker(rank: int, name: str, folder: str, options: dict) -> None:
    model, training = run(name, rank, 2, **options)
    state = {"model": get_model_state_dict(model, options=WHOLE), "training": training.state_dict()}
    if options.get("wrap") != "ddp":
        local = base_linear(model.model.layers[0].mlp.up_proj).weight.to_local()
        state["local"] = torch.tensor(local.shape)
        closing = gp.methods.CloseAndRepair()
        whole = [
            lambda: gp.attach(model, gp.GateConfig()),
            lambda: closing.start(model, STEPS, [token_ids(2, 6)]),
        ]
        if hasattr(model, GATES_NAME):
            whole.append(lambda: gp.pack(model))
        for refused in whole:
            try:
                refused()
            except ValueError as error:
                assert "is sharded over ranks, so" in str(error)
            else:
                raise AssertionError("a sharded model was taken for a whole one")
    state["logits"] = evaluated(model)
    torch.save(state, f"{folder}/{rank}.pt")


@torch.no_grad()
def evaluated(model) -> torch.Tensor:
    return model.eval()(token_ids(2, 6, seed=60), use_cache=False).logits


@of_two
def forgets_to_ignore(rank: int) -> None:
    """fully_shard with the logits, before or after training starts, is refused."""
    mesh = init_device_mesh("cpu", (2,))
    for early in (True, False):
        model = tiny_model("llama", torch.float32).train()
        gp.attach(model, gp.GateConfig(target=0.6, width_multiple=4))
        try:
            if early:
                fully_shard(model, mesh=mesh)
                gp.GateTraining(model, STEPS)
            else:
                training = gp.GateTraining(model, STEPS)
                fully_shard(model, mesh=mesh)
                training.step()
        except ValueError as error:
            assert "pass ignored_params={gatepack.gates_of(model).logits}" in str(error)
        else:
            raise AssertionError("sharded logits were trained")


@of_two
def loads_before_sharding(rank: int) -> None:
    """A projection that is owed to LoRA which fully_shard has gathered already is refused."""
    model = tiny_model("llama", torch.float32).train()
    training = proximal(model)
    training.load_state_dict({**training.state_dict(), "owes_projection": torch.tensor(True)})
    shard(model, by_layer=False)
    try:
        model(token_ids())
    except RuntimeError as error:
        assert "call load_state_dict of this training after fully_shard" in str(error)
    else:
        raise AssertionError("a projection was lost")


# What a Trainer trains gates by, and what it distils from.
TRAINED = {
    "gates": (gp.GateConfig(target=0.6, width_multiple=4, noise=0.0), gp.Distillation()),
    "fine_gates": (FINE_GATES, None),
    "atp": (ATP, None),
    "close_and_repair": (CLOSING, None),
}


def trainer(
    rank: int, port: int, folder: str, ranks: int, resume: str | None, stop: int, name="gates"
) -> None:
    """A Trainer with gates that close, on `ranks` ranks, each of which leaves its last state."""
    if ranks > 1:
        as_torchrun_does(rank, ranks, port)
    trained(name, folder, resume, stop)
    if ranks > 1:
        dist.destroy_process_group()


def trained(name: str, folder: str, resume: str | None, stop: int) -> None:
    """What trainer does, on the rank that torchrun's environment names."""
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    method, distillation = TRAINED[name]
    batches = [token_ids(4, 6, seed=50)]
    kind = gp.GateCallback if stop == STEPS else NoFinish
    callback = kind(method, None, batches, resume, distillation)
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4 // ranks, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=5, optim="sgd", learning_rate=0.05,
        ddp_backend="gloo" if ranks > 1 else None,
    )  # fmt: skip
    rows = token_ids(4 * STEPS, 6)
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = tiny_model("llama", torch.float32)
    run = Trainer(model, arguments, train_dataset=data, callbacks=[callback, StopAt(stop)])
    run.train(resume_from_checkpoint=resume)
    state = {"model": model.state_dict(), "training": callback.training.state_dict()}
    torch.save(state, f"{folder}/{rank}.pt")


if __name__ == "__main__":  # torchrun ranks.py NAME FOLDER CHECKPOINT STOP
    trained(*sys.argv[1:4], int(sys.argv[4]))
    dist.destroy_process_group()
