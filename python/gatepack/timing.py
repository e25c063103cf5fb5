"""Stage 5, pack: how fast a model is and what memory it takes, with the dense model beside it."""

import functools
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import transformers
from torch import nn

import gatepack
from gatepack.layers import hf_model
from gatepack.quality import evaluating, forward_arguments, input_device, vocabulary_size

WARMUP_SECONDS = 0.5


@dataclass(frozen=True)
class Rate:
    """Tokens per second over the repeats: the median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, tokens: int, seconds: list[float]) -> "Rate":
        p20, median, p80 = np.quantile(tokens / np.asarray(seconds), (0.2, 0.5, 0.8)).tolist()
        return cls(median, p20, p80)

    def __str__(self):
        return f"{self.median:,.1f} ({self.p20:,.1f}-{self.p80:,.1f})"


@dataclass(frozen=True)
class Speed:
    """What measure found for one model.

    prefill: one forward over the prompts. decode: greedy steps of one token per sequence after it;
    None for a model without a key/value cache. parameter_bytes counts tied parameters once.
    peak_bytes: parameter_bytes plus the most that CUDA held beyond what it held before a repeat;
    None on other devices.
    """

    prefill: Rate
    decode: Rate | None
    parameter_bytes: int
    peak_bytes: int | None
    dtype: str

    @classmethod
    def from_dict(cls, record: dict | None) -> "Speed | None":
        """The inverse of dataclasses.asdict; None for None."""
        if record is None:
            return None
        decode = record["decode"] and Rate(**record["decode"])
        return cls(**{**record, "prefill": Rate(**record["prefill"]), "decode": decode})


@dataclass(frozen=True)
class Measurement:
    """Speed and memory of a model and, where asked for, of the dense model in the same run.

    Printed, it is a table. ratios: median tokens/s of the model / that of the dense model, so more
    than 1 is faster; None without a dense model.
    """

    model: Speed
    dense: Speed | None
    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    seed: int

    @property
    def ratios(self) -> dict[str, float | None] | None:
        if self.dense is None:
            return None
        return {phase: self._ratio(phase) for phase in ("prefill", "decode")}

    def _ratio(self, phase: str) -> float | None:
        model, dense = getattr(self.model, phase), getattr(self.dense, phase)
        return None if model is None or dense is None else model.median / dense.median

    @property
    def seconds(self) -> float:
        """What one repeat takes, of all models, at their median rates."""
        total = 0.0
        for speed in filter(None, (self.model, self.dense)):
            total += self.batch_size * self.prompt_tokens / speed.prefill.median
            if speed.decode is not None:
                total += self.batch_size * self.new_tokens / speed.decode.median
        return total

    def to_dict(self) -> dict:
        return {**asdict(self), "ratios": self.ratios}

    @classmethod
    def from_dict(cls, record: dict) -> "Measurement":
        """The inverse of to_dict."""
        fields = {name: value for name, value in record.items() if name != "ratios"}
        speeds = {name: Speed.from_dict(fields[name]) for name in ("model", "dense")}
        return cls(**{**fields, **speeds})

    def rows(self) -> list[list[str]]:
        """A table of text: a header, then a row for each phase and each kind of memory."""
        columns = {"dense": self.dense} if self.dense else {}
        columns["model"] = self.model
        rows = [["", *columns, *(["ratio"] if self.dense else [])]]
        for phase in ("prefill", "decode"):
            rates = [getattr(speed, phase) for speed in columns.values()]
            cells = ["no cache" if rate is None else str(rate) for rate in rates]
            ratio = (self.ratios or {}).get(phase)
            cells += [f"{ratio:.2f}x"] if ratio is not None else []
            rows.append([f"{phase}, tokens/s", *cells])
        for label, what in (("parameters, MB", "parameter_bytes"), ("peak, MB", "peak_bytes")):
            sizes = [getattr(speed, what) for speed in columns.values()]
            if None not in sizes:
                ratio = [f"{sizes[1] / sizes[0]:.2f}x"] if self.dense else []
                rows.append([label, *(f"{size / 1e6:,.1f}" for size in sizes), *ratio])
        return rows

    def __str__(self):
        return "\n".join([*_aligned(self.rows()), self.conditions()])

    def conditions(self) -> str:
        """What was run, and on what."""
        return (
            f"median (p20-p80) of {self.repeats}; batch {self.batch_size}, prompt "
            f"{self.prompt_tokens}, {self.new_tokens} new tokens; {self.model.dtype}, "
            f"{self.device}, {self.threads} threads"
        )


@torch.no_grad()
def measure(
    model: nn.Module,
    *,
    dense: nn.Module | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    once: Callable[[str, Callable[[], list]], list] | None = None,
) -> Measurement:
    """Times prefill and decode of a transformers model on random prompts, in eval mode.

    Each repeat runs every model once, in alternating order, after untimed ones that last at least
    0.5 s per model; the same prompts go to both. A prefill is one forward over [batch_size,
    prompt_tokens] that fills the cache and computes only the last logits where the model can;
    decode then takes new_tokens greedy steps, whatever they say. A model without a key/value cache
    (an encoder) is timed on the forward alone and has decode None. Training modes are restored;
    on CUDA the peak memory statistics are reset. progress is called with the number of repeats
    done. once(name, compute) may know what a repeat has measured, which is plain JSON, or calls
    compute: so a run that was cut off goes on, after untimed ones. Raises ValueError for sizes
    below 1, prompts longer than the model's positions, or models on different devices.
    """
    runners = [_Runner(each) for each in ((model,) if dense is None else (model, dense))]
    _check(runners, prompt_tokens, new_tokens, batch_size, repeats)
    prompts = _prompts(runners, batch_size, prompt_tokens, seed)
    for repeat in range(repeats):
        timed = functools.partial(_repeat, runners, prompts, new_tokens, repeat)
        found = timed() if once is None else once(f"repeat {repeat}", timed)
        for runner, record in zip(runners, found, strict=True):
            runner.records.append(record)
        if progress is not None:
            progress(repeat + 1)
    speeds = [runner.speed(prompts.numel(), batch_size * new_tokens) for runner in runners]
    return Measurement(
        speeds[0],
        speeds[1] if dense is not None else None,
        _device_name(prompts.device),
        torch.get_num_threads(),
        prompt_tokens,
        new_tokens,
        batch_size,
        repeats,
        seed,
    )


class _Runner:
    """One model, the arguments that its forward takes, and the seconds and bytes of its repeats."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.root = hf_model(model)
        accepted = forward_arguments(model)
        wanted = {"use_cache": True, "logits_to_keep": 1}
        self.arguments = {name: value for name, value in wanted.items() if name in accepted}
        self.may_cache = "past_key_values" in accepted
        self.device = input_device(model)
        self.warm = False
        self.records: list[dict] = []

    def timed(self, prompts: torch.Tensor, new_tokens: int) -> dict:
        """Seconds of prefill and decode, and CUDA's extra bytes, of one repeat; None for none."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        prefill, decode = self.run(prompts, new_tokens)
        extra = torch.cuda.max_memory_allocated(self.device) - held if cuda else None
        return {"prefill": prefill, "decode": decode, "extra_bytes": extra}

    def run(self, prompts: torch.Tensor, new_tokens: int) -> tuple[float, float | None]:
        """(prefill, decode) seconds of one repeat; decode None if the model returns no cache."""
        start = now(self.device)
        output = self.model(input_ids=prompts, **self.arguments)
        middle = now(self.device)
        if not self.may_cache or getattr(output, "past_key_values", None) is None:
            return middle - start, None
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            cache = output.past_key_values
            output = self.model(input_ids=token, past_key_values=cache, **self.arguments)
        return middle - start, now(self.device) - middle

    def speed(self, prompt_tokens: int, new_tokens: int) -> Speed:
        parameters = list(self.model.parameters())
        size = sum(p.numel() * p.element_size() for p in parameters)
        prefill, decode, extra = (
            [record[what] for record in self.records if record[what] is not None]
            for what in ("prefill", "decode", "extra_bytes")
        )
        return Speed(
            Rate.of(prompt_tokens, prefill),
            Rate.of(new_tokens, decode) if decode else None,
            size,
            size + max(extra) if extra else None,
            str(self.root.dtype).removeprefix("torch."),
        )


def _repeat(runners: list[_Runner], prompts, new_tokens: int, repeat: int) -> list[dict]:
    """What each runner takes for one repeat, after untimed ones where there were none yet."""
    for runner in runners:
        if not runner.warm:
            with evaluating(runner.model):
                _warm_up(runner, prompts, new_tokens)
            runner.warm = True
    found = {}
    for runner in runners if repeat % 2 else runners[::-1]:
        with evaluating(runner.model):
            found[runner] = runner.timed(prompts, new_tokens)
    return [found[runner] for runner in runners]


def _warm_up(runner: _Runner, prompts: torch.Tensor, new_tokens: int) -> None:
    start = now(runner.device)
    while True:
        runner.run(prompts, new_tokens)
        if now(runner.device) - start >= WARMUP_SECONDS:
            return


def now(device: torch.device) -> float:
    """Seconds on a clock that has waited for the device's queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable, *arguments) -> float:
    """How long work(*arguments) takes, which must wait for its own results."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def _prompts(runners: list[_Runner], batch_size: int, length: int, seed: int) -> torch.Tensor:
    vocabulary = min(vocabulary_size(runner.model) for runner in runners)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocabulary, (batch_size, length), generator=generator)
    return prompts.to(runners[0].device)


def _check(runners: list[_Runner], prompt_tokens, new_tokens, batch_size, repeats) -> None:
    sizes = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    devices = {runner.device for runner in runners}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model and dense must be on one device, got {names}")
    for runner in runners:
        longest = prompt_tokens + (new_tokens if runner.may_cache else 0)
        positions = getattr(runner.root.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(
                f"{type(runner.root).__name__} has {positions} positions, "
                f"prompt_tokens and new_tokens need {longest}"
            )


def environment(device: torch.device) -> dict:
    """What figures depend on besides the model and its inputs: versions, machine, threads."""
    return {
        "gatepack": gatepack.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": _device_name(device),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        for row in rows
    ]
