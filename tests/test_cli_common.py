"""What every command shares: a YAML file of options, forms of the log, errors and exit codes."""

import json
import logging
import re
import warnings

import pytest
import typer
from typer.testing import CliRunner

from gatepack.cli_common import Config, LogForm, Quiet, command
from gatepack.progress import Log
from gatepack.training import Interrupted


@pytest.fixture
def app():
    app = typer.Typer()

    @app.command()
    def add(
        start: str = "a",
        learning_rate: float = 1.0,
        text: list[str] | None = None,
        fail: str = "",
        config: Config = None,
        log: LogForm = "text",
        quiet: Quiet = False,
    ):
        with command(log, quiet) as shown:
            shown.say("begins")
            with shown.bar("adding", "step", 2, leave=True) as tell:
                tell(1, loss=0.5)
                tell(2, loss=0.25)
            errors = {"value": ValueError("a must be b"), "stop": Interrupted()}
            if fail:
                raise errors[fail]
            found = {"start": start, "learning_rate": learning_rate, "text": text or []}
            shown.result(found, lambda found: print(f"found {found}"))

    return app


def invoke(app, *arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


def events(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_yaml_gives_defaults_and_flags_win(app, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("start: b\nlearning-rate: 4e-3\ntext: [x, y]\n", encoding="utf-8")
    done = invoke(app, "--config", str(path))
    assert "found {'start': 'b', 'learning_rate': 0.004, 'text': ['x', 'y']}" in done.stdout
    done = invoke(app, "--start", "c", "--config", str(path))
    assert "found {'start': 'c', 'learning_rate': 0.004" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1\n", "has learnin_rate; add takes fail,"),
        ("- 1\n", "must hold a mapping of option names to values"),
        ("a: [\n", "cannot be read"),
        ("learning_rate: fast\n", "Invalid value for '--learning-rate'"),
    ],
)
def test_yaml_that_does_not_fit_is_a_usage_error(app, tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    done = invoke(app, "--config", str(path))
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert invoke(app, "--config", str(tmp_path / "none.yaml")).exit_code == 2


def test_text_has_sentences_and_bars_quiet_only_the_result(app):
    done = invoke(app)
    assert done.stdout.splitlines()[0] == "begins" and "found" in done.stdout
    assert "adding" in done.stderr and "loss=0.25" in done.stderr
    for quiet in (["-q"], ["--log", "quiet"]):
        done = invoke(app, *quiet)
        assert done.stdout.startswith("found") and done.stderr == ""


def test_json_is_an_object_per_line(app):
    done = invoke(app, "--log", "json")
    assert done.stderr == ""
    message, first, second, result = events(done)
    assert message["event"] == "message" and message["text"] == "begins"
    assert abs(result.pop("time") - message["time"]) < 60
    assert first.items() >= {"phase": "adding", "done": 1, "total": 2, "loss": 0.5}.items()
    assert second["done"] == 2
    assert result["event"] == "result" and result["result"]["start"] == "a"


def test_exit_codes(app):
    done = invoke(app, "--fail", "value")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "error: a must be b")
    done = invoke(app, "--fail", "value", "--log", "json")
    assert done.exit_code == 1 and events(done)[-1]["text"] == "a must be b"
    done = invoke(app, "--fail", "stop")
    assert done.exit_code == 130
    assert "interrupted: run the same command again to go on from here" in done.stderr
    done = invoke(app, "--log", "loud")
    assert done.exit_code == 2 and "form must be one of text, json, quiet" in done.stderr


def test_phases_are_bars_one_after_another(capsys):
    with Log().phases() as tell:
        tell("one", 1, 2)
        tell("one", 2, 2)
        tell("two", 1, 1)
    shown = capsys.readouterr().err
    assert "one: 100%" in shown and "two: 100%" in shown
    assert shown.index("one") < shown.index("two")
    with Log("json").phases() as tell:
        tell("one", 1, 2)
    event = json.loads(capsys.readouterr().out)
    assert event.items() >= {"phase": "one", "done": 1, "total": 2}.items()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_complete(shell):
    """What a shell's completion calls: the program itself, with these variables."""
    from gatepack.cli import app

    def complete(words):
        form = {"bash": {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}}
        variables = {"_GATEPACK_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words}
        variables |= form.get(shell, {})
        if shell == "fish":
            variables["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
        return CliRunner().invoke(app, [], prog_name="gatepack", env=variables).output

    assert {"train", "pack", "export", "eval", "bench", "demo", "doctor"} <= set(
        re.findall(r"\w+", complete("gatepack "))
    )
    assert "--format" in complete("gatepack export --for")


@pytest.mark.parametrize(("form", "count"), [("text", 1), ("quiet", 0), ("json", 0)])
def test_warnings_are_for_people_who_read_along(form, count, caplog):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with command(form):
            warnings.warn("deprecated", FutureWarning, stacklevel=2)
            logging.getLogger("gatepack.budget").warning("a narrower multiple")
    assert len(found) == count and caplog.text.count("a narrower multiple") == count
    logging.getLogger("gatepack.budget").warning("afterwards")
    assert "afterwards" in caplog.text
