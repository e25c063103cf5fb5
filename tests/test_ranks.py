"""Checkpoints of so many ranks that go on with another number of them, by every kind of method."""

import os
import socket
import subprocess
import sys

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_many_threads():
    """A run in this process takes one thread, as those in others do."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def states_in(folder, count):
    """What every one of so many ranks has left, which all agree on."""
    first, *others = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count))
    for other in others:
        for part in ("model", "training"):
            assert first[part].keys() == other[part].keys()
            for key, tensor in first[part].items():
                assert torch.equal(tensor, other[part][key]), key
    return first


def close(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=key)


def agrees(found, expected):
    """Weights and the method's own state."""
    close(found["model"], expected["model"])
    close(without_key_bias(found["training"]), without_key_bias(expected["training"]))


def without_key_bias(state):
    """What adds to all keys alike moves no softmax: its gradient is rounding, enlarged by Adam."""
    biases = {key: torch.cat(t.chunk(3)[::2]) for key, t in state.items() if "in_proj_bias" in key}
    return {**state, **biases}


class TestLoop:
    """A loop of one's own, with DistributedDataParallel on two ranks and without it on one."""

    @staticmethod
    def run(name, count, folder, **options):
        if count == 1:
            model, training = ranks.run(name, **options)
            return {"model": model.state_dict(), "training": training.state_dict()}
        folder.mkdir()
        options = {"wrap": "ddp", **options}
        mp.spawn(ranks.worker, (free_port(), name, str(folder), options), nprocs=count)
        return states_in(folder, count)

    @pytest.mark.parametrize(
        ("name", "before", "after"),
        [
            ("gates", 2, 1),
            *(
                pytest.param(name, before, 3 - before, marks=slow)
                for name in ("fine_gates", "atp_proximal")
                for before in (1, 2)
            ),
        ],
    )
    def test_goes_on_with_another_number(self, name, before, after, tmp_path):
        stored = str(tmp_path / "stored")
        whole = self.run(name, 1, tmp_path)
        self.run(name, before, tmp_path / "cut", save=stored, stop=2)
        agrees(self.run(name, after, tmp_path / "resumed", load=stored), whole)


class TestTrainer:
    @staticmethod
    def run(name, count, folder, resume=None, stop=ranks.STEPS):
        folder.mkdir()
        resume = resume and str(resume)
        if count == 1:
            ranks.trained(name, str(folder), resume, stop)
        else:
            arguments = (free_port(), str(folder), count, resume, stop, name)
            mp.spawn(ranks.trainer, arguments, nprocs=count)
        return states_in(folder, count), folder / f"checkpoint-{stop}"

    @slow
    @pytest.mark.parametrize("name", ["fine_gates", "atp", "close_and_repair"])
    @pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
    def test_goes_on_with_another_number(self, name, before, after, tmp_path):
        whole, _ = self.run(name, 1, tmp_path / "whole")
        cut, checkpoint = self.run(name, before, tmp_path / "cut", stop=2)
        assert int(cut["training"]["done"]) == 2
        found, _ = self.run(name, after, tmp_path / "resumed", checkpoint)
        assert int(found["training"]["done"]) == ranks.STEPS
        agrees(found, whole)

    @slow
    @pytest.mark.parametrize("name", ["gates", "close_and_repair"])
    def test_goes_on_under_torchrun(self, name, tmp_path):
        whole, _ = self.run(name, 1, tmp_path / "whole")
        _, checkpoint = self.run(name, 1, tmp_path / "cut", stop=2)
        folder = tmp_path / "two"
        folder.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*torchrun, ranks.__file__, name, folder, checkpoint, str(ranks.STEPS)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        agrees(states_in(folder, 2), whole)
