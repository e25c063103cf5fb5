"""Saves that are killed, or fail, again and again: python kills.py FOLDER KILLS WHAT...

Forks a child for each save, so that torch is imported once. Prints JSON: how many children were
killed at random moments, at each step that touches the folder, and failed at each step that writes
there, and what was found wrong. After each, every file must be that of the old or of the new state.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from packed import EVEN, packed_model
from tiny import tiny_model, token_ids
from transformers.utils import logging

import gatepack as gp
from gatepack import exporters, files
from gatepack.training import FineTuning, TrainConfig, add_lora

DONE, UNTOUCHED, REFUSED, BROKEN = range(4)
DECILM = {"closed": ([1, 4], [0, 3]), "widths": (256, 256), "intermediate_size": 512}


def models(**sizes):
    return [packed_model(seed=seed, **sizes) for seed in (0, 1)]


def saving(folder):
    """Two functions, each of which saves another model to the folder."""
    return [lambda m=m: gp.save_pretrained(m, folder) for m in models(**EVEN)]


def saving_without_exchange(folder):
    files._exchange = lambda first, second: False
    return saving(folder)


def exporting(form, **sizes):
    def states(folder):
        from bpe import byte_tokenizer

        exporters.importlib.import_module(f"gatepack.exporters.{form}").check = lambda *_: {
            "skipped": "it is the writing that is killed"
        }
        options = {"tokenizer": byte_tokenizer()} if form == "gguf" else {}
        return [
            lambda m=m: gp.export(m, folder, form, **options)
            for m in models(vocab_size=300, **(sizes or EVEN))
        ]

    return states


def training(folder):
    """The state of a run after its first and after its second step."""
    config = TrainConfig(steps=2, batch_size=2, window=9, lora_rank=2, calibration_batches=1)
    model = add_lora(tiny_model("llama", torch.float32), config)
    folder.mkdir()
    runs = []
    for steps in (1, 2):
        run = FineTuning(model, token_ids(4), config)
        for _ in range(steps):
            run._train_step()
        run.folder = folder
        runs.append(run.save)
    return runs


KINDS = {
    "save": saving,
    "save without exchange": saving_without_exchange,
    "uniform": exporting("uniform"),
    "hf": exporting("hf"),
    "gguf": exporting("gguf"),
    "decilm": exporting("decilm", **DECILM),
    "onnx": exporting("onnx"),
    "training": training,
}


def state_of(folder: Path) -> str:
    """A digest of every file's name and bytes; the folder before, where a save left it aside."""
    folder = files.left_aside(folder) or folder
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            digest.update(f"{path.relative_to(folder)}\0".encode() + contents(path))
    return digest.hexdigest()


def contents(path: Path) -> bytes:
    """The bytes of a file, of safetensors those of its parts, whose order is not fixed."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors, metadata = files.read_safetensors(path)
    parts = [f"{name}{tensors[name].numpy().tobytes()}" for name in sorted(tensors)]
    return repr([parts, sorted(metadata.items())]).encode()


def child(write, hook=None) -> int:
    """Forks a process that writes and ends with one of the codes above; its id."""
    process = os.fork()
    if process:
        return process
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            if hook is not None:
                sys.addaudithook(hook)
            write()
        except OSError:
            os._exit(REFUSED)
        except BaseException:
            os._exit(BROKEN)
    os._exit(DONE if hook is None or hook.acted else UNTOUCHED)


class AtStep:
    """An audit hook that acts at a step which touches the folder or what lies beside it."""

    def __init__(self, folder: Path, step: int, act, writes: bool):
        self.place, self.left, self.act, self.writes = str(folder.parent), step, act, writes
        self.acted = False

    def __call__(self, event, args):
        first = args[0] if args else None
        here = isinstance(first, str | bytes | os.PathLike) and self.place in str(first)
        if here and (self.is_write(event, args) or not self.writes):
            self.left -= 1
            if self.left == 0:
                self.acted = True
                self.act()

    def is_write(self, event, args) -> bool:
        if event == "open":
            return any(c in "wax+" for c in args[1] or "") or bool((args[2] or 0) & os.O_CREAT)
        return event in ("os.rename", "os.mkdir", "os.link", "os.chmod", "os.remove")


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Trial:
    """A folder with the first of two states, of which each child writes the other."""

    def __init__(self, what: str, folder: Path):
        self.folder = folder / "m"
        self.writes = KINDS[what](self.folder)
        self.found = {"killed": 0, "killed at steps": 0, "failed": 0, "wrong": [], "new": 0}
        self.states = []
        for write in self.writes:
            write()  # imports what the children then need not
            if not self.states:
                (self.folder / "notes.txt").write_text("mine")
            self.states.append(state_of(self.folder))
        begin = time.perf_counter()
        self.wait(child(write))
        self.seconds = time.perf_counter() - begin
        assert self.states[0] != self.states[1], "both states are the same"
        self.now = 1

    def wait(self, process: int) -> int:
        """The child's exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def check(self, where: str, status: int) -> None:
        """Takes note of the state; anything but the old or the new one is wrong."""
        found = state_of(self.folder)
        before, self.now = self.now, self.states.index(found) if found in self.states else None
        replaced = self.now not in (before, None)
        right = {DONE: replaced, UNTOUCHED: replaced, REFUSED: self.now == before}
        if not right.get(status, status == -signal.SIGKILL and self.now is not None):
            self.found["wrong"].append(f"{where}: ended with {status}, replaced: {replaced}")
        self.found["new"] += replaced and status == -signal.SIGKILL
        self.now = before if self.now is None else self.now

    def kill_at_random(self, count: int) -> None:
        moments = random.Random(0)
        while self.found["killed"] < count:
            delay = moments.uniform(0, self.seconds)
            process = child(self.writes[1 - self.now])
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            status = self.wait(process)
            self.found["killed"] += status == -signal.SIGKILL
            self.check(f"after {delay:.4f} s", status)

    def at_every_step(self, name: str, act, writes: bool) -> None:
        step, status = 0, None
        while status != UNTOUCHED:
            step += 1
            hook = AtStep(self.folder, step, act, writes)
            status = self.wait(child(self.writes[1 - self.now], hook))
            self.found[name] += status != UNTOUCHED
            self.check(f"{name}, {step}", status)


def main(what: str, folder: Path, count: int) -> dict:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder.mkdir()
    trial = Trial(what, folder)
    trial.kill_at_random(count)
    trial.at_every_step("killed at steps", kill, writes=False)
    trial.at_every_step("failed", full_disk, writes=True)
    trial.wait(child(trial.writes[0]))
    trial.found["left"] = sorted(p.name for p in folder.rglob(".*"))
    trial.found["mine"] = (trial.folder / "notes.txt").read_text()
    return trial.found


def race(folder: Path, count: int) -> dict:
    """Two processes that save so often to one folder: it ends as one of the two left it."""
    torch.set_num_threads(1)
    folder.mkdir()
    writes = saving(folder / "m")
    states = []
    for write in writes:
        write()
        states.append(state_of(folder / "m"))
    (folder / "m" / "notes.txt").write_text("mine")
    racers = [child(lambda w=write: [w() for _ in range(count)]) for write in writes]
    codes = [os.waitstatus_to_exitcode(os.waitpid(racer, 0)[1]) for racer in racers]
    (folder / "m" / "notes.txt").unlink()
    assert codes == [DONE, DONE], codes
    assert state_of(folder / "m") in states
    assert [path.name for path in folder.iterdir()] == ["m"]
    return {"saves": 2 * count}


if __name__ == "__main__":
    place, count, *kinds = sys.argv[1:]
    run = {kind: race if kind == "race" else functools.partial(main, kind) for kind in kinds}
    print(json.dumps({kind: run[kind](Path(place, kind), int(count)) for kind in kinds}))
