"""Stage 7, command line: the commands that train with gates and pack what stays open."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gatepack.cli_common import (
    MODEL_HELP,
    Config,
    Device,
    DryRun,
    Dtype,
    LogForm,
    Quiet,
    Restart,
    Text,
    Window,
    command,
)

Target = Annotated[float, typer.Option(help="Kept fraction of the blocks' weights, in (0, 1).")]
Close = Annotated[
    list[float],
    typer.Option(
        help="Fraction of the steps, 0 to 1, at which gates close a part of the way; give it again "
        "for each part. 0: before LoRA trains."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Windows per step.")]
LearningRate = Annotated[float, typer.Option(help="Peak of the cosine schedule.")]
LoraRank = Annotated[int, typer.Option(help="Rank of LoRA on every linear of the blocks.")]
WidthMultiple = Annotated[int, typer.Option(help="Kept channels per layer are a multiple of this.")]
EqualLayers = Annotated[
    bool,
    typer.Option("--equal-layers", help="The same widths in every layer, as stock engines want."),
]
EvalWindows = Annotated[int, typer.Option(help="Held-out windows to score.")]
Seed = Annotated[int, typer.Option(help="Of LoRA's initial values and of the order of the text.")]


def train(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "smollm2",
    text: Text = None,
    target: Target = 0.8,
    close: Close = (0.2, 0.5),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 40,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the rate rises.")] = 2,
    batch_size: BatchSize = 4,
    window: Window = 256,
    learning_rate: LearningRate = 4e-3,
    lora_rank: LoraRank = 16,
    calibration_batches: Annotated[
        int, typer.Option(help="Batches by which units are priced.")
    ] = 8,
    repair_batches: Annotated[
        int | None,
        typer.Option(help="Batches by which what stays is repaired; as many as steps, at most 40."),
    ] = None,
    width_multiple: WidthMultiple = 32,
    equal_layers: EqualLayers = False,
    eval_windows: EvalWindows = 24,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the gated model, train.json and two pictures.")
    ] = Path("out/gated"),
    device: Device = "auto",
    restart: Restart = False,
    dry_run: DryRun = False,
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Close a language model's gates down to a budget and train LoRA through what stays open."""
    options = locals()
    with command(log, quiet) as shown:
        from gatepack.recipe import RecipeConfig, plan_training
        from gatepack.recipe import train as train_model
        from gatepack.report import print_training, print_training_plan
        from gatepack.resume import STATE, State

        settings = _settings(RecipeConfig, options)
        if dry_run:
            shown.result(plan_training(settings, shown), print_training_plan)
            return
        if restart:
            State.drop(out / STATE)
        shown.result(train_model(settings, shown), lambda report: print_training(report, out))


def pack(
    model: Annotated[str, typer.Argument(help="Gated model, as gatepack train writes.")] = (
        "out/gated"
    ),
    text: Annotated[
        Path | None,
        typer.Option(help="As for train: the part that it held out is scored before and after."),
    ] = None,
    window: Window = 256,
    windows: EvalWindows = 24,
    out: Annotated[Path, typer.Option(help="Folder for the packed model and pack.json.")] = Path(
        "out/packed"
    ),
    device: Device = "auto",
    dtype: Dtype = "auto",
    restart: Restart = False,
    dry_run: DryRun = False,
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Remove a gated model's closed units physically, compare the logits, and save the rest."""
    with command(log, quiet) as shown:
        from gatepack.recipe import PackConfig, pack_checkpoint, plan_packing
        from gatepack.report import print_packing, print_packing_plan
        from gatepack.resume import STATE, State

        settings = PackConfig(model, text, out, window, windows, device, dtype)
        if dry_run:
            report, seconds = plan_packing(settings, shown)
            plan = {**report.to_dict(), "seconds": seconds}
            shown.result(plan, lambda _: print_packing_plan(report, seconds))
            return
        if restart:
            State.drop(out / STATE)
        report = pack_checkpoint(settings, shown)
        shown.result(report, lambda report: print_packing(report, out))


def demo(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "smollm2",
    text: Text = None,
    target: Target = 0.8,
    close: Close = (0.2, 0.5),
    steps: Annotated[
        int, typer.Option(help="Training steps, for each of the two fine-tunings.")
    ] = 40,
    batch_size: BatchSize = 4,
    window: Window = 256,
    learning_rate: LearningRate = 4e-3,
    lora_rank: LoraRank = 16,
    width_multiple: WidthMultiple = 32,
    equal_layers: EqualLayers = False,
    eval_windows: EvalWindows = 24,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for the packed model, report.json and report.png.")
    ] = Path("out/demo"),
    device: Device = "auto",
    restart: Restart = False,
    dry_run: DryRun = False,
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Fine-tune a language model with gates and LoRA, pack it, check it and measure it."""
    options = locals()
    with command(log, quiet) as shown:
        from gatepack.demo import DemoConfig, plan, run
        from gatepack.report import print_report, print_training_plan
        from gatepack.resume import STATE, State

        settings = _settings(DemoConfig, options)
        if dry_run:
            shown.result(plan(settings, shown), print_training_plan)
            return
        if restart:
            State.drop(out / STATE)
        shown.result(run(settings, shown), lambda report: print_report(report, out))


def _settings(form, options: dict):
    """A RecipeConfig or a form of it, of those options that it or its TrainConfig has."""
    from gatepack.training import TrainConfig

    def known(form) -> dict:
        names = {field.name for field in dataclasses.fields(form)}
        return {name: value for name, value in options.items() if name in names}

    return form(**known(form), train=TrainConfig(**known(TrainConfig)))
