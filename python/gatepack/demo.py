"""Stage 7, command line: the main job from end to end, on a real model, with a report."""

import copy
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gatepack.checkpoint import saving
from gatepack.data import load_documents
from gatepack.files import plain, write_json
from gatepack.optional import require
from gatepack.plots import draw_report
from gatepack.progress import Log
from gatepack.recipe import (
    Inputs,
    RecipeConfig,
    check_reload,
    fine_tune,
    kept_by_plan,
    load_inputs,
    open_state,
    pack_and_check,
    plan_training,
    score,
    train_gated,
)
from gatepack.resume import State, fingerprint
from gatepack.timing import environment, measure
from gatepack.training import add_lora


@dataclass(frozen=True)
class DemoConfig(RecipeConfig):
    """What the demo runs: the recipe, then prefill and decode of so many tokens, so often."""

    out: Path = Path("out/demo")
    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 7

    def __post_init__(self):
        super().__post_init__()
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def run(config: DemoConfig, log: Log, known: dict[str, float] | None = None) -> dict:
    """Fine-tunes with gates and LoRA, packs, measures, saves to config.out; returns the report.

    known: perplexities ("base", "lora") that an earlier run with the same model, text and training
    has measured. Interrupted or failed, it goes on from its last finished stage (in training: step)
    when run again with the same settings. Raises Interrupted, ParityError, or ValueError/OSError
    with one sentence on what to change.
    """
    require("the demo", "peft", "matplotlib")
    documents = load_documents(config.text)
    inputs = load_inputs(config, documents, log)
    kept_by_plan(inputs.model, config)
    state = open_state(config, documents, log, model=fingerprint(inputs.model))
    for name, value in (known or {}).items():
        state.once(name, lambda value=value: value)
    held_out = inputs.held_out
    dense = copy.deepcopy(inputs.model)
    report = {
        "model": config.model,
        "target": config.target,
        "settings": plain(asdict(config)),
        "environment": environment(held_out.device),
        "perplexity": {
            "base": state.once("base", lambda: score(dense, held_out, "base model", log)),
            "lora": state.once("lora", lambda: _lora_only(inputs, config, state, log)),
        },
    }
    gated = train_gated(inputs, config, state, log).model
    packed, report["pack"], report["parity"] = pack_and_check(gated, held_out)
    report["perplexity"]["packed"] = score(packed, held_out, "packed model", log)
    with saving(packed, config.out, inputs.tokenizer) as folder:
        check_reload(packed, folder, held_out)
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
    report["samples"] = _samples(inputs.tokenizer, held_out, {"base": dense, "packed": packed})
    write_json(config.out / "report.json", report)
    draw_report(report, config.out / "report.png")
    state.clear()
    return report


def plan(config: DemoConfig, log: Log) -> dict:
    """What run would do and cost, as plan_training says it; the timing at the end comes on top.

    The fine-tuning without gates is counted in.
    """
    found = plan_training(config, log)
    seconds = found["seconds"]
    seconds["total"] += config.train.steps * seconds["step"] + seconds["scoring"]
    return {**found, "tokens": 2 * found["tokens"]}


def _lora_only(inputs: Inputs, config: DemoConfig, state: State, log: Log) -> float:
    title = "LoRA without gates"
    wrapped = add_lora(inputs.model, config.train)
    fine_tune(wrapped, inputs.windows, config.train, state.folder / "lora", title, log)
    found = score(wrapped, inputs.held_out, title, log)
    wrapped.unload()
    return found


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
