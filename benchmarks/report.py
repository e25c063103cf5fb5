"""README's tables, the figures and the performance page, from the newest lines of results.

python benchmarks/report.py [--check]

Rewrites what stands between the results markers of README.md, and docs/figures; --check only says
whether both are current. The page is made when the documentation is built (docs/hooks.py).
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as the pages' hook loads it by path

from _results import (
    ROOT,
    conditions,
    curve_section,
    figure_links,
    figures,
    goal_section,
    kernel_section,
    level_sections,
    loss_section,
    newest,
    roofline_cell,
    rows_of,
    rows_on,
    spread,
    table,
    write_figures,
)

FIGURES = ROOT / "docs" / "figures"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def demo_section() -> str:
    runs = newest(rows_of("demo"), "target", "seed")
    if not runs:
        return ""

    def settings(run: dict) -> dict:
        return {**run["train"], "seed": None, "close": run.get("close")}

    # Rows of other settings, earlier ones, are another recipe's.
    last = max(runs, key=lambda run: run["date"])
    runs = [run for run in runs if settings(run) == settings(last)]
    lines = []
    for target in sorted({run["target"] for run in runs}, reverse=True):
        same = [run for run in runs if run["target"] == target]

        def over_seeds(values: list[float]) -> str:
            return spread(values, "{:.2f}", statistics.median)

        lines.append(
            [
                f"{1 - target:.0%}",
                str(len(same)),
                *(
                    over_seeds([run["perplexity"][k] for run in same])
                    for k in ("base", "lora", "packed")
                ),
                over_seeds(
                    [run["bytes_on_disk"]["packed"] / run["bytes_on_disk"]["base"] for run in same]
                ),
                *(
                    over_seeds([r["speed"]["ratios"][k] for r in same])
                    for k in ("prefill", "decode")
                ),
                f"{max(run['error'] for run in same):.1e}",
            ]
        )
    header = ["removed", "seeds", "perplexity, base", "LoRA, no gates", "packed"]
    header += ["bytes, of base", "prefill, x dense", "decode, x dense", "packed - gated logits"]
    steps = last["train"]["steps"]
    return "\n\n".join(
        [
            f"SmolLM2-135M-Instruct on Python's reference manual, {steps} steps for every "
            "column that is tuned; held-out perplexity, median (lowest-highest) over seeds. Speed "
            "is tokens/s of the packed model over the dense one, interleaved in one run, batch 1.",
            table(header, lines),
            conditions(last) + ".",
        ]
    )


def op_sections() -> list[str]:
    """One section for each device and op of bench_ops.py: a line per setting, a column per
    contender."""
    rows = newest(rows_of("op"), "device", "op", "model", "tokens", "dtype", "open", "contender")
    sections = []
    for device, op in sorted({(row["device"], row["op"]) for row in rows}):
        own = [row for row in rows if (row["device"], row["op"]) == (device, op)]
        roof = rows_on("ceilings", device)
        contenders = sorted({row["contender"] for row in own})
        cells: dict[tuple, dict[str, dict]] = {}
        for row in own:
            setting = (row["model"], row["tokens"], row["dtype"], row["open"])
            cells.setdefault(setting, {})[row["contender"]] = row
        lines = [
            [
                f"{model}, T={tokens}, {dtype}",
                f"{kept:.0%}",
                *(f"{cell[name]['ms']:.3f}" if name in cell else "" for name in contenders),
                roofline_cell(cell.get("ours"), roof),
            ]
            for (model, tokens, dtype, kept), cell in sorted(cells.items())
        ]
        header = ["shape", "open", *(f"{name}, ms" for name in contenders), "ours, of roofline"]
        sections.append(f"### {op}\n\n{table(header, lines)}\n\n{conditions(own[-1])}.")
    return sections


def fold_pack_sections() -> list[str]:
    """One section for each device: fold_pack beside a copy of the bytes that it writes."""
    rows = newest(
        rows_of("fold_pack"), "device", "along", "shape", "dtype", "kept", "backend", "op"
    )
    return sections_by_device(
        rows,
        ["op", "matrix", "ms", "GB/s", "of copy"],
        lambda row: [
            f"{row['op']}, {row['kept']:.0%} of the {row['along']}",
            f"{row['shape'][0]} x {row['shape'][1]}, {row['dtype']}",
            f"{row['ms']:.3f}",
            f"{row['GB/s']:.1f}",
            f"{row['of_copy']:.0%}",
        ],
    )


def pack_tensors_sections() -> list[str]:
    """One section for each device: the matrices of a layer in one call, beside a copy of the bytes
    that it writes, both into fresh memory or both into memory that is already mapped."""
    rows = [row for row in rows_of("pack_tensors") if "memory" in row]  # older lines mix the two
    rows = newest(rows, "device", "along", "memory", "shape", "dtype", "kept", "backend", "op")
    return sections_by_device(
        rows,
        ["op", "layer", "memory", "ms", "GB/s", "of copy"],
        lambda row: [
            f"{row['op']}, {row['along']}",
            f"{row['shape']}, {row['dtype']}, {row['kept']:.0%} kept",
            row["memory"],
            f"{row['ms']:.2f}",
            f"{row['GB/s']:.1f}",
            f"{row['of_copy']:.0%}",
        ],
    )


def startup_sections() -> list[str]:
    """One section for each device: the last run of bench_startup.py."""
    rows = rows_of("startup")
    last = {row["device"]: row["date"] for row in rows}
    text = (
        "Imports: beyond torch, and that of `attach` beyond transformers. Extension: its load, "
        "after the import. First call: of a kernel, with Triton's cache empty (cold) and with "
        "what that left (warm); without a GPU, the compile of it alone, for sm_90. Medians of "
        "fresh processes; cold and warm are one process each."
    )
    sections = sections_by_device(
        [row for row in rows if row["date"] == last[row["device"]]],
        ["what", "kernel", "seconds"],
        lambda row: [row["what"], row.get("op", ""), f"{row['seconds']:.3f}"],
    )
    return [f"{text}\n\n{section}" for section in sections]


def sections_by_device(
    rows: list[dict], header: list[str], line: Callable[[dict], list[str]]
) -> list[str]:
    """A table for each device, a line of it for each row."""
    sections = []
    for device in sorted({row["device"] for row in rows}):
        own = [row for row in rows if row["device"] == device]
        lines = [line(row) for row in own]
        sections.append(f"{table(header, lines)}\n\n{conditions(own[-1])}.")
    return sections


def performance_page() -> str:
    """docs/performance.md: every bench of which there are results."""
    parts = [
        "# Performance",
        "Every figure is read from `benchmarks/results`; none is typed. A bench checks results "
        "before it times them, and refuses to time what is wrong. Contenders are interleaved in "
        "one run; figures are medians. `make bench` adds lines for this machine; peak memory is "
        "the CUDA allocator's, or on a CPU what torch's profiler saw allocated at once.",
    ]
    for title, sections in (
        ("Goals", [goal_section()]),
        ("Curves", [curve_section()]),
        ("Figures", [figure_links("figures")]),
        ("Where we lose", [loss_section()]),
        ("Levels", level_sections()),
        ("Kernels", [kernel_section()]),
        ("From text to a packed model", [demo_section()]),
        ("Ops", op_sections()),
        ("Packing weights", fold_pack_sections()),
        ("Packing a layer", pack_tensors_sections()),
        ("Start-up", startup_sections()),
    ):
        found = [text for text in sections if text]
        if found:
            parts += [f"## {title}", *found]
    return "\n\n".join(parts) + "\n"


def with_results(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    lost = loss_section()
    parts = [demo_section(), goal_section(measured_only=True), curve_section()]
    parts.append(figure_links("docs/figures"))
    parts += [f"Where we lose:\n\n{lost}"] if lost else []
    return before + "\n\n".join([BEGIN, *filter(None, parts), END]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    fresh = with_results(readme)
    if not options.check:
        path.write_text(fresh, encoding="utf-8")
        write_figures(FIGURES)
        return
    drawn = {file.name: file.read_text(encoding="utf-8") for file in FIGURES.glob("*.svg")}
    if fresh != readme or drawn != figures():
        sys.exit("README.md or docs/figures is not current: run python benchmarks/report.py")


if __name__ == "__main__":
    main()
