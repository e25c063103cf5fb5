"""Stage 7, command line: the main job from end to end, on a real model, with a report."""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

import gatepack
from gatepack.checkpoint import from_pretrained, save_pretrained
from gatepack.config import GateConfig
from gatepack.data import load_documents, split_documents, to_windows
from gatepack.hf import attach, layers_of
from gatepack.models import load_model, torch_device
from gatepack.optional import require
from gatepack.packing import pack
from gatepack.plots import draw_report
from gatepack.progress import Log
from gatepack.quality import max_logit_difference, perplexity, token_logits
from gatepack.texts import sha256_of
from gatepack.timing import environment, measure
from gatepack.training import (
    FineTuning,
    TrainConfig,
    add_lora,
    close_to_budget,
    load_gated_base,
    save_gated_base,
    write_json,
)

STATE = ".resume"


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs.

    target: kept fraction of the blocks' weights. device: "auto" takes CUDA where there is one.
    """

    model: str = "smollm2"
    text: str | None = None
    target: float = 0.8
    out: Path = Path("out/demo")
    device: str = "auto"
    width_multiple: int = 32
    equal_layers: bool = False
    eval_windows: int = 24
    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 7
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        self.gates()
        for name in ("eval_windows", "prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def gates(self) -> GateConfig:
        return GateConfig(
            noise=0.0,
            target=self.target,
            width_multiple=self.width_multiple,
            equal_layers=self.equal_layers,
            seed=self.train.seed,
        )


class ParityError(FloatingPointError):
    """The packed model does not compute what the gated one did."""


def run(config: DemoConfig, log: Log, known: dict[str, float] | None = None) -> dict:
    """Fine-tunes with gates and LoRA, packs, measures, saves to config.out; returns the report.

    known: perplexities ("base", "lora") that an earlier run with the same model, text and training
    has measured. Interrupted or failed, it goes on from its last finished stage (in training: step)
    when run again with the same settings. Raises Interrupted, ParityError, or ValueError/OSError
    with one sentence on what to change.
    """
    require("the demo", "peft", "matplotlib")
    documents = load_documents(config.text)
    train_documents, held_out_documents = split_documents(documents)
    device = torch_device(config.device)
    state = State.open(config, documents)
    for name, value in (known or {}).items():
        state.once(name, lambda value=value: value)
    log.say(f"loading {config.model}")
    model, tokenizer = load_model(config.model)
    model.to(device)
    windows = to_windows(train_documents, tokenizer, config.train.window).to(device)
    held_out = to_windows(held_out_documents, tokenizer, config.train.window)
    held_out = held_out[: config.eval_windows].to(device)
    log.say(
        f"{len(windows)} training, {len(held_out)} held-out windows of {config.train.window} tokens"
    )
    dense = copy.deepcopy(model)

    report = {
        "model": config.model,
        "target": config.target,
        "settings": _plain(asdict(config)),
        "environment": environment(device),
        "perplexity": {
            "base": state.once("base", lambda: _score(dense, held_out, "base model", log))
        },
    }
    report["perplexity"]["lora"] = state.once(
        "lora", lambda: _lora_only(model, windows, held_out, config, state, log)
    )
    gated = _train_gated(model, windows, config, state, log)
    packed, report["pack"], report["parity"] = _pack_and_check(gated, held_out)
    report["perplexity"]["packed"] = _score(packed, held_out, "packed model", log)
    save_pretrained(packed, config.out, tokenizer)
    report["reload_identical"] = _reloads_identically(packed, config.out, held_out)
    report["bytes_on_disk"] = {
        "base": _bytes_on_disk(dense, config.out),
        "packed": _weight_bytes(config.out),
    }
    log.say("timing dense and packed, interleaved")
    report["speed"] = measure(
        packed,
        dense=dense,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        repeats=config.repeats,
    ).to_dict()
    report["samples"] = _samples(tokenizer, held_out, {"base": dense, "packed": packed})
    write_json(config.out / "report.json", report)
    draw_report(report, config.out / "report.png")
    state.clear()
    return report


@dataclass(frozen=True)
class State:
    """What is finished so far, in a folder that a rerun with the same settings finds."""

    folder: Path

    @classmethod
    def open(cls, config: DemoConfig, documents: list[str]) -> "State":
        folder = config.out / STATE
        wanted = {
            **_plain(asdict(config)),
            "text_sha256": sha256_of(documents),
            "version": gatepack.__version__,
        }
        path = folder / "settings.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{path} is damaged ({error}); pass --restart to start over"
                ) from error
            differs = sorted(key for key in wanted if found.get(key) != wanted[key])
            if differs:
                raise ValueError(
                    f"{folder} holds an unfinished run with another {', '.join(differs)}; "
                    "pass --restart to drop it or --out to write elsewhere"
                )
        else:
            write_json(path, wanted)
        return cls(folder)

    def once(self, name: str, compute: Callable[[], float]) -> float:
        """The stored result of a stage, or compute's, which is then stored."""
        path = self.folder / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if name not in results:
            results[name] = compute()
            write_json(path, results)
        return results[name]

    def clear(self) -> None:
        shutil.rmtree(self.folder)


def _lora_only(model, windows, held_out, config: DemoConfig, state: State, log: Log) -> float:
    wrapped = add_lora(model, config.train)
    _train(wrapped, windows, config, state.folder / "lora", "LoRA without gates", log)
    score = _score(wrapped, held_out, "LoRA without gates", log)
    wrapped.unload()
    return score


def _train_gated(model, windows, config: DemoConfig, state: State, log: Log) -> nn.Module:
    gates = attach(model, config.gates())
    folder = state.folder / "gated"
    if not load_gated_base(gates, folder):
        with log.phases() as progress:
            close_to_budget(model, windows, config.train, progress)
        save_gated_base(gates, folder)
    wrapped = add_lora(model, config.train)
    _train(wrapped, windows, config, folder, "gates and LoRA", log, gates)
    return wrapped


def _train(
    model, windows, config: DemoConfig, folder: Path, title: str, log: Log, gates=None
) -> None:
    tuning = FineTuning(model, windows, config.train, folder)
    budget = {}
    if gates is not None:
        budget = {
            "open": f"{gates.open_fraction():.1%}",
            "budget": f"{gates.kept_fraction():.1%}/{config.target:.1%}",
        }
    with log.bar(title, "step", config.train.steps, tuning.step, leave=True) as tell:
        tuning.run(lambda run: tell(run.step, loss=round(run.losses[-1], 3), **budget))


def _pack_and_check(wrapped, held_out) -> tuple[nn.Module, dict, dict]:
    """Packs a copy and compares its logits with the gated model's; ParityError beyond rounding."""
    packed = copy.deepcopy(wrapped).merge_and_unload()
    pack_report = pack(packed)
    packed.eval()
    sample = held_out[:4]
    difference = max_logit_difference(wrapped, packed, sample)
    with torch.no_grad():
        largest = float(token_logits(packed, sample[:1]).abs().max())
    # One rounding of the running sum per sublayer and linear, added up in the worst direction.
    layers = layers_of(packed)
    roundings = len(layers) * len(layers[0].family.linears)
    bound = torch.finfo(packed.dtype).eps * roundings * largest
    parity = {"max_abs_difference": difference, "bound": bound, "largest_logit": largest}
    if not difference <= bound:
        raise ParityError(
            f"packed and gated logits differ by {difference:.3g}, "
            f"more than rounding explains ({bound:.3g})"
        )
    return packed, pack_report.to_dict(), parity


def _reloads_identically(packed, folder: Path, held_out) -> bool:
    reloaded = from_pretrained(folder).to(held_out.device).eval()
    difference = max_logit_difference(packed, reloaded, held_out[:2])
    if difference != 0:
        raise ParityError(
            f"the model reloaded from {folder} gives logits that differ by {difference:.3g}"
        )
    return True


def _score(model, held_out, what: str, log: Log) -> float:
    with log.bar(f"scoring {what}", "window", len(held_out)) as tell:
        return perplexity(model, held_out, progress=tell)


def _bytes_on_disk(model: nn.Module, out: Path) -> int:
    with tempfile.TemporaryDirectory(prefix=".dense.", dir=out) as folder:
        model.save_pretrained(folder)
        return _weight_bytes(Path(folder))


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def _samples(tokenizer, held_out, models: dict[str, nn.Module]) -> dict[str, str]:
    """A greedy continuation of held-out text by each model."""
    prompt = held_out[:1, :48]
    samples = {"prompt": tokenizer.decode(prompt[0])}
    for name, model in models.items():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=1.1,
        )
        samples[name] = tokenizer.decode(tokens[0, prompt.shape[1] :])
    return samples


def _plain(value):
    """value with paths as strings and tuples as lists, as JSON gives them back."""
    return json.loads(json.dumps(value, default=str))
