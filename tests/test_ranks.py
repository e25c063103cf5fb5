"""Checkpoints of so many ranks that go on with another number of them, by every kind of method."""

import os
import subprocess
import sys

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import states_in, without_key_bias

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


def close(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=key)


def agrees(found, expected):
    """Weights and the method's own state."""
    close(found["model"], expected["model"])
    close(without_key_bias(found["training"]), without_key_bias(expected["training"]))


class TestLoop:
    """A loop of one's own, with DistributedDataParallel on two ranks and without it on one."""

    @staticmethod
    def run(name, count, folder, **options):
        if count == 1:
            model, training = ranks.run(name, **options)
            return {"model": model.state_dict(), "training": training.state_dict()}
        folder.mkdir()
        options = {"wrap": "ddp", **options}
        ranks.spawn(ranks.worker, name, str(folder), options, count=count)
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
            ranks.spawn(ranks.trainer, str(folder), count, resume, stop, name, count=count)
        return states_in(folder, count), folder / f"checkpoint-{stop}"

    @slow
    @pytest.mark.parametrize(
        ("name", "before", "after"),
        [
            ("gates", 2, 2),
            *(
                (name, before, 3 - before)
                for name in ("gates", "fine_gates", "atp", "close_and_repair")
                for before in (1, 2)
            ),
        ],
    )
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
