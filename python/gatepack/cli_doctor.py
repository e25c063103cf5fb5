"""Stage 7, command line: the command that says what is usable on a machine."""

import json
from typing import Annotated

import typer


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
