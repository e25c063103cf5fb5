"""Stage 6, save: one picture of what packing kept, and what that did to speed and perplexity."""

import os
import re
from pathlib import Path

# Okabe and Ito's palette: told apart by every common form of colour blindness.
_DENSE, _LORA, _PACKED = "#999999", "#E69F00", "#0072B2"
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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a report needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    _draw_widths(left, report["pack"])
    _draw_speed_and_perplexity(right, report["speed"], report["perplexity"])
    kept, target = report["pack"]["kept_fraction"], report["target"]
    title = f"{report['model']}: {kept:.1%} of the blocks' weights kept (target {target:.1%})"
    figure.suptitle(title, fontsize=14)
    figure.savefig(Path(path), format="png")


def _draw_widths(figure, pack: dict) -> None:
    for axes, kind in zip(figure.subplots(2, 1), ("heads", "channels"), strict=True):
        rows = [row for row in pack["layers"] if row["kind"] == kind]
        _clean(axes)
        if not rows:
            _say(axes, f"{kind} were not gated")
            continue
        layers = [_layer_number(row["gate"], i) for i, row in enumerate(rows)]
        kept, before = [row["kept"] for row in rows], [row["before"] for row in rows]
        share = f"{sum(kept):,} of {sum(before):,} ({sum(kept) / sum(before):.0%})"
        axes.set_title(f"Kept {kind}: {share}", loc="left")
        axes.margins(x=0.01)
        axes.bar(layers, kept, width=0.8, color=_PACKED, label="packed")
        axes.bar(layers, before, width=0.8, fill=False, edgecolor=_DENSE, label="dense")
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
