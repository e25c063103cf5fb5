"""Stage 6, save: pictures of what gates keep, of training, and of speed and quality afterwards."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gatepack.gates import GateSet

# Okabe and Ito's palette: told apart by every common form of colour blindness.
_DENSE, _LORA, _PACKED = "#999999", "#E69F00", "#0072B2"
_RUNS = (_PACKED, _LORA, "#009E73", "#CC79A7", "#D55E00", _DENSE)
_PHASES = ("prefill", "decode")
_PERPLEXITIES = (
    ("base", "base", _DENSE),
    ("lora", "LoRA,\nno gates", _LORA),
    ("packed", "packed", _PACKED),
)


def draw_report(report: dict, path: str | os.PathLike) -> None:
    """Writes a PNG of 1200 x 800 pixels: kept units per layer, tokens/s, and perplexity.

    report: {"pack": PackReport.to_dict(), "speed": Measurement.to_dict(), "perplexity": {"base",
    "lora", "packed"}, "model": its name, "target": wanted fraction of the blocks' weights}. What
    was not measured (None or absent in "speed" and "perplexity") is left out. Uses matplotlib
    without touching its global state; raises ImportError with the pip line if it is missing and
    ValueError if a key of the report is.
    """
    for key in ("pack", "speed", "perplexity", "model", "target"):
        if key not in report:
            raise ValueError(f"report has no {key!r}, only {sorted(report)}")
    figure = _figure(12, 8)
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    _draw_widths(left.subplots(2, 1), report["pack"]["layers"])
    _draw_speed_and_perplexity(right, report["speed"], report["perplexity"])
    kept, target = report["pack"]["kept_fraction"], report["target"]
    title = f"{report['model']}: {kept:.1%} of the blocks' weights kept (target {target:.1%})"
    figure.suptitle(title, fontsize=14)
    figure.savefig(Path(path), format="png")


def draw_bench(report: dict, path: str | os.PathLike) -> None:
    """Writes a PNG of 1200 x 800 pixels: tokens/s and memory, and units per layer below.

    report: of gatepack.bench.run. Raises ImportError with the pip line if matplotlib is missing.
    """
    figure = _figure(12, 8)
    top, bottom = figure.subfigures(2, 1)
    axes = top.subplots(1, 3)
    for each, phase in zip(axes, _PHASES, strict=False):
        _draw_phase(each, report["speed"], phase)
    _draw_memory(axes[2], report["speed"])
    _draw_widths(bottom.subplots(1, 2), report["layers"])
    model = report["model"]
    title = f"{model['name']}: {model['kept_fraction']:.1%} of the blocks' weights kept"
    figure.suptitle(title, fontsize=14)
    figure.savefig(Path(path), format="png")


def draw_tradeoff(reports: Sequence[dict], path: str | os.PathLike) -> None:
    """Writes a PNG of 1500 x 500 pixels: quality and speed by sparsity, and quality by speed.

    reports: of gatepack.evaluation.evaluate, one per model, all on the same text. Sparsity is the
    removed fraction of the blocks' weights. Quality is the in-domain perplexity (pooled, if there
    are several texts), or bits per byte where tokenizers differ; speed is that of decoding (else of
    prefill), and what was not measured is left out. Raises ValueError for reports without or with
    different texts, and ImportError with the pip line if matplotlib is missing.
    """
    if not reports:
        raise ValueError("reports must hold at least one report, got none")
    for report in reports:
        _refuse_undrawable(report)
    texts = [_last_text(report) for report in reports]
    if any(text["inputs"] != texts[0]["inputs"] for text in texts):
        raise ValueError("the reports score different texts, or in different windows")
    same_tokens = all(text.get("tokens") == texts[0].get("tokens") for text in texts)
    metric = "perplexity" if same_tokens else "bits_per_byte"
    names = [report["model"]["name"] or report["model"]["class"] for report in reports]
    sparsity = [100 * (1 - report["model"]["kept_fraction"]) for report in reports]
    if any(metric not in text["metrics"] for text in texts):
        raise ValueError(f"a report has no {metric} of its in-domain text")
    quality = [text["metrics"][metric] for text in texts]
    phase, speed = _speeds(reports)
    figure = _figure(15, 5)
    axes = figure.subplots(1, 3)
    removed = "block weights removed, %"
    quality_label = f"{metric.replace('_', ' ')} (lower is better)"
    _scatter(axes[0], names, sparsity, quality, removed, quality_label)
    _scatter(axes[1], names, sparsity, speed, removed, f"{phase}, tokens/s")
    _scatter(axes[2], names, speed, quality, f"{phase}, tokens/s", quality_label)
    figure.savefig(Path(path), format="png")


def draw_gate_map(gates: GateSet, path: str | os.PathLike) -> None:
    """Writes a PNG of 1200 x 800 pixels: noiseless gate values, a row per layer, by kind of gate.

    Closed units (exactly 0) are all but white, and units that a narrower layer does not have grey.
    Raises ImportError with the pip line if matplotlib is missing.
    """
    values = gates.split(gates.deterministic_values().detach().cpu())
    kinds = sorted({gate.kind for _, gate in gates.items()}, reverse=True)
    figure = _figure(12, 8)
    grid = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for axes, kind in zip(grid, kinds, strict=True):
        named = [(name, values[name]) for name, gate in gates.items() if gate.kind == kind]
        table = np.full((len(named), max(len(row) for _, row in named)), np.nan)
        for i, (_, row) in enumerate(named):
            table[i, : len(row)] = row.numpy()
        axes.set_facecolor(_DENSE)
        image = axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        share = f"{int((table > 0).sum()):,} of {int((~np.isnan(table)).sum()):,}"
        axes.set_title(f"Open {kind}: {share}", loc="left")
        axes.set_xlabel(f"unit of {kind}")
        axes.set_ylabel("layer")
        layers = [_layer_number(name, i) for i, (name, _) in enumerate(named)]
        every = -(-len(layers) // 10)
        axes.set_yticks(range(0, len(layers), every), layers[::every])
    figure.colorbar(image, ax=list(grid), label="gate value")
    figure.suptitle(f"{gates.kept_fraction():.1%} of the budget kept", fontsize=14)
    figure.savefig(Path(path), format="png")


def draw_training(losses: Mapping[str, Sequence[float]], path: str | os.PathLike) -> None:
    """Writes a PNG of 1000 x 600 pixels: the training loss of each step, by name of the run.

    losses: as FineTuning.losses has them. Runs of 20 steps or more also get their mean over the
    last tenth of the steps, as a thick line over a thin one. Raises ValueError for a run without
    steps and ImportError with the pip line if matplotlib is missing.
    """
    for name, run in losses.items():
        if len(run) == 0:
            raise ValueError(f"the run {name!r} has no steps")
    figure = _figure(10, 6)
    axes = figure.subplots()
    _clean(axes)
    for i, (name, run) in enumerate(losses.items()):
        color = _RUNS[i % len(_RUNS)]
        steps = np.arange(1, len(run) + 1)
        span = len(run) // 10
        smooth = span >= 2
        axes.plot(
            steps, run, color=color, alpha=0.35 if smooth else 1, label=None if smooth else name
        )
        if smooth:
            mean = np.convolve(run, np.ones(span) / span, "valid")
            axes.plot(steps[span - 1 :], mean, color=color, linewidth=2, label=name)
    axes.set_title("Training loss", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    figure.savefig(Path(path), format="png")


def _figure(width: float, height: float):
    """A figure of 100 pixels per inch that leaves matplotlib's global state alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    return figure


def _refuse_undrawable(report: dict) -> None:
    """ValueError for a report that does not say which model it is of, or has a time of 0."""
    model = report.get("model")
    model = model if isinstance(model, dict) else {}
    for field, form in (("name", str), ("class", str), ("kept_fraction", int | float)):
        if not isinstance(model.get(field), form):
            raise ValueError(f"a report has {model.get(field)!r} for the {field} of its model")
    for entry in report["entries"]:
        wrong = [v for v in entry["metrics"].values() if entry["kind"] == "latency" and not v > 0]
        if wrong:
            raise ValueError(f"the report of {model['name']!r} has a latency of {wrong[0]!r}")


def _last_text(report: dict) -> dict:
    """The in-domain text of a report, the pooled one if there are several."""
    found = [entry for entry in report["entries"] if entry["kind"] == "text"]
    if not found:
        raise ValueError(f"the report of {report['model']['name']!r} has no in-domain text")
    return found[-1]


def _speeds(reports: Sequence[dict]) -> tuple[str, list[float | None]]:
    """(phase, tokens/s per report, None where it was not measured)."""
    metrics = [
        next((e["metrics"] for e in report["entries"] if e["kind"] == "latency"), {})
        for report in reports
    ]
    phase = "decode" if any("decode_ms_per_token" in each for each in metrics) else "prefill"
    milliseconds = [each.get(f"{phase}_ms_per_token") for each in metrics]
    return phase, [None if ms is None else 1000 / ms for ms in milliseconds]


def _scatter(axes, names, xs, ys, x_label: str, y_label: str) -> None:
    points = sorted(
        (x, y, name)
        for x, y, name in zip(xs, ys, names, strict=True)
        if x is not None and y is not None
    )
    if not points:
        _say(axes, "not measured")
        return
    _clean(axes)
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=_PACKED)
    for x, y, name in points:
        axes.annotate(name, (x, y), (5, 5), textcoords="offset points", fontsize="small")
    axes.margins(0.15)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def _draw_widths(pair, layers: list[dict]) -> None:
    """layers: {"kind", "gate" (its name), "before", "kept"} for each layer and kind."""
    for axes, kind in zip(pair, ("heads", "channels"), strict=True):
        rows = [row for row in layers if row["kind"] == kind]
        _clean(axes)
        if not rows:
            _say(axes, f"{kind} were not gated")
            continue
        numbers = [_layer_number(row["gate"], i) for i, row in enumerate(rows)]
        kept, before = [row["kept"] for row in rows], [row["before"] for row in rows]
        share = f"{sum(kept):,} of {sum(before):,} ({sum(kept) / sum(before):.0%})"
        axes.set_title(f"Kept {kind}: {share}", loc="left")
        axes.margins(x=0.01)
        axes.bar(numbers, kept, width=0.8, color=_PACKED, label="packed")
        axes.bar(numbers, before, width=0.8, fill=False, edgecolor=_DENSE, label="dense")
        axes.set_xlabel("layer")
        axes.set_ylabel(f"{kind} per layer")
        axes.set_ylim(0, 1.15 * max(before))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper right", ncols=2, frameon=False, borderaxespad=0)


def _layer_number(gate: str, otherwise: int) -> int:
    number = re.search(r"\.(\d+)\.", gate)
    return int(number.group(1)) if number else otherwise


def _draw_speed_and_perplexity(figure, speed: dict, perplexity: dict) -> None:
    grid = figure.add_gridspec(2, 2)
    for column, phase in enumerate(_PHASES):
        _draw_phase(figure.add_subplot(grid[0, column]), speed, phase)
    _draw_perplexity(figure.add_subplot(grid[1, :]), perplexity)


def _draw_phase(axes, speed: dict, phase: str) -> None:
    bars = [
        (label, speed[key][phase], color)
        for key, label, color in (("dense", "dense", _DENSE), ("model", "packed", _PACKED))
        if speed.get(key) and speed[key].get(phase)
    ]
    ratio = (speed.get("ratios") or {}).get(phase)
    axes.set_title(phase.capitalize() + (f": {ratio:.2f}x" if ratio else ""), loc="left")
    _clean(axes)
    if not bars:
        _say(axes, "not measured")
        return
    labels, rates, colors = zip(*bars, strict=True)
    medians = [rate["median"] for rate in rates]
    whiskers = (
        [rate["median"] - rate["p20"] for rate in rates],
        [rate["p80"] - rate["median"] for rate in rates],
    )
    axes.bar(labels, medians, width=0.6, color=colors, yerr=whiskers, capsize=5)
    _label_bars(axes, [rate["p80"] for rate in rates], medians)
    axes.set_ylabel("tokens/s, median and p20–p80")


def _draw_memory(axes, speed: dict) -> None:
    axes.set_title("Memory", loc="left")
    _clean(axes)
    found = [("dense", "dense", _DENSE), ("model", "packed", _PACKED)]
    found = [(label, speed[key], color) for key, label, color in found if speed.get(key)]
    kinds = [("parameter_bytes", "parameters"), ("peak_bytes", "peak")]
    kinds = [(key, what) for key, what in kinds if all(each[key] for _, each, _ in found)]
    labels = [f"{label},\n{what}" for _, what in kinds for label, _, _ in found]
    sizes = [each[key] / 1e6 for key, _ in kinds for _, each, _ in found]
    axes.bar(labels, sizes, width=0.6, color=[color for _, _, color in found] * len(kinds))
    _label_bars(axes, sizes, sizes)
    axes.set_ylabel("MB")


def _draw_perplexity(axes, perplexity: dict) -> None:
    axes.set_title("Perplexity on held-out text (lower is better)", loc="left")
    _clean(axes)
    bars = [
        (label, perplexity[key], color)
        for key, label, color in _PERPLEXITIES
        if perplexity.get(key) is not None
    ]
    if not bars:
        _say(axes, "not measured")
        return
    labels, values, colors = zip(*bars, strict=True)
    axes.bar(labels, values, width=0.5, color=colors)
    _label_bars(axes, values, values)
    axes.set_ylabel("perplexity")


def _label_bars(axes, tops, values) -> None:
    """Writes each value above its bar (above its whisker, which ends at tops)."""
    axes.set_ylim(0, 1.15 * max(tops))
    for x, (top, value) in enumerate(zip(tops, values, strict=True)):
        text = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        axes.annotate(text, (x, top), (0, 4), textcoords="offset points", ha="center")


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e5e5")


def _say(axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
