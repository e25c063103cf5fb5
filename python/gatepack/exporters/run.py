"""Stage 7, command line: export by name, with a text to compare on and a timing for the card."""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gatepack.data import load_documents, split_documents, to_windows
from gatepack.exporters import check_options, export, plan
from gatepack.files import plain, refuse_out
from gatepack.inspection import identify
from gatepack.models import load_model, source_of, torch_dtype
from gatepack.packing import pack
from gatepack.progress import Log
from gatepack.quality import ParityError, input_device, perplexity
from gatepack.resume import STATE, State, fingerprint, say_what_goes
from gatepack.texts import check_length, sha256_of
from gatepack.timing import environment, measure, seconds_of

# Per weight; of q8_0, a block of 32 has a scale of 2.
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "q8_0": 34 / 32}


@dataclass(frozen=True)
class ExportConfig:
    """What is written where, and on what it is compared.

    model: as load_model takes it; a gated one is packed in memory first. text: as load_documents
    takes it; the part that train holds out is cut into windows of `window` tokens, and the first so
    many are used. For the card: base, the dense model; data, what it was pruned or trained on;
    speed, whether to time it.
    """

    model: str
    out: Path
    format: str = "uniform"
    dtype: str = "auto"
    text: Path | None = None
    window: int = 128
    windows: int = 4
    base: str = ""
    data: str = ""
    speed: bool = True
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 3

    def __post_init__(self):
        check_options(self.format, self.dtype)
        refuse_out(self.out, source_of(self.model))
        for name in ("window", "windows", "prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def run(config: ExportConfig, log: Log) -> dict:
    """Loads config.model, exports it to config.out, and returns export's report.

    Cut off, it goes on from its last finished repeat, conversion or comparison when run again with
    the same settings, on the same machine.
    """
    model, tokenizer = _load(config, log)
    windows = _windows(config, model, tokenizer)
    facts = {
        "settings": plain(asdict(config)),
        "model": fingerprint(model),
        "windows": sha256_of([str(windows.tolist())]),
        "environment": environment(input_device(model)),
    }
    say_what_goes(config.out, log)
    state = State.open(config.out / STATE, facts)
    speed = None
    if config.speed:
        with log.bar("timing", "repeat", config.repeats) as tell:
            speed = measure(
                model,
                prompt_tokens=config.prompt_tokens,
                new_tokens=config.new_tokens,
                repeats=config.repeats,
                progress=tell,
                once=state.once,
            )
    try:
        report = export(
            model,
            config.out,
            config.format,
            tokenizer=tokenizer,
            dtype=config.dtype,
            windows=windows,
            base=config.base,
            data=config.data,
            speed=speed,
            log=log,
            state=state,
        )
    except ParityError:
        state.clear()  # what was written is wrong
        with contextlib.suppress(OSError):
            config.out.rmdir()
        raise
    state.clear()
    return report


def dry_run(config: ExportConfig, log: Log) -> dict:
    """Whether the format holds the model (else ValueError), what it is and costs; writes nothing.

    bytes: of the weights as they would be written. seconds: of timing, from one repeat, and of
    scoring the windows twice, from one of them; writing, and what else is compared, come on top.
    """
    model, tokenizer = _load(config, log)
    windows = _windows(config, model, tokenizer)
    seconds = {"comparing": 2 * len(windows) * seconds_of(perplexity, model, windows[:1])}
    if config.speed:
        measured = measure(
            model, prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens, repeats=1
        )
        seconds["timing"] = config.repeats * measured.seconds
    facts = identify(model, config.model)
    per_weight = _BYTES.get(config.dtype, facts["bytes"] / facts["parameters"])
    return {
        "format": config.format,
        "model": facts,
        "bytes": round(per_weight * facts["parameters"]),
        "seconds": seconds,
        "environment": environment(input_device(model)),
    }


def _windows(config: ExportConfig, model: nn.Module, tokenizer) -> torch.Tensor:
    check_length(model, config.window, "window")
    documents = split_documents(load_documents(config.text))[1]
    return to_windows(documents, tokenizer, config.window)[: config.windows]


def _load(config: ExportConfig, log: Log) -> tuple[nn.Module, object]:
    """(packed model, tokenizer), of which the format is known to hold the model."""
    log.say(f"loading {config.model}")
    model, tokenizer = load_model(config.model, torch_dtype("auto"))
    if identify(model)["state"] == "gated":
        log.say("packing it in memory")
        pack(model)
    plan(model, config.format, tokenizer=tokenizer, dtype=config.dtype)
    return model.eval(), tokenizer
