"""Stage 7, command line: runs of the default recipe, which can be cut off, and their parts."""

import copy
import functools
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

import gatepack
from gatepack.checkpoint import from_pretrained, saving
from gatepack.config import GateConfig
from gatepack.data import batches, load_documents, split_documents, to_windows
from gatepack.files import plain, refuse_out, write_json
from gatepack.hf import attach, detach, gates_of
from gatepack.layers import GATES_NAME, hf_model
from gatepack.methods.close_and_repair import CloseAndRepair, Closing
from gatepack.models import load_model, source_of, torch_device, torch_dtype
from gatepack.optional import require
from gatepack.packing import PackReport, pack
from gatepack.plots import draw_gate_map, draw_training
from gatepack.progress import Log
from gatepack.quality import ParityError, max_logit_difference, perplexity
from gatepack.resume import STATE, State, fingerprint, say_what_goes
from gatepack.rounding import compare
from gatepack.texts import check_length, sha256_of
from gatepack.timing import environment, seconds_of
from gatepack.training import (
    FineTuning,
    TrainConfig,
    add_lora,
    closing_batches,
)


@dataclass(frozen=True)
class RecipeConfig:
    """What is trained, on which text, and down to which size.

    target: kept fraction of the blocks' weights. close: fractions of the steps at which gates
    close, each time an equal part of the way there; 0 is before LoRA trains. out: the folder of the
    result and, until then, of what is finished so far. device: "auto" takes CUDA where there is
    one. eval_windows: held-out windows to score, at most.
    """

    model: str = "smollm2"
    text: str | Path | None = None
    target: float = 0.8
    close: tuple[float, ...] = CloseAndRepair.close
    out: Path = Path("out/gated")
    device: str = "auto"
    width_multiple: int = 32
    equal_layers: bool = False
    eval_windows: int = 24
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        object.__setattr__(self, "close", self.method().close)
        refuse_out(self.out, source_of(self.model))
        if self.eval_windows < 1:
            raise ValueError(f"eval_windows must be >= 1, got {self.eval_windows}")

    def gates(self) -> GateConfig:
        return GateConfig(
            noise=0.0,
            target=self.target,
            width_multiple=self.width_multiple,
            equal_layers=self.equal_layers,
            seed=self.train.seed,
        )

    def method(self) -> CloseAndRepair:
        return CloseAndRepair(
            self.gates(), self.close, self.train.calibration_batches, self.train.repaired,
            self.train.autocast,
        )  # fmt: skip


@dataclass(frozen=True)
class PackConfig:
    """Which gated checkpoint is packed and where to, and the held-out text that checks it.

    text: as it was trained on, so that the same part of it is held out. window in tokens; windows:
    at most so many. dtype: a name of gatepack.models.DTYPES.
    """

    model: str = "out/gated"
    text: str | Path | None = None
    out: Path = Path("out/packed")
    window: int = 256
    windows: int = 24
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self):
        if self.window < 2:
            raise ValueError(f"window must be >= 2 tokens, got {self.window}")
        if self.windows < 1:
            raise ValueError(f"windows must be >= 1, got {self.windows}")
        refuse_out(self.out, source_of(self.model))


@dataclass(frozen=True)
class Inputs:
    """A model on its device, its tokenizer, and windows of token ids to train on and to score."""

    model: nn.Module
    tokenizer: object
    windows: torch.Tensor
    held_out: torch.Tensor


@dataclass(frozen=True)
class Trained:
    """A gated PEFT model, and the loss of each step, nats per token."""

    model: nn.Module
    losses: list[float]


def train(config: RecipeConfig, log: Log) -> dict:
    """Trains LoRA, meanwhile prices, closes and repairs; saves the gated model.

    config.out gets the checkpoint with LoRA merged in, train.json (the report that is returned),
    losses.png and gates.png. Interrupted or failed, it goes on from its last finished stage (in
    training: step) when run again with the same settings. Raises Interrupted, ParityError, or
    ValueError, ImportError or OSError with one sentence on what to change.
    """
    require("training", "peft", "matplotlib")
    documents = load_documents(config.text)
    inputs = load_inputs(config, documents, log)
    kept_by_plan(inputs.model, config)
    state = open_state(config, documents, log, model=fingerprint(inputs.model))
    base = state.once("base", lambda: score(inputs.model, inputs.held_out, "base model", log))
    trained = train_gated(inputs, config, state, log)
    gated = trained.model.merge_and_unload()
    gates = gates_of(gated)
    report = {
        "model": config.model,
        "target": config.target,
        "kept_fraction": gates.kept_fraction(),
        "perplexity": {"base": base, "gated": score(gated, inputs.held_out, "gated model", log)},
        "losses": trained.losses,
        "settings": plain(asdict(config)),
        "environment": environment(inputs.held_out.device),
    }
    with saving(gated, config.out, inputs.tokenizer) as folder:
        check_reload(gated, folder, inputs.held_out)
        draw_training({"gates and LoRA": trained.losses}, folder / "losses.png")
        draw_gate_map(gates, folder / "gates.png")
        write_json(folder / "train.json", report)
    state.clear()
    return report


def plan_training(config: RecipeConfig, log: Log) -> dict:
    """What train would do and cost, from two timed steps; writes nothing.

    params: of the model, of its blocks' linears, of those the kept ones, and of LoRA. seconds: a
    step with every gate open, which is more than one with closed gates takes, and all steps, the
    batches of each calibration and repair, and scoring at that rate; pricing units and solving for
    the repair come on top. bytes: of the weights, and of what training keeps for LoRA (gradients
    and Adam's moments). Raises as train, where the target cannot be met too.
    """
    require("training", "peft")
    inputs = load_inputs(config, load_documents(config.text), log)
    parameters = list(inputs.model.parameters())
    kept = kept_by_plan(inputs.model, config)
    gates = attach(inputs.model, config.gates())
    wrapped = add_lora(inputs.model, config.train)
    lora = [p for p in wrapped.parameters() if p.requires_grad]
    step, scoring = _timed(wrapped, inputs, config.train, log)
    steps, tokens = config.train.steps, config.train.batch_size * config.train.window
    closing = len(config.close) * (config.train.calibration_batches + config.train.repaired)
    return {
        "model": config.model,
        "target": config.target,
        "windows": {"train": len(inputs.windows), "held_out": len(inputs.held_out)},
        "tokens": steps * tokens,
        "params": {
            "model": sum(p.numel() for p in parameters),
            "blocks": gates.costs.total,
            "kept": round(kept * gates.costs.total),
            "lora": sum(p.numel() for p in lora),
        },
        "seconds": {
            "step": step,
            "scoring": scoring,
            "total": (steps + closing) * step + 2 * scoring,
        },
        "bytes": {
            "weights": sum(p.numel() * p.element_size() for p in parameters),
            "training": sum(3 * p.numel() * p.element_size() for p in lora),
        },
        "environment": environment(inputs.held_out.device),
    }


def _timed(model, inputs: Inputs, config: TrainConfig, log: Log) -> tuple[float, float]:
    """Seconds of a training step, the second of two, and of scoring all held-out windows."""
    short = replace(config, steps=2, warmup_steps=0)
    marks = []
    with log.bar("timing a step", "step", short.steps) as tell:

        def on_step(run: FineTuning) -> None:
            marks.append(time.perf_counter())
            tell(run.step)

        FineTuning(model, inputs.windows, short).run(on_step)
    return marks[1] - marks[0], _seconds_of_scoring(model, inputs.held_out)


def _seconds_of_scoring(model: nn.Module, windows: torch.Tensor) -> float:
    """Of all windows, from one."""
    return len(windows) * seconds_of(perplexity, model, windows[:1])


def pack_checkpoint(config: PackConfig, log: Log) -> dict:
    """Packs a gated checkpoint into config.out, after comparing its logits; returns the report.

    config.out is written whole or not at all, with pack.json beside the weights. Cut off, it goes
    on from the last perplexity when run again with the same settings; packing itself takes seconds.
    Raises ParityError if the packed or the reloaded model gives other logits, and ValueError for a
    checkpoint without gates.
    """
    gated, held_out, tokenizer, documents = _load_gated(config, log)
    packed, packing, parity = pack_and_check(gated, held_out)
    state = open_state(config, documents, log, gated=fingerprint(gated))
    quality = {
        name: state.once(name, lambda name=name, m=m: score(m, held_out, f"{name} model", log))
        for name, m in (("gated", gated), ("packed", packed))
    }
    report = {
        "model": config.model,
        "pack": packing,
        "parity": parity,
        "perplexity": quality,
        "settings": plain(asdict(config)),
        "environment": environment(held_out.device),
    }
    with saving(packed, config.out, tokenizer) as folder:
        check_reload(packed, folder, held_out)
        write_json(folder / "pack.json", report)
    state.clear()
    return report


def plan_packing(config: PackConfig, log: Log) -> tuple[PackReport, float]:
    """What pack_checkpoint would keep, and the seconds of scoring both models, from one window.

    Packs in memory and writes nothing.
    """
    model, held_out, _, _ = _load_gated(config, log)
    seconds = 2 * _seconds_of_scoring(model, held_out)
    return pack(model), seconds


def _load_gated(config: PackConfig, log: Log) -> tuple[nn.Module, torch.Tensor, object, list[str]]:
    """(model, held-out windows, tokenizer, documents)."""
    device = torch_device(config.device)
    log.say(f"loading {config.model}")
    model, tokenizer = load_model(config.model, torch_dtype(config.dtype))
    try:
        gates_of(model)
    except ValueError as error:
        raise ValueError(
            f"{config.model} has no gates to pack: name a folder that gatepack train has written"
        ) from error
    documents = load_documents(config.text)
    check_length(model, config.window, "window")
    held_out = to_windows(split_documents(documents)[1], tokenizer, config.window)[: config.windows]
    return model.to(device), held_out.to(device), tokenizer, documents


def open_state(
    config: RecipeConfig | PackConfig, documents: list[str], log: Log, **inputs: str
) -> State:
    """What an earlier run with the same settings, text, inputs and version has finished."""
    say_what_goes(config.out, log)
    settings = {**plain(asdict(config)), "text_sha256": sha256_of(documents), **inputs}
    return State.open(Path(config.out) / STATE, {**settings, "version": gatepack.__version__})


def kept_by_plan(model: nn.Module, config: RecipeConfig) -> float:
    """The kept fraction of a plan for config.target, whatever its units are worth.

    Raises ValueError where no shape of the model meets it. The model stays as it is.
    """
    gates = attach(model, config.gates())
    try:
        return gates.check_target()
    finally:
        detach(model)


def load_inputs(config: RecipeConfig, documents: list[str], log: Log) -> Inputs:
    """config.model on its device, and its text as windows; every sixth document is held out.

    Raises ValueError for a model that has gates, and for batches larger than the text.
    """
    training, held_out = split_documents(documents)
    device = torch_device(config.device)
    log.say(f"loading {config.model}")
    model, tokenizer = load_model(config.model)
    if hasattr(hf_model(model), GATES_NAME):
        raise ValueError(
            f"{config.model} has gates already: train a dense model, or make a packed one of this "
            f"with gatepack pack {config.model} and train that"
        )
    length = config.train.window
    check_length(model, length, "window")
    windows = to_windows(training, tokenizer, length)
    batches(windows, config.train.batch_size, config.train.steps, config.train.seed)
    scored = to_windows(held_out, tokenizer, length)[: config.eval_windows]
    log.say(f"{len(windows)} training, {len(scored)} held-out windows of {length} tokens")
    return Inputs(model.to(device), tokenizer, windows.to(device), scored.to(device))


def train_gated(inputs: Inputs, config: RecipeConfig, state: State, log: Log) -> Trained:
    """Trains LoRA and gates on inputs.model, which close down to the target meanwhile."""
    model, train = add_lora(inputs.model, config.train), config.train
    drawn = closing_batches(inputs.windows, train)
    closing = config.method().start(model, train.steps, drawn, log)
    folder = state.folder / "gated"
    losses = fine_tune(model, inputs.windows, train, folder, "gates and LoRA", log, closing)
    return Trained(model, losses)


def fine_tune(
    model: nn.Module,
    windows: torch.Tensor,
    config: TrainConfig,
    folder: Path,
    title: str,
    log: Log,
    closing: Closing | None = None,
) -> list[float]:
    """FineTuning with a bar that shows the loss, and what is open; returns the losses."""
    tuning = FineTuning(model, windows, config, folder, beside=closing)
    with log.bar(title, "step", config.steps, tuning.step, leave=True) as tell:

        @functools.cache
        def shown(closings: int) -> dict[str, str]:
            gates = closing.gates
            return {
                "open": f"{gates.open_fraction():.1%}",
                "budget": f"{gates.kept_fraction():.1%}/{gates.config.target:.1%}",
            }

        def on_step(run: FineTuning) -> None:
            budget = {} if closing is None else shown(closing.closings)
            tell(run.step, loss=round(run.losses[-1], 3), **budget)

        losses = tuning.run(on_step)
    if closing is not None:
        closing.finish()
    return losses


def pack_and_check(gated: nn.Module, held_out: torch.Tensor) -> tuple[nn.Module, dict, dict]:
    """(packed copy, PackReport and parity as dicts); adapters of the copy are merged first.

    Raises ParityError if logits on held_out differ by more than rounding explains.
    """
    packed = copy.deepcopy(gated)
    if hasattr(packed, "merge_and_unload"):
        packed = packed.merge_and_unload()
    report = pack(packed)
    packed.eval()
    sample = held_out[:4]
    return packed, report.to_dict(), compare(packed, gated, sample, "the gated model")


def check_reload(model: nn.Module, folder: Path, held_out: torch.Tensor) -> None:
    """Raises ParityError unless the checkpoint in folder gives the model's logits, bit for bit."""
    reloaded = from_pretrained(folder).to(held_out.device).eval()
    difference = max_logit_difference(model, reloaded, held_out[:2])
    if difference != 0:
        raise ParityError(
            f"the model reloaded from {folder} gives logits that differ by {difference:.3g}"
        )


def score(model: nn.Module, held_out: torch.Tensor, what: str, log: Log) -> float:
    """The perplexity of windows [n, length], with a bar."""
    with log.bar(f"scoring {what}", "window", len(held_out)) as tell:
        return perplexity(model, held_out, progress=tell)
