"""gatepack train and pack: what they leave on disk, how they go on, and what they plan."""

import json

import pytest
import torch
from checkpoints import save_tiny, write_documents
from packed import spoil
from typer.testing import CliRunner

import gatepack as gp
from gatepack import demo, recipe, training
from gatepack.cli import app
from gatepack.demo import DemoConfig
from gatepack.packing import pack
from gatepack.progress import Log
from gatepack.quality import max_logit_difference
from gatepack.recipe import (
    PackConfig,
    ParityError,
    RecipeConfig,
    pack_checkpoint,
    plan_packing,
    plan_training,
    train,
)
from gatepack.resume import STATE
from gatepack.training import Interrupted, TrainConfig

QUIET = Log("quiet")
SMALL = TrainConfig(
    steps=4, batch_size=2, window=16, lora_rank=2, calibration_batches=2, learning_rate=1e-3
)


def config_in(folder):
    return RecipeConfig(
        model=str(save_tiny(folder / "tiny")),
        text=write_documents(folder / "text.jsonl"),
        target=0.7,
        out=folder / "gated",
        device="cpu",
        width_multiple=8,
        eval_windows=4,
        train=SMALL,
    )


@pytest.fixture
def config(tmp_path):
    return config_in(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the config, what train returned); its folder is only read."""
    config = config_in(tmp_path_factory.mktemp("trained"))
    return config, train(config, QUIET)


@pytest.fixture
def packing(trained, tmp_path):
    config, _ = trained
    return PackConfig(str(config.out), config.text, tmp_path / "packed", window=16, windows=4)


def flags(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def invoke(*arguments):
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(each) for each in arguments], env=environment)


def test_train_then_pack(trained, packing):
    config, report = trained
    assert abs(report["kept_fraction"] - 0.7) <= 0.005
    assert len(report["losses"]) == SMALL.steps
    assert set(report["perplexity"]) == {"base", "gated"}
    assert json.loads((config.out / "train.json").read_text()) == json.loads(json.dumps(report))
    for name in ("losses.png", "gates.png"):
        assert (config.out / name).read_bytes().startswith(b"\x89PNG")
    assert not (config.out / STATE).exists()
    gated = gp.from_pretrained(config.out).eval()
    assert gp.gates_of(gated).kept_fraction() == report["kept_fraction"]

    done = pack_checkpoint(packing, QUIET)
    assert done["pack"]["kept_fraction"] == report["kept_fraction"]
    assert done["perplexity"]["gated"] == report["perplexity"]["gated"]
    assert done["parity"]["max_abs_difference"] <= done["parity"]["bound"]
    assert json.loads((packing.out / "pack.json").read_text()) == json.loads(json.dumps(done))
    packed = gp.from_pretrained(packing.out).eval()
    assert sum(p.numel() for p in packed.parameters()) == done["pack"]["params"][1]
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    assert max_logit_difference(gated, packed, ids) <= done["parity"]["bound"]


def test_interrupted_training_goes_on_to_the_same_result(trained, tmp_path, monkeypatch):
    config, whole = trained
    step = training.FineTuning._train_step
    again = RecipeConfig(**{**vars(config), "out": tmp_path / "again"})

    def two_steps(self):
        if self.step == 2:
            self.save()
            raise Interrupted
        step(self)

    monkeypatch.setattr(training.FineTuning, "_train_step", two_steps)
    with pytest.raises(Interrupted):
        train(again, QUIET)
    assert not (again.out / "config.json").exists()
    monkeypatch.setattr(training.FineTuning, "_train_step", step)
    resumed = train(again, QUIET)
    assert resumed["losses"] == whole["losses"]
    assert resumed["perplexity"] == whole["perplexity"]
    weights = [(out / "model.safetensors").read_bytes() for out in (config.out, again.out)]
    assert weights[0] == weights[1]


def test_plan_counts_what_training_then_does(config):
    plan = plan_training(config, QUIET)
    assert not config.out.exists()
    assert plan["tokens"] == SMALL.steps * SMALL.batch_size * SMALL.window
    assert plan["windows"]["held_out"] == 4
    dense = gp.models.load_model(config.model)[0]
    gates = gp.attach(dense, config.gates())
    assert plan["params"]["blocks"] == gates.costs.total
    assert abs(plan["params"]["kept"] / gates.costs.total - 0.7) <= 0.005
    # A and B of rank 2 on each linear: q, k, v, o, gate, up and down of two layers.
    sizes = ((48, 48), (48, 16), (48, 16), (48, 48), (48, 40), (48, 40), (40, 48))
    assert plan["params"]["lora"] == 2 * sum(2 * (i + o) for i, o in sizes)
    assert plan["bytes"]["training"] == 3 * 4 * plan["params"]["lora"]
    steps = SMALL.steps + SMALL.calibration_batches + SMALL.repaired
    assert plan["seconds"]["total"] >= steps * plan["seconds"]["step"] > 0


def test_plan_refuses_what_training_would(config):
    small = TrainConfig(**{**vars(SMALL), "batch_size": 10_000})
    with pytest.raises(ValueError, match="batch_size must lie between 1 and the number of windows"):
        plan_training(RecipeConfig(**{**vars(config), "train": small}), QUIET)


def test_plan_of_packing_writes_nothing(packing):
    report, seconds = plan_packing(packing, QUIET)
    assert seconds > 0
    assert abs(report.kept_fraction - 0.7) <= 0.005
    assert not packing.out.exists()


def test_pack_refuses_a_model_without_gates(config, tmp_path):
    with pytest.raises(ValueError, match="tiny has no gates to pack"):
        pack_checkpoint(PackConfig(config.model, config.text, tmp_path / "p", window=16), QUIET)
    for name, value in (("window", 1), ("windows", 0)):
        with pytest.raises(ValueError, match=f"{name} must be >="):
            PackConfig(**{name: value})


@pytest.mark.parametrize(
    "command", [["train"], ["demo", "--model"], ["pack"], ["export", "--format", "onnx"]]
)
def test_no_command_replaces_its_own_model(command, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "tiny")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for model, out in ((folder, "tiny/."), (folder, "link"), ("link", folder)):
        done = invoke(*command, model, "--out", out)
        assert done.exit_code == 1, done.output
        assert "tiny is the folder of the model itself" in done.output and "(--out)" in done.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "command", [["train"], ["demo", "--model"], ["pack"], ["export", "--format", "onnx"]]
)
def test_no_command_replaces_the_working_directory(command, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "tiny")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for out in (".", ".."):
        done = invoke(*command, folder, "--out", out)
        assert done.exit_code == 1 and "is the working directory or holds it" in done.output
    assert [path.name for path in (tmp_path / "here").rglob("*")] == ["below"]


def test_a_folder_with_the_name_of_the_default_model_is_not_its_own(tmp_path, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert RecipeConfig("smollm2", out="smollm2").out == "smollm2"


@pytest.mark.parametrize("run", [train, demo.run])
def test_what_cannot_be_trained_is_refused_before_any_work(config, trained, run, monkeypatch):
    for owner in (recipe, demo):
        monkeypatch.setattr(owner, "score", lambda *_: pytest.fail("a model was scored"))
    too_large = TrainConfig(**{**vars(SMALL), "batch_size": 10_000})
    for changed, message in (
        ({"target": 0.05}, "target=0.05 cannot be met"),
        ({"train": too_large}, "batch_size must lie between 1 and the number of windows"),
        ({"model": str(trained[0].out)}, "has gates already: .* gatepack pack "),
    ):
        with pytest.raises(ValueError, match=message):
            run(DemoConfig(**{**vars(config), **changed}), QUIET)
        assert not config.out.exists()


def test_other_logits_are_not_written(packing, monkeypatch):
    monkeypatch.setattr(recipe, "pack", lambda model: (pack(model), spoil(model))[0])
    with pytest.raises(ParityError, match="the gated model gives logits that differ"):
        pack_checkpoint(packing, QUIET)
    assert not packing.out.exists()


def test_commands_print_write_and_plan(config, tmp_path):
    settings = {"text": config.text, "target": 0.7, "out": config.out, "device": "cpu"}
    shape = {"width_multiple": 8, "eval_windows": 4}
    length = {name: getattr(SMALL, name) for name in ("steps", "batch_size", "window", "lora_rank")}
    yaml = tmp_path / "train.yaml"
    yaml.write_text("\n".join(f"{name}: {value}" for name, value in {**shape, **length}.items()))
    arguments = ["train", config.model, "--config", yaml, *flags(**settings)]
    done = invoke(*arguments, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "parameters when packed, about" in done.output and not config.out.exists()
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert "held-out perplexity, gated" in done.output

    packed = tmp_path / "packed"
    options = flags(text=config.text, out=packed, window=16, windows=4)
    done = invoke("pack", config.out, *options, "--dry-run")
    assert done.exit_code == 0 and "in blocks" in done.output and not packed.exists()
    done = invoke("pack", config.out, *options, "--log", "json")
    assert done.exit_code == 0, done.output
    assert "shards" not in done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["event"] == "result" and "params" in last["result"]["pack"]
    assert gp.from_pretrained(packed)


def test_a_model_in_the_way_is_told_of(packing, tmp_path, capsys):
    pack_checkpoint(packing, Log("text"))
    assert "holds a model" not in capsys.readouterr().out
    pack_checkpoint(packing, Log("text"))
    told = f"{packing.out} holds a model, which the new one will replace"
    assert told in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", [["train"], ["demo", "--model"], ["pack"]])
def test_a_file_is_no_folder_for_a_model(command, config, tmp_path):
    (tmp_path / "short.txt").write_text("kept")
    done = invoke(*command, config.model, "--out", tmp_path / "short.txt")
    assert done.exit_code == 1 and "short.txt is not a folder: name another" in done.output
    assert (tmp_path / "short.txt").read_text() == "kept"


@pytest.mark.parametrize("what", ["train", "pack", "export"])
def test_windows_longer_than_the_model_are_refused_by_name(what, config, trained, tmp_path):
    model = trained[0].out if what == "pack" else config.model
    command = [what, model, "--text", config.text, "--window", 10_000, "--out", tmp_path / "o"]
    done = invoke(*command, *(["--format", "onnx"] if what == "export" else []))
    assert done.exit_code == 1, done.output
    assert "window is 10000 tokens, the model has" in done.output
    assert not (tmp_path / "o").exists()


def test_restart_drops_an_unfinished_run(config):
    state = config.out / STATE
    state.mkdir(parents=True)
    (state / "settings.json").write_text('{"target": 0.5}')
    (state / "results.json").write_text('{"base": 9.5}')
    options = flags(text=config.text, out=config.out, steps=1, batch_size=2, window=16)
    options += flags(width_multiple=8, eval_windows=2, target=0.7)
    done = invoke("train", config.model, *options)
    assert done.exit_code == 1 and "pass --restart to drop it" in done.stderr
    done = invoke("train", config.model, *options, "--restart")
    assert done.exit_code == 0, done.output
