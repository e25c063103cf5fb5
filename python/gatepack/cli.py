"""Stage 7, command line: gatepack's commands."""

from typing import Annotated

import typer

from gatepack.cli_bench import bench
from gatepack.cli_eval import evaluate, plot
from gatepack.cli_export import export
from gatepack.cli_train import demo, pack, train

app = typer.Typer(
    help="Train with gates, pack what stays open.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
)
for command in (train, pack, export, bench, demo, plot):
    app.command(command.__name__)(command)
app.command("eval")(evaluate)


def _version(show: bool) -> None:
    if show:
        from gatepack import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Train with gates, pack what stays open."""


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for bug reports and scripts.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if there is any gap.")
    ] = False,
) -> None:
    """Say what is usable here and why not, and the line that would fix each gap.

    Builds the extension if no use has yet, as the first use would.
    """
    import json

    from rich.console import Console

    from gatepack.doctor import examine, show

    with Console(stderr=True).status("Looking; the extension is built if it was not yet"):
        report = examine()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        show(report)
    if strict and report.gaps:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
