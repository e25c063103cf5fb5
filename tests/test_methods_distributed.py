"""Two processes, DDP and FSDP2 (also accelerate's): the same gates on every rank."""

import pytest
import ranks
import torch
import torch.distributed as dist
import trainer_ranks
from ranks import without_key_bias

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
slow = pytest.mark.slow

CASES = [
    ("ddp", "atp"),
    ("ddp", "close_and_repair"),
    ("fsdp", "gates"),
    ("fsdp", "atp"),
    ("accelerate", "fine_gates"),
    *(pytest.param("ddp", name, marks=slow) for name in ("gates", "fine_gates", "distilled")),
    *(pytest.param("fsdp", name, marks=slow) for name in ("fine_gates", "distilled")),
    *(pytest.param("accelerate", name, marks=slow) for name in ("gates", "atp")),
    *(pytest.param(w, "atp_proximal", marks=slow) for w in ("ddp", "fsdp", "fsdp_at_once")),
    pytest.param("fsdp_at_once", "atp", marks=slow),
]


def on_two(name, folder, **options):
    """The whole state after a run on two ranks."""
    folder.mkdir()
    ranks.spawn(ranks.worker, name, str(folder), options)
    return ranks.states_in(folder)


def close(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def merged(state):
    """A state with LoRA of scale 1 merged, as ATP leaves what is not sharded."""
    found = {}
    for key, tensor in state.items():
        if "lora_" in key:
            continue
        name, lora, rest = key.partition(".base_layer.")
        if lora and rest == "weight":
            low, high = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
            tensor = tensor + high @ low
        found[f"{name}.{rest}" if lora else key] = tensor
    return found


@pytest.mark.parametrize(("wrap", "name"), CASES)
def test_ranks_agree_with_one_process_on_the_whole_batch(wrap, name, tmp_path):
    two = on_two(name, tmp_path / "two", wrap=wrap)
    model, training = ranks.run(name)
    close(merged(two["model"]), model.state_dict())
    close(without_key_bias(two["training"]), without_key_bias(training.state_dict()))
    torch.testing.assert_close(two["logits"], ranks.evaluated(model), rtol=1e-3, atol=1e-4)
    if wrap != "ddp":
        assert two["local"].tolist() == [20, 48]  # half of the rows, while the gates are whole


@slow
@pytest.mark.parametrize(
    ("wrap", "name"),
    [("ddp", "atp"), ("ddp", "close_and_repair"), ("fsdp", "gates"), ("fsdp", "atp")],
)
def test_a_checkpoint_of_two_goes_on_with_one_and_back(wrap, name, tmp_path):
    whole = on_two(name, tmp_path / "whole", wrap=wrap)
    stored = str(tmp_path / "of_two")
    on_two(name, tmp_path / "cut", wrap=wrap, save=stored, stop=2)
    same = on_two(name, tmp_path / "same", wrap=wrap, load=stored)
    for part in ("model", "training"):
        assert all(torch.equal(same[part][key], t) for key, t in whole[part].items())
    one, training = ranks.run(name, load=stored)
    close(one.state_dict(), merged(whole["model"]))
    close(without_key_bias(training.state_dict()), without_key_bias(whole["training"]))
    stored = str(tmp_path / "of_one")
    ranks.run(name, save=stored, stop=2)
    two = on_two(name, tmp_path / "again", wrap=wrap, load=stored)
    close(merged(two["model"]), merged(whole["model"]))


@slow
def test_sharded_logits_are_refused():
    ranks.spawn(ranks.forgets_to_ignore)


@slow
def test_a_projection_that_would_be_lost_is_refused():
    ranks.spawn(ranks.loads_before_sharding)


def test_gates_train_alone_in_a_trainer_on_two_ranks(tmp_path):
    """DistributedDataParallel refuses a model in which nothing trains when it wraps it."""
    ranks.spawn(trainer_ranks.alone_worker, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert all(torch.equal(first[0][key], tensor) for key, tensor in first[1].items())
    assert all(torch.equal(first[0][key], tensor) for key, tensor in first[3].items())
    for place, name in ((0, "fine_gates"), (2, "gates")):
        close(first[place], trainer_ranks.trained_alone(str(tmp_path / name), name))
    of_two = str(tmp_path / "cut" / "checkpoint-2")
    # That it goes on: transformers 5.1 takes the batch size, which is halved, from the checkpoint.
    one = trainer_ranks.trained_alone(str(tmp_path / "one"), "fine_gates", resume=of_two)
    assert int(one["done"]) == ranks.STEPS


@slow
def test_what_trains_beside_lora_is_kept_whole_of_a_sharded_model(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "checkpoint-2").mkdir()
    ranks.spawn(trainer_ranks.beside_worker, str(tmp_path))
