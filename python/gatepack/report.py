"""Stage 7, command line: what the commands return, as tables on a terminal."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gatepack.bench import beside
from gatepack.latency import LatencyTable
from gatepack.packing import PackReport
from gatepack.timing import Measurement


def print_report(report: dict, out: Path) -> None:
    """Prints what gatepack.demo.run returned; out is where its files are."""
    console = Console()
    console.print(_table(report))
    console.print(_parity(report["parity"]))
    samples = report["samples"]
    for name in ("prompt", "base", "packed"):
        console.print(f"[bold]{name}[/bold]", end=" ")
        console.print(" ".join(samples[name].split()), markup=False, highlight=False)
    console.print(f"written: {out}/ (packed model, report.json, report.png)", highlight=False)


def print_training(report: dict, out: Path) -> None:
    """Prints what gatepack.recipe.train returned; out is where its files are."""
    quality = report["perplexity"]
    _facts(
        report["model"],
        {
            "block weights open": f"{report['kept_fraction']:.1%} (target {report['target']:.1%})",
            "loss, first and last step": f"{report['losses'][0]:.3f}, {report['losses'][-1]:.3f}",
            "held-out perplexity, base": f"{quality['base']:.2f}",
            "held-out perplexity, gated": f"{quality['gated']:.2f}",
            "written": f"{out}/ (gated model, train.json, losses.png, gates.png)",
        },
    )


def print_training_plan(plan: dict) -> None:
    """Prints what gatepack.recipe.plan_training returned."""
    params, seconds, size = plan["params"], plan["seconds"], plan["bytes"]
    removed = params["blocks"] - params["kept"]
    _facts(
        f"{plan['model']}, not yet trained",
        {
            "parameters": f"{params['model']:,}",
            "in the blocks' linears": f"{params['blocks']:,}",
            "of these kept": f"{params['kept']:,} ({params['kept'] / params['blocks']:.1%})",
            "parameters when packed, about": f"{params['model'] - removed:,}",
            "trained by LoRA": f"{params['lora']:,}",
            "training windows, held out": "{train:,}, {held_out:,}".format(**plan["windows"]),
            "training tokens": f"{plan['tokens']:,}",
            "weights, MB": f"{size['weights'] / 1e6:,.1f}",
            "gradients and moments, MB": f"{size['training'] / 1e6:,.1f}",
            "seconds per step": f"{seconds['step']:,.2f}",
            "minutes, pricing apart": f"{seconds['total'] / 60:,.1f}",
        },
    )


def print_packing(report: dict, out: Path) -> None:
    """Prints what gatepack.recipe.pack_checkpoint returned; out is where its files are."""
    packing, quality = report["pack"], report["perplexity"]
    before, after = packing["params"]
    _facts(
        report["model"],
        {
            "block weights kept": f"{packing['kept_fraction']:.1%}",
            "parameters": f"{before:,} -> {after:,}",
            "MB": " -> ".join(f"{size / 1e6:,.1f}" for size in packing["bytes"]),
            "held-out perplexity": f"{quality['gated']:.2f} -> {quality['packed']:.2f}",
            "written": f"{out}/ (packed model, pack.json)",
        },
    )
    Console().print(_parity(report["parity"]))


def print_packing_plan(report: PackReport, seconds: float) -> None:
    """Prints what gatepack.recipe.plan_packing returned."""
    print(report)
    print(f"seconds of scoring {seconds:,.1f}")


def print_bench(report: dict, out: Path) -> None:
    """Prints what gatepack.bench.run returned; out is where its files are."""
    speed = Measurement.from_dict(report["speed"])
    header, *rows = speed.rows()
    table = Table(title=report["model"]["name"])
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"{speed.conditions()}. {beside(report)}", highlight=False, markup=False)
    console.print(f"written: {out}/ (bench.json, bench.png, bench.html)", highlight=False)


def print_latency_table(record: dict, path: Path) -> None:
    """Prints what gatepack.latency_bench.run returned; path is where it is."""
    table = LatencyTable.from_dict(record)
    shown = Table(title=f"one layer on {table.device}, {table.dtype}")
    shown.add_column("kept", no_wrap=True)
    phases = [phase for phase, seconds in table.seconds.items() if seconds is not None]
    for phase in phases:
        shown.add_column(f"{phase}, ms", justify="right", no_wrap=True)
    rows = [
        (f"{k * q} of {table.query_heads} heads, {k} of {table.kv_heads} k/v", "heads", (i, j))
        for i, k in enumerate(table.kv_counts)
        for j, q in enumerate(table.per_kv)
    ]
    rows += [
        (f"{width} of {table.channels} channels", "channels", (i,))
        for i, width in enumerate(table.widths)
    ]
    for label, part, place in rows:
        found = [np.asarray(table.seconds[phase][part])[place] for phase in phases]
        shown.add_row(label, *(f"{1e3 * seconds:.4f}" for seconds in found))
    console = Console()
    console.print(shown)
    console.print(f"written: {path}", highlight=False)


def print_bench_plan(plan: dict) -> None:
    """Prints what plan of gatepack.bench or gatepack.latency_bench returned."""
    facts = {}
    for role in ("model", "dense"):
        if plan.get(role) is not None:
            facts[f"parameters, {role}"] = f"{plan[role]['parameters']:,}"
    if "shapes" in plan:
        facts["shapes of a layer"] = f"{plan['shapes']:,}"
    _facts(plan["model"]["name"], {**facts, "seconds": f"{plan['seconds']:,.1f}"})


def print_export(report: dict, out: Path) -> None:
    """Prints what gatepack.export returned; out is where its files are."""
    parity, model = report["parity"], report["model"]
    facts = {
        "parameters": f"{model['parameters']:,}",
        "MB": f"{sum(report['files'].values()) / 1e6:,.1f}",
        "loaded by": parity.get("consumer", f"not run: {parity.get('skipped')}"),
    }
    if "max_abs_difference" in parity:
        facts["logits differ by at most"] = f"{parity['max_abs_difference']:.2g}"
    if "perplexity" in parity:
        figures = parity["perplexity"]
        facts["perplexity"] = " -> ".join(
            f"{figures[name]:.4f}" for name in ("model", "stored", "export") if name in figures
        )
    if "greedy" in parity:
        facts["equal greedy continuations"] = "{same} of {prompts}".format(**parity["greedy"])
        if parity["greedy"].get("ties"):
            facts["parted where rounding decides"] = str(parity["greedy"]["ties"])
    if "tokenized" in parity:
        facts["equal tokens of texts"] = "{same} of {texts}".format(**parity["tokenized"])
    if report["notes"]:
        facts["not carried"] = "; ".join(report["notes"])
    facts["written"] = f"{out}/ ({', '.join(report['files'])})"
    _facts(f"{model['class']} as {report['format']}", facts)


def print_export_plan(plan: dict) -> None:
    """Prints what gatepack.exporters.run.dry_run returned."""
    model = plan["model"]
    facts = {"parameters": f"{model['parameters']:,}", "MB, about": f"{plan['bytes'] / 1e6:,.1f}"}
    facts |= {f"seconds of {name}": f"{value:,.1f}" for name, value in plan["seconds"].items()}
    for kind, values in model["widths"].items():
        facts[kind.replace("_", " ")] = ", ".join(map(str, values))
    _facts(f"{model['name']} as {plan['format']}", facts)


def _facts(title: str, facts: dict[str, str]) -> None:
    table = Table(title=escape(title), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(value))
    Console().print(table)


def _parity(parity: dict) -> str:
    return (
        f"parity: packed and gated logits differ by at most {parity['max_abs_difference']:.2g} "
        f"(rounding bound {parity['bound']:.2g}); reloaded logits are identical"
    )


_METRICS = {
    "perplexity": "{:.2f}",
    "bits_per_byte": "{:.4f}",
    "accuracy": "{:.1%}",
    "accuracy_per_byte": "{:.1%}",
    "calibration_error": "{:.3f}",
}


def print_evaluation(report: dict) -> None:
    """Prints what gatepack.evaluation.evaluate returned."""
    console = Console()
    model = report["model"]
    title = f"{model['name'] or model['class']}, {model['parameters']:,} parameters"
    if model["state"] != "dense":
        title += f", {model['state']}, {model['kept_fraction']:.1%} of the block weights kept"
    console.print(title, style="bold", markup=False, highlight=False)
    entries = report["entries"]
    texts = [entry for entry in entries if entry["kind"] in ("text", "ood")]
    choices = [entry for entry in entries if entry["kind"] == "choices"]
    tasks = [entry for entry in entries if entry["kind"] == "task"]
    if texts:
        metrics = ("perplexity", "bits_per_byte", "calibration_error")
        console.print(_metrics_table(texts, "tokens", metrics))
    if choices:
        metrics = ("accuracy", "accuracy_per_byte", "calibration_error")
        console.print(_metrics_table(choices, "questions", metrics))
    if tasks:
        console.print(_tasks_table(tasks))
    for entry in entries:
        if entry["kind"] == "latency":
            console.print(_latency_line(entry), highlight=False, markup=False)


def print_evaluation_plan(plan: dict) -> None:
    """Prints what gatepack.evaluation.plan returned."""
    facts = {
        f"parameters, {role}": f"{plan[role]['parameters']:,}"
        for role in ("model", "base")
        if plan[role] is not None
    }
    facts |= {f"windows, {name}": f"{count:,}" for name, count in plan["texts"].items()}
    facts |= {f"questions, {name}": f"{count:,}" for name, count in plan["questions"].items()}
    if plan["tasks"]:
        facts["tasks, not timed"] = ", ".join(plan["tasks"])
    _facts(plan["model"]["name"], {**facts, "seconds": f"{plan['seconds']:,.1f}"})


def _metrics_table(entries: list[dict], count: str, metrics: tuple[str, ...]) -> Table:
    table = Table()
    table.add_column("", overflow="fold")
    for column in (count, *metrics):
        table.add_column(column.replace("_", " "), justify="right")
    for entry in entries:
        name = escape(f"{entry['kind']} {entry['name']}")
        table.add_row(name, f"{entry[count]:,}", *(_cell(entry, metric) for metric in metrics))
    return table


def _tasks_table(entries: list[dict]) -> Table:
    table = Table("task", "metric")
    table.add_column("value", justify="right")
    for entry in entries:
        for metric, value in entry["metrics"].items():
            table.add_row(escape(entry["name"]), escape(metric), f"{value:.4g}")
    return table


def _cell(entry: dict, metric: str) -> str:
    """The value, and below it its interval, its ratio to the in-domain text and the base's."""
    form = _METRICS[metric]
    lines = [form.format(entry["metrics"][metric])]
    if metric in entry.get("interval", {}):
        low, high = entry["interval"][metric]
        lines.append(f"{low:.1%}-{high:.1%}")
    if metric == "perplexity" and "ratio_to_text" in entry:
        lines.append(f"{entry['ratio_to_text']:.2f}x text")
    if "base" in entry:
        change = entry["relative_change"].get(metric)
        beside = "" if change is None else f" ({change:+.1%})"
        lines.append(f"base {form.format(entry['base'][metric])}{beside}")
    return "\n".join(lines)


def _latency_line(entry: dict) -> str:
    phases = [
        f"{name.removesuffix('_ms_per_token')} {value:.3g} ms/token"
        for name, value in entry["metrics"].items()
    ]
    for phase, ratio in (entry["measurement"]["ratios"] or {}).items():
        phases += [] if ratio is None else [f"{phase} {ratio:.2f}x the base's speed"]
    inputs = entry["inputs"]
    return (
        f"latency: {', '.join(phases)}; batch {inputs['batch_size']}, prompt "
        f"{inputs['prompt_tokens']}, {inputs['new_tokens']} new tokens; {inputs['device']}, "
        f"{inputs['threads']} threads"
    )


def _table(report: dict) -> Table:
    table = Table(
        title=f"{report['model']}, {report['pack']['kept_fraction']:.1%} of the block weights kept"
    )
    for column in ("", "base", "LoRA", "packed", "of LoRA's"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    before, after = report["pack"]["params"]
    table.add_row("parameters", f"{before:,}", f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    disk = report["bytes_on_disk"]
    table.add_row(
        "bytes on disk",
        f"{disk['base']:,}",
        f"{disk['base']:,}",
        f"{disk['packed']:,}",
        f"{disk['packed'] / disk['base']:.3f}",
    )
    quality = report["perplexity"]
    cells = [f"{quality[name]:.2f}" for name in ("base", "lora", "packed")]
    ratio = quality["packed"] / quality["lora"]
    table.add_row("held-out perplexity", *cells, f"{ratio:.3f}")
    speed = report["speed"]
    for phase in ("prefill", "decode"):
        dense, packed = speed["dense"][phase], speed["model"][phase]
        if dense is not None and packed is not None:
            rates = [f"{rate['median']:,.1f}" for rate in (dense, dense, packed)]
            table.add_row(f"{phase}, tokens/s", *rates, f"{speed['ratios'][phase]:.2f}x")
    return table
