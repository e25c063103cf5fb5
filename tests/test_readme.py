"""What README promises: current tables, code that parses and names that exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import report
import typer
from checkpoints import save_tiny, write_documents
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import gatepack
from gatepack.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_the_results():
    assert report.with_results(README) == README, "run python benchmarks/report.py"


def test_figures_come_from_the_results():
    drawn = {path.name: path.read_text(encoding="utf-8") for path in report.FIGURES.glob("*.svg")}
    assert drawn == report.figures(), "run python benchmarks/report.py"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_parse_and_use_public_names(code):
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "gp"
        ):
            assert node.attr in gatepack.__all__, node.attr


COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if "--" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_flags_exist(line):
    command = re.search(r"(?:gatepack|make) (\w+)", line).group(1)
    options = {"env": {"COLUMNS": "200", "NO_COLOR": "1"}}
    help_text = CliRunner().invoke(app, [command, "--help"], **options).output
    for flag in re.findall(r"--[a-z][a-z-]*", line):
        assert flag in help_text


SMALL = {
    "train": "--steps 1 --batch-size 2 --window 16 --lora-rank 2 --calibration-batches 2 "
    "--width-multiple 8 --eval-windows 2",
    "pack": "--window 16 --windows 2",
    "bench": "--prompt-tokens 8 --new-tokens 2 --repeats 1",
    "export": "--window 16 --windows 2 --prompt-tokens 8 --new-tokens 2 --repeats 1",
}


def test_commands_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    write_documents(tmp_path / "text.jsonl")
    places = {"PATH_OR_HUB_NAME": "tiny", "FILE_OR_FOLDER": "text.jsonl"}
    lines = [
        shlex.split(line)
        for line in COMMANDS
        if re.match("gatepack (train|pack|bench|export)", line)
    ]
    assert [line[1] for line in lines] == ["train", "train", "pack", "bench", "export"]
    for _, name, *arguments in lines:
        arguments = [places.get(each, each) for each in arguments] + SMALL[name].split()
        done = CliRunner().invoke(app, [name, *arguments])
        assert done.exit_code == 0, done.output
    AutoModelForCausalLM.from_pretrained("small/export")


def test_flags_named_in_prose_exist():
    help_text = "".join(
        CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        for name in typer.main.get_command(app).commands
    )
    for flag in re.findall(r"`(--[a-z][a-z-]*)", README):
        assert flag in help_text, flag


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
