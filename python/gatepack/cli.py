"""Stage 7, command line: gatepack's commands."""

from typing import Annotated

import typer

from gatepack.cli_bench import bench
from gatepack.cli_doctor import doctor
from gatepack.cli_eval import evaluate, plot
from gatepack.cli_export import export
from gatepack.cli_train import demo, pack, train

app = typer.Typer(
    help="Train with gates, pack what stays open.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
)
for command in (train, pack, export, bench, demo, plot, doctor):
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


if __name__ == "__main__":
    app()
