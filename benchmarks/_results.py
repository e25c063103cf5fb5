"""Sections, figures and losses of the levels and goals, for report.py; from results alone."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import _curves
import _figures
import _roofline
from goals import GOALS, Goal, Verdict, ceilings, judge, of_roofline

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


def commit_of(row: dict) -> str:
    return row["commit"] + (" with local changes" if row["dirty"] else "")


def conditions(row: dict) -> str:
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, "
        f"{row['date'][:10]}, commit {commit_of(row)}"
    )


def measured_on(rows: list[dict]) -> str:
    """One line: devices with their torch, and when and at which commits the rows were measured."""
    parts = []
    for device, torch in sorted({(row["device"], row["torch"]) for row in rows}):
        own = [row for row in rows if (row["device"], row["torch"]) == (device, torch)]
        days = sorted({row["date"][:10] for row in own})
        commits = dict.fromkeys(commit_of(row) for row in sorted(own, key=lambda r: r["date"]))
        when = " to ".join(dict.fromkeys((days[0], days[-1])))
        named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
        parts.append(f"{device}, torch {torch}, {when}, {named}")
    return f"Measured on {'; '.join(parts)}."


def level_rows() -> list[dict]:
    """The newest timed row of every contender of every level; skipped ones where none was timed."""
    keys = ("device", "level", "model", "batch", "tokens", "lora", "dtype", "open", "contender")
    return newest(sorted(rows_of("level"), key=lambda row: "ms" in row), *keys)


def devices() -> list[str]:
    return sorted({row["device"] for row in rows_of("level")})


def rows_on(bench: str, device: str) -> list[dict]:
    """rows_of one device."""
    return [row for row in rows_of(bench) if row["device"] == device]


def cells_of(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Setting -> contender -> row."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        setting = tuple(row[k] for k in ("model", "batch", "tokens", "lora", "dtype", "open"))
        cells.setdefault(setting, {})[row["contender"]] = row
    return cells


def roofline_cell(row: dict | None, results: list[dict]) -> str:
    """results: of the row's device, at least its ceilings."""
    share = None if row is None else of_roofline(row, results)
    return "" if share is None else f"{share:.0%}"


def goal_section(measured_only: bool = False) -> str:
    """Every goal: measured on each device of which there are results, or what is predicted.

    measured_only: the rest are counted in a sentence, and nothing is predicted.
    """
    benches = ("level", "fold_pack", "pack_tensors", "startup", "ceilings")
    everything = sorted((row for b in benches for row in rows_of(b)), key=lambda r: r["date"])
    by_device: dict[str, list[dict]] = {}
    for row in everything:
        by_device.setdefault(row["device"], []).append(row)
    found, missing = [], []
    for goal in GOALS:
        lines = []
        for own in by_device.values():
            on_gpu = all(row["threads"] is None for row in own)
            if goal.device in ("any", "gpu" if on_gpu else "cpu"):
                verdict = judge(goal, own)
                lines += [_verdict_line(goal, verdict, own)] if verdict else []
        found += lines
        missing += [] if lines else [goal]
    text = (
        "Their time over ours, contenders in turn within one run: more is better, except for peak "
        "memory (ours over theirs) and seconds. Median (lowest-highest) over the runs of the "
        "newest commit that measured a goal. Of roofline: the time of the FLOPs or of the bytes, "
        "whichever is longer, at the best matmul and copy measured on the device, over ours."
    )
    header = ["goal", "against", "bound", "reached", "", "ours", "of roofline", "measured on"]
    parts = [text, table(header, found)] if found else [text]
    if measured_only:
        parts.append(f"{len(missing)} of {len(GOALS)} goals have not been measured.")
    elif missing:
        parts += [
            "Not measured yet, with predictions from counted FLOPs and bytes at data-sheet rates "
            "(`benchmarks/_roofline.py`):",
            table(["goal", "against", "bound", *_roofline.CHIPS], _predicted_lines(missing)),
        ]
    return "\n\n".join(parts)


def _goal_cells(goal: Goal) -> list[str]:
    against = goal.against or {"read": "read bandwidth", "seconds": ""}[goal.measure]
    bound = f"{'at most' if goal.at_most else 'at least'} {goal.bound:.2f}{_unit(goal)}"
    return [f"{goal.device}: {goal.work}", against, bound]


def _unit(goal: Goal) -> str:
    return " s" if goal.measure == "seconds" else ""


def _verdict_line(goal: Goal, verdict: Verdict, results: list[dict]) -> list[str]:
    values = [verdict.low, verdict.reached, verdict.high]
    ours = verdict.rows.get("ours")
    stamp = next(iter(verdict.rows.values()))
    return [
        *_goal_cells(goal),
        spread(values, f"{{:.2f}}{_unit(goal)}", statistics.median),
        "pass" if verdict.passed else "short",
        "" if ours is None else f"{ours['ms']:.2f} ms",
        roofline_cell(ours, results),
        f"{stamp['device']}, torch {stamp['torch']}, {stamp['date'][:10]}, {commit_of(stamp)}",
    ]


def _predicted_lines(goals: list[Goal]) -> list[list[str]]:
    facts = _roofline.read_facts(RESULTS / "aot.json")
    lines = []
    for goal in goals:
        guesses = [""] * len(_roofline.CHIPS)
        if goal.device == "gpu":
            guesses = [_roofline.predicted(goal, chip, facts) for chip in _roofline.CHIPS.values()]
            guesses = ["" if guess is None else f"{guess:.2f}" for guess in guesses]
        lines.append([*_goal_cells(goal), *guesses])
    return lines


def curve_section() -> str:
    """A verdict on every curve, a table for each device."""
    parts = []
    for device in devices():
        found = _curves.curves(rows_on("level", device))
        if found:
            rows = [point.row for curve in found for point in curve.points]
            lines = [curve.cells() for curve in found]
            parts += [table([*_curves.HEADER], lines), measured_on(rows)]
    return "\n\n".join([_curves.RULE, *parts]) if parts else ""


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
    roofs = {device: rows_on("ceilings", device) for device in devices()}
    for device, level in sorted({(row["device"], row["level"]) for row in rows}):
        own = [r for r in rows if (r["device"], r["level"]) == (device, level)]
        names = sorted({row["contender"] for row in own if "ms" in row}, key=_order)
        lines = []
        for (model, batch, tokens, lora, dtype, kept), cell in sorted(cells_of(own).items()):
            setting = f"{model}, {batch} x {tokens}{f', LoRA {lora}' if lora else ''}, {dtype}"
            texts = [_cell(cell.get(name)) for name in names]
            at_roof = roofline_cell(cell.get("ours"), roofs[device])
            lines.append([setting, f"{kept:.0%}", *texts, at_roof])
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


def losses() -> list[tuple[str, dict]]:
    """Where other contenders take more than 3 % less time than ours: a line for each setting, and
    our row of it.

    oracle and torch_pruning are left out: they run what is left after training, not a gate.
    """
    found = []
    for device in devices():
        rows = [row for row in level_rows() if row["device"] == device]
        for level in sorted({row["level"] for row in rows}):
            cells = cells_of([row for row in rows if row["level"] == level])
            for (model, batch, tokens, lora, dtype, kept), cell in sorted(cells.items()):
                ours = cell.get("ours")
                if ours is None or "ms" not in ours:
                    continue
                shares = {
                    name: row["ms"] / ours["ms"]
                    for name, row in cell.items()
                    if "ms" in row and not name.startswith(("ours", "oracle", "torch_pruning"))
                }
                faster = [f"{name} {x:.2f}x" for name, x in sorted(shares.items()) if 1.03 * x < 1]
                if faster:
                    where = f"{level}, {model}, {batch} x {tokens}, {dtype}, {kept:.0%} open"
                    where += f", LoRA {lora}" if lora else ""
                    found.append((f"{where}: {', '.join(faster)}", ours))
    return found


def loss_section() -> str:
    found = losses()
    if not devices():
        return ""
    if not found:
        none = "No contender that computes gates, and no dense model, was faster by more than 3 %."
        return f"{none}\n\n{measured_on(level_rows())}"
    parts = [
        "Their time as a share of ours, where it is less by more than 3 %. The model that is left "
        "when training is over (`oracle`, `torch_pruning`) is not among them: it has no gates to "
        "train."
    ]
    for device in devices():
        own = [(line, row) for line, row in found if row["device"] == device]
        if own:
            parts.append("\n".join(f"- {line}" for line, _ in own))
            parts.append(measured_on([row for _, row in own]))
    return "\n\n".join(parts)


def figures() -> dict[str, str]:
    """File name -> SVG, of what there are results for, in the dtype that most of them are in."""
    made = {}
    rows = level_rows()
    for device in devices():
        own = [r for r in rows if r["device"] == device and "ms" in r]
        dtype = statistics.mode(r["dtype"] for r in own)
        own = [r for r in own if r["dtype"] == dtype]
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
        if steps := _largest_step(own):
            first, shown = steps[0], {row["contender"]: _time_by_kind(row) for row in steps}
            made[f"step-{slug}.svg"] = _figures.bars(
                f"A training step of {first['model']}, {first['batch']} x {first['tokens']} "
                f"tokens, {first['open']:.0%} open", note, shown, "ms"
            )  # fmt: skip
    return made


def _largest_step(rows: list[dict]) -> list[dict]:
    """Every contender of the training step, without LoRA, of most tokens."""
    steps = [r for r in rows if r["level"] == "train_step" and r.get("breakdown") and not r["lora"]]
    cells = cells_of(steps)
    largest = max(cells, key=lambda setting: setting[1] * setting[2], default=None)
    return list(cells[largest].values()) if cells else []


def _time_by_kind(row: dict) -> dict[str, float]:
    """Kind -> ms: the shares of one profiled step, of the median time of those without profiler."""
    total = sum(row["breakdown"].values())
    return {kind: ms / total * row["ms"] for kind, ms in row["breakdown"].items()}


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
    """Level -> (FLOP / byte, FLOP/s) of ours; and the roof, from the ceilings."""
    ours = [r for r in rows if r["contender"] == "ours" and r["flops"]]
    rates = ceilings(rows_on("ceilings", device), ours[-1]["dtype"]) if ours else None
    if rates is None:
        return {}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in ours:
        at = (row["flops"] / row["bytes"], row["flops"] / row["ms"] * 1e3)
        points.setdefault(row["level"], []).append(at)
    low, high = (pick(p[0] for ps in points.values() for p in ps) for pick in (min, max))
    corners = sorted({low / 1.2, rates["flops"] / rates["bytes"], high * 1.2})
    roof = [(x, min(rates["flops"], x * rates["bytes"])) for x in corners]
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
