"""README's tables and the performance page, from the newest lines under benchmarks/results.

python benchmarks/report.py [--check]

Rewrites what stands between the results markers of README.md; --check only says whether it is
current. The page is made when the documentation is built (docs/hooks.py).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


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


def conditions(row: dict) -> str:
    commit = row["commit"] + (" with local changes" if row["dirty"] else "")
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, "
        f"{row['date'][:10]}, commit {commit}"
    )


def demo_section() -> str:
    runs = newest(rows_of("demo"), "target", "seed")
    if not runs:
        return ""
    lines = []
    for target in sorted({run["target"] for run in runs}, reverse=True):
        same = [run for run in runs if run["target"] == target]

        def spread(values: list[float], form: str = "{:.2f}") -> str:
            low, high = form.format(min(values)), form.format(max(values))
            middle = form.format(statistics.median(values))
            return middle if low == high else f"{middle} ({low}-{high})"

        lines.append(
            [
                f"{1 - target:.0%}",
                str(len(same)),
                *(
                    spread([run["perplexity"][k] for run in same])
                    for k in ("base", "lora", "packed")
                ),
                spread(
                    [run["bytes_on_disk"]["packed"] / run["bytes_on_disk"]["base"] for run in same]
                ),
                *(spread([r["speed"]["ratios"][k] for r in same]) for k in ("prefill", "decode")),
                f"{max(run['error'] for run in same):.1e}",
            ]
        )
    header = ["removed", "seeds", "perplexity, base", "LoRA, no gates", "packed"]
    header += ["bytes, of base", "prefill, x dense", "decode, x dense", "packed - gated logits"]
    steps = runs[-1]["train"]["steps"]
    return "\n\n".join(
        [
            f"SmolLM2-135M-Instruct on Python's reference manual, {steps} steps for every "
            "column that is tuned; held-out perplexity, median (lowest-highest) over seeds. Speed "
            "is tokens/s of the packed model over the dense one, interleaved in one run, batch 1.",
            table(header, lines),
            conditions(runs[-1]) + ".",
        ]
    )


def mlp_section() -> str:
    rows = newest(rows_of("mlp_step"), "model", "tokens", "dtype", "open", "op")
    if not rows:
        return ""
    lines = []
    keys = sorted({(r["model"], r["tokens"], r["dtype"], r["open"]) for r in rows}, reverse=True)
    for model, tokens, dtype, kept in keys:
        cell = {
            r["op"]: r
            for r in rows
            if (r["model"], r["tokens"], r["dtype"], r["open"]) == (model, tokens, dtype, kept)
        }
        ratios = [f"{cell[k]['gatepack_is_faster_by']:.2f}x" for k in ("masked", "dense", "small")]
        ours = cell["gatepack"]
        lines.append(
            [
                f"{model} MLP, T={tokens}, {dtype}",
                f"{kept:.0%}",
                f"{ours['ms']:.1f}",
                *ratios,
                f"{ours['error']:.0e}",
            ]
        )
    header = ["forward + backward", "open", "ms", "x masked", "x dense", "x small", "error"]
    return "\n\n".join(
        [
            "One training step of a gated MLP (gates train, weights frozen): how many times faster "
            "it is than the same MLP masked, without gates, and physically small; the error is "
            "against masked.",
            table(header, lines),
            conditions(rows[-1]) + ".",
        ]
    )


def op_sections() -> list[str]:
    """One section for each device and op of bench_ops.py: a line per setting, a column per
    contender."""
    rows = newest(rows_of("op"), "device", "op", "model", "tokens", "dtype", "open", "contender")
    sections = []
    for device, op in sorted({(row["device"], row["op"]) for row in rows}):
        own = [row for row in rows if (row["device"], row["op"]) == (device, op)]
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
                f"{cell['ours']['roofline']:.0%}" if "ours" in cell else "",
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
    sections = []
    for device in sorted({row["device"] for row in rows}):
        own = [row for row in rows if row["device"] == device]
        lines = [
            [
                f"{row['op']}, {row['kept']:.0%} of the {row['along']}",
                f"{row['shape'][0]} x {row['shape'][1]}, {row['dtype']}",
                f"{row['ms']:.3f}",
                f"{row['GB/s']:.1f}",
                f"{row['of_copy']:.0%}",
            ]
            for row in own
        ]
        header = ["op", "matrix", "ms", "GB/s", "of copy"]
        sections.append(f"{table(header, lines)}\n\n{conditions(own[-1])}.")
    return sections


def pack_tensors_sections() -> list[str]:
    """One section for each device: the matrices of a layer in one call, beside a copy of the bytes
    that it writes, both into fresh memory or both into memory that is already mapped."""
    rows = [row for row in rows_of("pack_tensors") if "memory" in row]  # older lines mix the two
    rows = newest(rows, "device", "along", "memory", "shape", "dtype", "kept", "backend", "op")
    sections = []
    for device in sorted({row["device"] for row in rows}):
        own = [row for row in rows if row["device"] == device]
        lines = [
            [
                f"{row['op']}, {row['along']}",
                f"{row['shape']}, {row['dtype']}, {row['kept']:.0%} kept",
                row["memory"],
                f"{row['ms']:.2f}",
                f"{row['GB/s']:.1f}",
                f"{row['of_copy']:.0%}",
            ]
            for row in own
        ]
        header = ["op", "layer", "memory", "ms", "GB/s", "of copy"]
        sections.append(f"{table(header, lines)}\n\n{conditions(own[-1])}.")
    return sections


def performance_page() -> str:
    """docs/performance.md: every bench of which there are results."""
    parts = [
        "# Performance",
        "Every figure is read from `benchmarks/results`; none is typed. A bench checks results "
        "before it times them, and refuses to time what is wrong. Contenders are interleaved in "
        "one run; figures are medians. `make bench` adds lines for this machine.",
    ]
    for title, sections in (
        ("From text to a packed model", [demo_section()]),
        ("A training step of an MLP", [mlp_section()]),
        ("Ops", op_sections()),
        ("Packing weights", fold_pack_sections()),
        ("Packing a layer", pack_tensors_sections()),
    ):
        found = [text for text in sections if text]
        if found:
            parts += [f"## {title}", *found]
    return "\n\n".join(parts) + "\n"


def with_results(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    sections = [text for text in (demo_section(), mlp_section()) if text]
    return before + "\n\n".join([BEGIN, *sections, END]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    fresh = with_results(readme)
    if options.check and fresh != readme:
        sys.exit("README.md is not current: run python benchmarks/report.py")
    if not options.check:
        path.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
