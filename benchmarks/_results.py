"""Sections, figures and losses of the levels and goals, for report.py; from results alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import _figures
import _roofline
from goals import GOALS, share
from goals import rows_of as rows_of_goal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(bench: str) -> list[dict]:
    """All lines of one bench, oldest first."""
    rows = []
    for path in sorted(RESULTS.glob("*/*.jsonl")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((row for row in rows if row["bench"] == bench), key=lambda row: row["date"])


def newest(rows: list[dict], *keys: str) -> list[dict]:
    """The last row for each combination of keys, in order of those keys."""
    last = {tuple(json.dumps(row[key]) for key in keys): row for row in rows}
    return [last[key] for key in sorted(last)]


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def spread(values: list[float], form: str, middle: Callable[[list[float]], float]) -> str:
    """The middle of the values, with the lowest and the highest where these differ in print."""
    low, high = form.format(min(values)), form.format(max(values))
    shown = form.format(middle(values))
    return shown if low == high else f"{shown} ({low}-{high})"


def conditions(row: dict) -> str:
    commit = row["commit"] + (" with local changes" if row["dirty"] else "")
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, "
        f"{row['date'][:10]}, commit {commit}"
    )


def level_rows() -> list[dict]:
    """The newest row of every contender of every level, timed or skipped."""
    keys = ("device", "level", "model", "batch", "tokens", "lora", "dtype", "open", "contender")
    return newest(rows_of("level"), *keys)


def devices() -> list[str]:
    return sorted({row["device"] for row in rows_of("level")})


def cells_of(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Setting -> contender -> row."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        setting = tuple(row[k] for k in ("model", "batch", "tokens", "lora", "dtype", "open"))
        cells.setdefault(setting, {})[row["contender"]] = row
    return cells


def goal_section(measured_only: bool = False) -> str:
    """Every goal: measured on each device of which there are results, or what is predicted.

    measured_only: the rest are counted in a sentence, and nothing is predicted.
    """
    facts = _roofline.read_facts(RESULTS / "aot.json")
    everything = sorted(
        (row for bench in ("level", "fold_pack", "startup", "ceilings") for row in rows_of(bench)),
        key=lambda row: row["date"],
    )
    lines = []
    for goal in GOALS:
        guess = ""
        if goal.device == "gpu":
            guesses = [_roofline.predicted(goal, chip, facts) for chip in _roofline.CHIPS.values()]
            guess = " / ".join("-" if g is None else f"{g:.2f}" for g in guesses)
        measured, verdict, ours, of_roofline = "not measured", "", "", ""
        for device in sorted({row["device"] for row in everything}):
            own = [row for row in everything if row["device"] == device]
            on_gpu = all(row["threads"] is None for row in own)
            if goal.device not in ("any", "gpu" if on_gpu else "cpu"):
                continue
            rows = rows_of_goal(goal, own)
            rates = next((r for r in reversed(own) if r["bench"] == "ceilings"), None)
            found = share(goal, rows, rates)
            if found is not None:
                measured, verdict = f"{found[0]:.2f}", "pass" if found[1] else "short"
                mine = next((r for r in rows if r.get("contender") == "ours"), None)
                if mine is not None:
                    ours = f"{mine['ms']:.2f} ms"
                    of_roofline = f"{mine['roofline']:.0%}" if "roofline" in mine else ""
        at_most = goal.measure in ("peak", "seconds")
        against = goal.against or {"read": "read bandwidth", "seconds": "s"}[goal.measure]
        bound = f"{'at most' if at_most else 'at least'} {goal.bound:.2f}"
        lines.append(
            [f"{goal.device}: {goal.work}", against, bound, measured, verdict, ours, of_roofline,
             guess]
        )  # fmt: skip
    header = ["goal", "against", "bound", "reached", "", "ours", "of roofline"]
    text = (
        "Times are compared within one run, contenders in turn: a ratio is theirs over ours, so "
        "more is better, except for peak memory (ours over theirs) and seconds. "
    )
    if measured_only:
        found = [line[:-1] for line in lines if line[3] != "not measured"]
        missing = len(lines) - len(found)
        text += f"{missing} of {len(lines)} goals have not been measured."
        return f"{text}\n\n{table(header, found)}" if found else text
    header.append("predicted, " + " / ".join(_roofline.CHIPS))
    text += (
        "Predictions are counted FLOPs and bytes at data-sheet rates (`benchmarks/_roofline.py`), "
        "for GPUs on which nothing has been measured yet."
    )
    return f"{text}\n\n{table(header, lines)}"


def kernel_section() -> str:
    """What ahead-of-time compiles say of the matmuls that the predictions are about."""
    facts = [r for r in _roofline.read_facts(RESULTS / "aot.json") if r["has_dot"]]
    lines = [
        [
            f"{row['op']}, {row['case']}: `{row['kernel']}`",
            row["arch"],
            "x".join(str(size) for size in row["tile"].values()),
            *(str(row[key]) for key in ("warps", "registers", "spill_bytes", "shared_bytes")),
            str(row["resident"]),
        ]
        for row in facts
        if row["case"] in ("channels", "packed")
    ]
    if not lines:
        return ""
    header = ["kernel", "chip", "tile", "warps", "registers", "spilled, B", "shared, B"]
    header.append("blocks at once")
    text = (
        "Compiled ahead of time by `benchmarks/aot.py`, at the shapes of Llama 3 8B: per thread, "
        "per block, and how many blocks a multiprocessor holds."
    )
    return f"{text}\n\n{table(header, lines)}"


def level_sections() -> list[str]:
    """One table per device and level: a line per setting, ms and peak MB of each contender."""
    sections = []
    rows = level_rows()
    for device, level in sorted({(row["device"], row["level"]) for row in rows}):
        own = [r for r in rows if (r["device"], r["level"]) == (device, level)]
        names = sorted({row["contender"] for row in own if "ms" in row}, key=_order)
        lines = []
        for (model, batch, tokens, lora, dtype, kept), cell in sorted(cells_of(own).items()):
            setting = f"{model}, {batch} x {tokens}{f', LoRA {lora}' if lora else ''}, {dtype}"
            texts = [_cell(cell.get(name)) for name in names]
            best = cell.get("ours", {}).get("roofline")
            lines.append([setting, f"{kept:.0%}", *texts, "" if best is None else f"{best:.0%}"])
        header = ["shape", "open", *(f"{name}, ms (MB)" for name in names), "ours, of roofline"]
        skipped = sorted({(r["contender"], r["skipped"]) for r in own if "skipped" in r})
        notes = [f"Without {name}: {why}." for name, why in skipped]
        parts = [f"### {level}", table(header, lines), *notes, conditions(own[-1]) + "."]
        sections.append("\n\n".join(parts))
    return sections


def _order(name: str) -> tuple[bool, str]:
    return name != "ours", name


def _cell(row: dict | None) -> str:
    if row is None or "ms" not in row:
        return ""
    peak = row.get("peak_bytes")
    return f"{row['ms']:.2f}" + (f" ({peak / 1e6:.0f})" if peak is not None else "")


def losses() -> list[str]:
    """Where another contender is faster than ours, or takes less memory, by more than 3 %.

    oracle and torch_pruning are left out: they run what is left after training, not a gate.
    """
    found = []
    for device in devices():
        rows = [row for row in level_rows() if row["device"] == device]
        for level in sorted({row["level"] for row in rows}):
            cells = cells_of([row for row in rows if row["level"] == level])
            for (model, batch, tokens, lora, _, kept), cell in sorted(cells.items()):
                ours = cell.get("ours")
                for name, row in cell.items() if ours and "ms" in ours else ():
                    if name == "ours" or name.startswith(("oracle", "torch_pruning")):
                        continue
                    if "ms" in row and ours["ms"] > 1.03 * row["ms"]:
                        where = f"{level}, {model}, {batch} x {tokens}, {kept:.0%} open"
                        where += f", LoRA {lora}" if lora else ""
                        found.append(
                            f"{where}: {name} takes {row['ms'] / ours['ms']:.2f}x our time"
                        )
    return found


def loss_section() -> str:
    found = losses()
    if not devices():
        return ""
    if not found:
        return "No contender that computes gates, and no dense model, was faster by more than 3 %."
    return "\n".join(f"- {text}" for text in found)


def figures() -> dict[str, str]:
    """File name -> SVG, of what there are results for."""
    made = {}
    rows = level_rows()
    for device in devices():
        own = [r for r in rows if r["device"] == device and "ms" in r]
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        note = conditions(own[-1])
        if curve := _speedups(own):
            made[f"speedup-{slug}.svg"] = _figures.lines(
                "How much faster than dense, as gates close", note, curve,
                "open, %", "x faster than dense", level=1.0,
            )  # fmt: skip
        if points := _intensities(device, own):
            made[f"roofline-{slug}.svg"] = _figures.lines(
                "Ours against the roofline", note, points, "FLOP per byte", "FLOP/s", log=True
            )
        stacks = {
            r["contender"]: r["breakdown"]
            for r in own
            if r["level"] == "train_step" and r.get("breakdown") and r["model"] == "smollm2-135m"
        }
        if stacks:
            made[f"step-{slug}.svg"] = _figures.bars(
                "Where a training step's time goes", note, stacks, "ms"
            )
    return made


def _speedups(rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Level -> (open %, dense ms / ours ms), where there are three shares or more of a setting."""
    curves: dict[tuple, list[tuple[float, float]]] = {}
    for level in sorted({row["level"] for row in rows}):
        cells = cells_of([row for row in rows if row["level"] == level])
        for (model, batch, tokens, lora, _, kept), cell in cells.items():
            if {"ours", "dense"} <= set(cell):
                ratio = cell["dense"]["ms"] / cell["ours"]["ms"]
                key = (level, model, batch, tokens, lora)
                curves.setdefault(key, []).append((100 * kept, ratio))
    return {
        f"{level}, {batch} x {tokens}": points
        for (level, _, batch, tokens, _), points in curves.items()
        if len(points) >= 3
    }


def _intensities(device: str, rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Level -> (FLOP / byte, FLOP/s) of ours; and the roof, from the newest ceilings."""
    rates = [r for r in rows_of("ceilings") if r["device"] == device]
    ours = [r for r in rows if r["contender"] == "ours" and r["flops"]]
    if not rates or not ours:
        return {}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in ours:
        at = (row["flops"] / row["bytes"], row["flops"] / row["ms"] * 1e3)
        points.setdefault(row["level"], []).append(at)
    low, high = (pick(p[0] for ps in points.values() for p in ps) for pick in (min, max))
    ridge = rates[-1]["flops"] / rates[-1]["bytes"]
    corners = sorted({low / 1.2, ridge, high * 1.2})
    roof = [(x, min(rates[-1]["flops"], x * rates[-1]["bytes"])) for x in corners]
    return {"roof: matmul, bytes": roof, **points}


def write_figures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = figures()
    for path in folder.glob("*.svg"):
        if path.name not in fresh:
            path.unlink()
    for name, text in fresh.items():
        (folder / name).write_text(text, encoding="utf-8")


def figure_links(prefix: str) -> str:
    return "\n\n".join(f"![{name.partition('-')[0]}]({prefix}/{name})" for name in figures())
