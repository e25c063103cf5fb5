"""Stage 7, command line: a packed model timed beside the dense one, as a report and a page."""

import base64
import copy
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from torch import nn

from gatepack.files import plain, replacing, write_json
from gatepack.inspection import identify
from gatepack.layers import hf_model
from gatepack.models import load_model, torch_device, torch_dtype
from gatepack.optional import require
from gatepack.packing import pack
from gatepack.plots import draw_bench
from gatepack.progress import Log
from gatepack.resume import STATE, State
from gatepack.timing import Measurement, environment, measure

FORMAT_VERSION = 1
_KINDS = ("heads", "kv_heads", "channels")


@dataclass(frozen=True)
class BenchConfig:
    """Which model is timed, and on what.

    model: a packed model; a gated one is packed first, and a dense one is timed alone unless dense
    names another. dense: what to time it beside; None for one of the same config with random
    weights, which take as long. Prompts are random too. dtype: a name of gatepack.models.DTYPES.
    """

    model: str = "out/packed"
    dense: str | None = None
    out: Path = Path("out/bench")
    device: str = "auto"
    dtype: str = "auto"
    prompt_tokens: int = 256
    new_tokens: int = 32
    batch_size: int = 1
    repeats: int = 5


def run(config: BenchConfig, log: Log) -> dict:
    """Times config.model and the dense one in turn; returns the report.

    config.out gets bench.json (the report), bench.png, and bench.html, which holds both and reads
    nothing else. The models take turns within each repeat; a run that was cut off goes on from its
    last repeat when run again with the same settings, on the same machine. Raises ValueError as
    load_model and measure do, and ImportError where matplotlib is missing.
    """
    require("the picture", "matplotlib")
    model, dense = _load(config, log)
    facts = {
        **_identities(model, dense, config),
        "settings": plain(asdict(config)),
        "environment": environment(torch_device(config.device)),
    }
    state = State.open(config.out / STATE, plain(facts))
    with log.bar("timing", "repeat", config.repeats) as tell:
        speed = _measure(model, dense, config, config.repeats, tell, state.once)
    report = {
        "format": FORMAT_VERSION,
        **facts,
        "layers": _layers(model, dense),
        "speed": speed.to_dict(),
    }
    write_json(config.out / "bench.json", report)
    draw_bench(report, config.out / "bench.png")
    with replacing(config.out / "bench.html") as path:
        path.write_text(page(report, (config.out / "bench.png").read_bytes()), encoding="utf-8")
    state.clear()
    return report


def plan(config: BenchConfig, log: Log) -> dict:
    """What run would time, and how long it would take, from one repeat; writes nothing."""
    model, dense = _load(config, log)
    measured = _measure(model, dense, config, 1)
    return {
        **_identities(model, dense, config),
        "seconds": config.repeats * measured.seconds,
        "environment": environment(torch_device(config.device)),
    }


def page(report: dict, png: bytes) -> str:
    """The report as one HTML page that needs no other file: tables, the picture, all settings."""
    speed, model = Measurement.from_dict(report["speed"]), report["model"]
    title = f"{model['name']}: {model['kept_fraction']:.1%} of the block weights kept"
    widths = [["gate", "dense", "kept"]]
    widths += [[row["gate"], row["before"], row["kept"]] for row in report["layers"]]
    details = {**report["settings"], **report["environment"]}
    picture = base64.b64encode(png).decode("ascii")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{escape(title)}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: 0.2em 1em; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style>
<h1>{escape(title)}</h1>
{_table(speed.rows())}
<p>{escape(speed.conditions())}. {escape(beside(report))}</p>
<img alt="tokens per second, memory and widths" src="data:image/png;base64,{picture}">
<h2>Widths</h2>
{_table(widths)}
<h2>Settings</h2>
{_table([["", ""], *map(list, details.items())])}
</html>
"""


def beside(report: dict) -> str:
    """A sentence on the dense model."""
    if report["dense"] is None:
        return "It was timed alone."
    return f"Dense is {report['dense']['name']}."


def _table(rows: list[list]) -> str:
    header, *body = rows
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in body]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _load(config: BenchConfig, log: Log) -> tuple[nn.Module, nn.Module | None]:
    """(the model, packed; the dense one, or None for a dense model alone), on their device."""
    device, dtype = torch_device(config.device), torch_dtype(config.dtype)
    log.say(f"loading {config.model}")
    model, _ = load_model(config.model, dtype)
    state = identify(model)["state"]
    if state == "gated":
        log.say("packing it in memory")
        pack(model)
    if config.dense is not None:
        log.say(f"loading {config.dense}")
        dense, _ = load_model(config.dense, dtype)
    elif state == "dense":
        return model.to(device).eval(), None
    else:
        dense = _dense_twin(hf_model(model))
    return model.to(device).eval(), dense.to(device).eval()


def _dense_twin(root: nn.Module) -> nn.Module:
    """The dense model that a packed one's config describes, with random weights."""
    config = copy.deepcopy(root.config)
    del config.gatepack
    return type(root)(config).to(root.dtype)


def _measure(
    model, dense, config: BenchConfig, repeats: int, progress=None, once=None
) -> Measurement:
    return measure(
        model,
        dense=dense,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        batch_size=config.batch_size,
        repeats=repeats,
        progress=progress,
        once=once,
    )


def _identities(model: nn.Module, dense: nn.Module | None, config: BenchConfig) -> dict:
    return {
        "model": identify(model, config.model),
        "dense": None
        if dense is None
        else identify(dense, config.dense or "the same config with random weights"),
    }


def _layers(model: nn.Module, dense: nn.Module | None) -> list[dict]:
    """Units of each layer, dense and kept; nothing for families without a row in the table."""
    kept = identify(model)["widths"] or {}
    before = (identify(dense)["widths"] if dense is not None else kept) or {}
    return [
        {"gate": f"layers.{i}.{kind}", "kind": kind, "before": was, "kept": now}
        for kind in _KINDS
        for i, (was, now) in enumerate(zip(before.get(kind, ()), kept.get(kind, ()), strict=False))
    ]
