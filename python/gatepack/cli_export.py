"""Stage 7, command line: the command that writes a packed model for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from gatepack.cli_common import (
    Config,
    DryRun,
    LogForm,
    NewTokens,
    PackedModel,
    PromptTokens,
    Quiet,
    Repeats,
    Restart,
    Text,
    Window,
    command,
)


def export(
    model: PackedModel = "out/packed",
    format: Annotated[
        str,
        typer.Option(
            help="uniform (stock checkpoint), hf (sizes of each layer, with a modelling file), "
            "gguf (llama.cpp), decilm (vLLM, SGLang, TensorRT-LLM) or onnx (onnxruntime)."
        ),
    ] = "uniform",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, for gguf also q8_0, or auto.")
    ] = "auto",
    text: Text = None,
    window: Window = 128,
    windows: Annotated[int, typer.Option(help="Windows on which it is compared.")] = 4,
    base: Annotated[str, typer.Option(help="The dense model's name, for the model card.")] = "",
    data: Annotated[
        str, typer.Option(help="What it was pruned or trained on, for the model card.")
    ] = "",
    speed: Annotated[bool, typer.Option(help="Time the model for the model card.")] = True,
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 16,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="Folder for the export and its model card.")] = Path(
        "out/export"
    ),
    restart: Restart = False,
    dry_run: DryRun = False,
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Write a packed model for other programs, and compare what one of them computes."""
    with command(log, quiet) as shown:
        from gatepack.exporters import run as exporting
        from gatepack.report import print_export, print_export_plan
        from gatepack.resume import STATE, State

        settings = exporting.ExportConfig(
            model=model,
            out=out,
            format=format,
            dtype=dtype,
            text=text,
            window=window,
            windows=windows,
            base=base,
            data=data,
            speed=speed,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
        if dry_run:
            shown.result(exporting.dry_run(settings, shown), print_export_plan)
            return
        if restart:
            State.drop(out / STATE)
        report = exporting.run(settings, shown)
        shown.result(report, lambda report: print_export(report, out))
