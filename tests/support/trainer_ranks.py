"""Trainer runs of one rank of two: gates that train alone, and what trains beside LoRA."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from interrupted import NoFinish, StopAt
from ranks import STEPS, as_torchrun_does, of_two
from tiny import tiny_model, token_ids
from torch.distributed.fsdp import fully_shard

import gatepack as gp
from gatepack.callback import BESIDE, FILE
from gatepack.files import read_safetensors


def gates_alone(name):
    """A model of which nothing but gates trains, and arguments of their GateCallback."""
    model = tiny_model("llama", torch.float32)
    if name == "fine_gates":
        return model, (gp.methods.FineGates.post_train(budget=0.6, learning_rate=0.05),)
    config = gp.GateConfig(target=0.6, width_multiple=4)
    return model.requires_grad_(False), (config, gp.GateSchedule(freeze=1.0))


def trained_alone(folder, name, count=1, resume=None, stop=None, **arguments):
    """What a Trainer with gates alone ends at, on `count` ranks, or until it is stopped."""
    from transformers import Trainer, TrainingArguments

    model, how = gates_alone(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kind = gp.GateCallback if stop is None else NoFinish
    callback = kind(*how, resume_from=resume)
    settings = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4 // count, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=5, learning_rate=0.5,
        weight_decay=0.5, ddp_backend="gloo" if count > 1 else None, **arguments,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in token_ids(4 * STEPS, 6)]
    extra = [] if stop is None else [StopAt(stop)]
    run = Trainer(model, settings, train_dataset=data, callbacks=[callback, *extra])
    run.train(resume_from_checkpoint=resume)
    found = model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in before.items())
    return callback.training.state_dict()


ALONE = [("fine_gates", None), ("fine_gates", False), ("gates", None)]


def alone_worker(rank, port, folder):
    torch.set_num_threads(1)
    as_torchrun_does(rank, 2, port)
    found = [
        trained_alone(f"{folder}/{place}", name, 2, ddp_find_unused_parameters=unused)
        for place, (name, unused) in enumerate(ALONE)
    ]
    trained_alone(f"{folder}/cut", "fine_gates", 2, stop=2)
    resume = f"{folder}/cut/checkpoint-2"
    found.append(trained_alone(f"{folder}/cut", "fine_gates", 2, resume))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@of_two
def beside_worker(rank, folder):
    """What trains beside LoRA, sharded, is kept whole and read back into the shards."""
    import peft

    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model("opt", torch.float32).train(), lora)
    callback = gp.GateCallback(gp.methods.FineGates(learning_rate=0.05))
    args = SimpleNamespace(output_dir=folder, should_save=rank == 0, load_best_model_at_end=False)
    state = SimpleNamespace(global_step=0, max_steps=4)
    callback.on_init_end(args, state, None, model=model)
    gates = gp.gates_of(model)
    fully_shard(model, ignored_params={gates.logits})
    callback.on_train_begin(args, state, None, model=model)
    biases = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    with torch.no_grad():
        for bias in biases:
            bias.add_(1)
    expected = [bias.full_tensor() for bias in biases]
    state.global_step = 2
    callback.on_save(args, state, None)
    dist.barrier()
    kept, _ = read_safetensors(f"{folder}/checkpoint-2/{FILE}")
    stored = [tensor for key, tensor in kept.items() if key.startswith(BESIDE)]
    assert len(stored) == len(biases) == 12
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
    callback.on_train_begin(args, state, None, model=model)
    assert all(torch.equal(b.full_tensor(), e) for b, e in zip(biases, expected, strict=True))
