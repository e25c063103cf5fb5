"""The main job from end to end: on a tiny model in seconds, on SmolLM2 in the slow test."""

import importlib.util
import json
import os
import signal

import pytest
from checkpoints import save_tiny, write_documents
from packed import spoil
from typer.testing import CliRunner

import gatepack as gp
from gatepack import demo, recipe, training
from gatepack.cli import app
from gatepack.demo import DemoConfig
from gatepack.packing import pack
from gatepack.progress import Log
from gatepack.recipe import ParityError, open_state
from gatepack.resume import STATE
from gatepack.training import Interrupted, TrainConfig

QUIET = Log("quiet")
TRAIN = TrainConfig(
    steps=3, batch_size=2, window=16, lora_rank=2, calibration_batches=2, learning_rate=1e-3
)


@pytest.fixture
def model_folder(tmp_path):
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def text_file(tmp_path):
    return write_documents(tmp_path / "text.jsonl")


@pytest.fixture
def config(model_folder, text_file, tmp_path):
    return DemoConfig(
        model=str(model_folder),
        text=str(text_file),
        target=0.7,
        out=tmp_path / "out",
        width_multiple=8,
        eval_windows=4,
        prompt_tokens=8,
        new_tokens=3,
        repeats=2,
        train=TRAIN,
    )


def test_runs_from_text_to_a_packed_model(config):
    report = demo.run(config, QUIET)
    assert abs(report["pack"]["kept_fraction"] - 0.7) <= 0.005
    assert report["parity"]["max_abs_difference"] <= report["parity"]["bound"]
    assert set(report["perplexity"]) == {"base", "lora", "packed"}
    assert report["speed"]["ratios"].keys() == {"prefill", "decode"}
    assert report["bytes_on_disk"]["packed"] < report["bytes_on_disk"]["base"]
    assert json.loads((config.out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert (config.out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (config.out / STATE).exists()
    model = gp.from_pretrained(config.out)
    total = sum(p.numel() for p in model.parameters())
    assert total == report["pack"]["params"][1]


def test_interrupted_demo_goes_on_to_the_same_result(config, tmp_path, monkeypatch):
    def result(report):
        return report["perplexity"], report["pack"], report["samples"]

    whole = demo.run(config, QUIET)
    calls = []
    real_step = training.FineTuning._train_step

    def interrupting_step(self):
        real_step(self)
        calls.append(self.step)
        if len(calls) == TRAIN.steps + 2:  # the second step of the gated run
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training.FineTuning, "_train_step", interrupting_step)
    again = DemoConfig(**{**vars(config), "out": tmp_path / "again"})
    with pytest.raises(Interrupted):
        demo.run(again, QUIET)
    assert (again.out / STATE / "gated" / "run.safetensors").is_file()
    resumed = demo.run(again, QUIET)
    assert len(calls) == 2 * TRAIN.steps
    assert result(resumed) == result(whole)


def test_other_settings_do_not_resume(config):
    open_state(config, ["text"], QUIET).once("base", lambda: 1.0)
    other = DemoConfig(**{**vars(config), "target": 0.6})
    with pytest.raises(ValueError, match=r"another target \(0\.7, now 0\.6\); pass --restart"):
        open_state(other, ["text"], QUIET)
    with pytest.raises(ValueError, match="another text_sha256"):
        open_state(config, ["other text"], QUIET)


def test_parity_failure_is_an_error(config, monkeypatch):
    monkeypatch.setattr(recipe, "pack", lambda model: (pack(model), spoil(model))[0])
    with pytest.raises(ParityError, match="the gated model gives logits that differ"):
        demo.run(config, QUIET)
    assert not (config.out / "config.json").exists()


def test_failed_run_leaves_an_earlier_result(config, monkeypatch):
    demo.run(config, QUIET)
    before = (config.out / "model.safetensors").read_bytes()
    monkeypatch.setattr(recipe, "pack", lambda model: (pack(model), spoil(model, float("nan")))[0])
    with pytest.raises(ParityError):
        demo.run(config, QUIET)
    assert (config.out / "model.safetensors").read_bytes() == before
    gp.from_pretrained(config.out)


def test_plan_counts_both_fine_tunings(config):
    found = demo.plan(config, QUIET)
    steps = config.train.steps
    assert found["tokens"] == 2 * steps * config.train.batch_size * config.train.window
    seconds = found["seconds"]
    closing = len(config.close) * (config.train.calibration_batches + config.train.repaired)
    least = (2 * steps + closing) * seconds["step"]
    assert seconds["total"] == pytest.approx(least + 3 * seconds["scoring"])
    assert not config.out.exists()


def test_command_line_runs_the_demo(config):
    options = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--window",
        "16",
        "--lora-rank",
        "2",
        "--eval-windows",
        "4",
    ]
    options += ["--target", "0.7", "--width-multiple", "8", "--out", str(config.out)]
    result = CliRunner().invoke(
        app, ["demo", "--model", config.model, "--text", config.text, *options]
    )
    assert result.exit_code == 0, result.output
    for words in ("held-out perplexity", "parity: packed and gated", "prefill, tokens/s"):
        assert words in result.output
    quality = json.loads((config.out / "report.json").read_text())["perplexity"]
    (line,) = [each for each in result.output.splitlines() if "held-out perplexity" in each]
    assert f"{quality['packed'] / quality['lora']:.3f}" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "1.5"], "target must be a kept fraction in (0, 1), got 1.5"),
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used here"),
        (["--learning-rate", "-1"], "learning_rate must be a positive number"),
        (["--text", "no/such/file.txt"], "no/such/file.txt"),
        (["--model", "./no/such/model"], "no/such/model"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_1(options, message, text_file, tmp_path):
    arguments = ["demo", "--text", str(text_file), "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "config.json").exists()


def test_missing_package_is_said_before_any_work(config, monkeypatch):
    real = importlib.util.find_spec

    def without_matplotlib(name, *rest):
        return None if name == "matplotlib" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_matplotlib)
    with pytest.raises(ImportError, match="the demo needs matplotlib: pip install matplotlib"):
        demo.run(config, QUIET)
    assert not config.out.exists()


def test_full_disk_is_one_sentence_and_keeps_the_earlier_result(config, monkeypatch):
    demo.run(config, QUIET)
    before = (config.out / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match="what was there is unchanged: .*No space left on device"):
        demo.run(config, QUIET)
    assert (config.out / "model.safetensors").read_bytes() == before
    gp.from_pretrained(config.out)


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == gp.__version__


@pytest.mark.slow
def test_smollm2_gate_three_steps_pack_reload(tmp_path):
    train = TrainConfig(steps=3, batch_size=2, window=64, calibration_batches=4)
    report = demo.run(
        DemoConfig(
            out=tmp_path / "out",
            eval_windows=4,
            prompt_tokens=16,
            new_tokens=2,
            repeats=1,
            train=train,
        ),
        QUIET,
    )
    assert abs(report["pack"]["kept_fraction"] - 0.8) <= 0.005
    assert report["parity"]["max_abs_difference"] <= report["parity"]["bound"]
    assert 1 < report["perplexity"]["base"] < 60
