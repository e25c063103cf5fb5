"""Stage 7, command line: the commands that score a model and draw what reports say."""

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
    PromptTokens,
    Quiet,
    Repeats,
    Restart,
    Window,
    command,
)
from gatepack.progress import Log


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="File or folder of .txt or .jsonl ('text' field), of the model's domain; may be "
            "repeated. Without any input: Python's manual, the part that the demo holds out."
        ),
    ] = None,
    ood: Annotated[
        list[Path] | None, typer.Option(help="The same, from outside the model's domain.")
    ] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option(
            help=".jsonl of {question or prompt, choices, answer (index or letter)}; may be "
            "repeated."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Task names of lm-eval, with commas between; needs lm-eval.")
    ] = "",
    base: Annotated[
        str | None, typer.Option(help="Another model, scored and timed beside this one.")
    ] = None,
    windows: Annotated[int, typer.Option(help="At most so many per text; 0 for all of it.")] = 32,
    length: Window = 512,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next. Default: half of --length."),
    ] = None,
    questions: Annotated[
        int, typer.Option(help="The first so many of a --choices file or task; 0 for all.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Windows or choices per forward, at most; timing uses 1.")
    ] = 4,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time prefill and decode.")
    ] = True,
    prompt_tokens: PromptTokens = 256,
    new_tokens: NewTokens = 32,
    repeats: Repeats = 5,
    device: Device = "auto",
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="Where to write the report, as JSON.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="An earlier report: exit 1 if a value is worse than a bound allows."),
    ] = None,
    max_perplexity_ratio: Annotated[float, typer.Option(help="New / old.")] = 1.02,
    max_bits_per_byte_ratio: Annotated[float, typer.Option(help="New / old.")] = 1.01,
    max_accuracy_drop: Annotated[float, typer.Option(help="Old - new, of 1.")] = 0.01,
    max_calibration_rise: Annotated[float, typer.Option(help="New - old.")] = 0.05,
    max_latency_ratio: Annotated[
        float, typer.Option(help="New / old, of milliseconds per token.")
    ] = 1.05,
    restart: Restart = False,
    dry_run: DryRun = False,
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Score a language model on texts and questions, time it, compare with an earlier report."""
    with command(log, quiet) as shown:
        from gatepack.evaluation import EvalConfig, plan, run
        from gatepack.regression import Bounds, compare, load_report
        from gatepack.report import print_evaluation, print_evaluation_plan
        from gatepack.resume import State, state_of

        bounds = Bounds(
            max_perplexity_ratio,
            max_bits_per_byte_ratio,
            max_accuracy_drop,
            max_calibration_rise,
            max_latency_ratio,
        )
        read = (*(text or ()), *(ood or ()), *(choices or ()), *([against] if against else ()))
        if out is not None and out.resolve() in [path.resolve() for path in read]:
            raise ValueError(f"--out would overwrite {out}, which this command reads")
        earlier = None if against is None else load_report(against)
        settings = EvalConfig(
            texts=tuple(text or ()),
            ood=tuple(ood or ()),
            choices=tuple(choices or ()),
            tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
            windows=windows,
            length=length,
            stride=stride,
            questions=questions,
            batch_size=batch_size,
            latency=latency,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
        if dry_run:
            found = plan(model, settings, base=base, device=device, dtype=dtype)
            shown.result(found, print_evaluation_plan)
            return
        if restart and out is None:
            raise ValueError("--restart drops what was kept for --out, and no --out was given")
        if restart:
            State.drop(state_of(out))
        report = run(model, settings, base=base, device=device, dtype=dtype, out=out, log=shown)
        shown.result(report, print_evaluation)
        if out is not None:
            shown.say(f"written: {out}")
        if earlier is not None:
            _judge(compare(report, earlier, bounds), against, shown)


def _judge(comparison, against: Path, log: Log) -> None:
    for line in comparison.skipped:
        log.say(line)
    for line in comparison.violations:
        log.error(f"regression: {line}")
    log.say(
        f"{comparison.compared} values compared with {against}, "
        f"violations: {len(comparison.violations)}"
    )
    if comparison.violations:
        raise typer.Exit(1)


def plot(
    reports: Annotated[list[Path], typer.Argument(help="Reports of gatepack eval, one per model.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("tradeoff.png"),
    config: Config = None,
    log: LogForm = "text",
    quiet: Quiet = False,
) -> None:
    """Draw sparsity against quality against speed, from several reports on the same text."""
    with command(log, quiet) as shown:
        from gatepack.files import refuse_folder
        from gatepack.plots import draw_tradeoff
        from gatepack.regression import load_report

        refuse_folder(out)
        draw_tradeoff([load_report(path) for path in reports], out)
        shown.say(f"written: {out}")
