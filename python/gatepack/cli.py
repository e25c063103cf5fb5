"""Stage 7, command line: gatepack's commands."""

from pathlib import Path
from typing import Annotated

import typer

from gatepack.cli_common import MODEL_HELP, Config, Device, LogForm, Quiet, command
from gatepack.cli_eval import evaluate, plot

app = typer.Typer(
    help="Train with gates, pack what stays open.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
)
app.command("eval")(evaluate)
app.command("plot")(plot)


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
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "smollm2",
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
    device: Device = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop an unfinished run in --out.")
    ] = False,
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Fine-tune a language model with gates and LoRA, pack it, check it and measure it."""
    with command(log, quiet) as shown:
        import shutil

        from gatepack.demo import STATE, DemoConfig, run
        from gatepack.training import TrainConfig

        settings = DemoConfig(
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
        report = run(settings, shown)
        from gatepack.report import print_report

        shown.result(report, lambda report: print_report(report, out))


if __name__ == "__main__":
    app()
