"""Stage 7, command line: the command that times a packed model beside the dense one."""

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
    NewTokens,
    PackedModel,
    PromptTokens,
    Quiet,
    Repeats,
    Restart,
    command,
)


def bench(
    model: PackedModel = "out/packed",
    dense: Annotated[
        str | None,
        typer.Option(help=f"{MODEL_HELP} Default: the same config with random weights."),
    ] = None,
    prompt_tokens: PromptTokens = 256,
    new_tokens: NewTokens = 32,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    repeats: Repeats = 5,
    out: Annotated[
        Path, typer.Option(help="Folder for bench.json, bench.png and bench.html.")
    ] = Path("out/bench"),
    latency_table: Annotated[
        Path | None,
        typer.Option(
            help="Time layers of a dense model by their shape instead, for target_of='latency', "
            "and write the table here."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    restart: Restart = False,
    dry_run: DryRun = False,
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Time dense against packed, in turn: prefill, decode, tokens/s and memory."""
    with command(log, quiet) as shown:
        from gatepack.bench import BenchConfig, plan, run
        from gatepack.report import print_bench, print_bench_plan, print_latency_table
        from gatepack.resume import STATE, State, state_of

        settings = BenchConfig(
            model=model,
            dense=dense,
            out=out,
            device=device,
            dtype=dtype,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            repeats=repeats,
        )
        if latency_table is not None:
            from gatepack import latency_bench

            if dry_run:
                shown.result(latency_bench.plan(settings, shown), print_bench_plan)
                return
            if restart:
                State.drop(state_of(latency_table))
            shown.result(
                latency_bench.run(settings, latency_table, shown),
                lambda table: print_latency_table(table, latency_table),
            )
            return
        if dry_run:
            shown.result(plan(settings, shown), print_bench_plan)
            return
        if restart:
            State.drop(out / STATE)
        shown.result(run(settings, shown), lambda report: print_bench(report, out))
