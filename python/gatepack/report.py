"""Stage 7, command line: the demo's report as tables on a terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_report(report: dict, out: Path) -> None:
    """Prints what gatepack.demo.run returned; out is where its files are."""
    console = Console()
    console.print(_table(report))
    parity = report["parity"]
    console.print(
        f"parity: packed and gated logits differ by at most {parity['max_abs_difference']:.2g} "
        f"(rounding bound {parity['bound']:.2g}); reloaded logits are identical"
    )
    samples = report["samples"]
    for name in ("prompt", "base", "packed"):
        console.print(f"[bold]{name}[/bold]", end=" ")
        console.print(" ".join(samples[name].split()), markup=False, highlight=False)
    console.print(f"written: {out}/ (packed model, report.json, report.png)", highlight=False)


def _table(report: dict) -> Table:
    table = Table(
        title=f"{report['model']}, {report['pack']['kept_fraction']:.1%} of the block weights kept"
    )
    for column in ("", "base", "LoRA, no gates", "packed", "ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    before, after = report["pack"]["params"]
    table.add_row("parameters", f"{before:,}", f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    disk = report["bytes_on_disk"]
    table.add_row(
        "bytes on disk",
        f"{disk['base']:,}",
        f"{disk['base']:,}",
        f"{disk['packed']:,}",
        _ratio(disk),
    )
    quality = report["perplexity"]
    cells = [f"{quality[name]:.2f}" for name in ("base", "lora", "packed")]
    table.add_row("held-out perplexity", *cells, _ratio(quality))
    speed = report["speed"]
    for phase in ("prefill", "decode"):
        dense, packed = speed["dense"][phase], speed["model"][phase]
        if dense is not None and packed is not None:
            rates = [f"{rate['median']:,.1f}" for rate in (dense, dense, packed)]
            table.add_row(f"{phase}, tokens/s", *rates, f"{speed['ratios'][phase]:.2f}x")
    return table


def _ratio(values: dict) -> str:
    return f"{values['packed'] / values['base']:.3f}"
