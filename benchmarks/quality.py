"""Quality at a size: every method on the same text, tokens and packer, one JSON file per run.

python benchmarks/quality.py --domain medical --train medquad_train.jsonl \\
    --test medquad_test.jsonl --choices pubmedqa_test.jsonl --ood wikitext2_test.txt

Runs that stand in --out with the same settings are left out, and models that stand in --work are
not trained again, so a call that was cut off goes on when it is given once more. Methods: dense
(LoRA and nothing removed), recipe (gatepack's default one, which closes at --close of the steps),
distilled (the same with the dense model as its teacher), and those of gatepack.methods.
"""

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from _harness import command_line, environment

from gatepack import methods
from gatepack.checkpoint import save_pretrained
from gatepack.config import GateConfig
from gatepack.data import load_documents, to_windows
from gatepack.distillation import Distillation
from gatepack.evaluation import EvalConfig, evaluate
from gatepack.files import plain, write_json
from gatepack.methods.one_shot import fine_tune, run_beside_lora
from gatepack.models import load_model, torch_device
from gatepack.progress import Log
from gatepack.scoring import load_questions
from gatepack.timing import measure
from gatepack.training import TrainConfig

ONE_SHOT = ("Magnitude", "WandaSP", "FLAP", "Taylor", "ContextPruning")
OURS = ("recipe", "distilled")
METHODS = ("dense", *OURS, *ONE_SHOT, "FineGates", "ATP")
CLOSE = methods.CloseAndRepair.close
TRAVEL = 4.0  # how far FineGates may move a logit until gates freeze; 1.55 down, it closes
GENERATOR_RATE = 1e-2  # the published one is for thousands of steps
DISTILLATION = Distillation(temperature=1.0, weight=0.5, task_weight=0.5)
WINDOW, STRIDE = 512, 448  # tokens of a scored window, and of it those that count
# Batches by which units are scored, and by which the recipe repairs; other cells say so.
CALIBRATION, REPAIR = 16, 80


@dataclass(frozen=True)
class Cell:
    """One run: a method, the fraction of the blocks' weights that it keeps, and a seed.

    close: of the recipe, the fractions of the steps at which gates close.
    """

    model: str
    domain: str
    method: str
    kept: float
    width_multiple: int = 32
    train: TrainConfig = field(default_factory=TrainConfig)
    close: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        scored, repaired = self.train.calibration_batches, self.train.repair_batches
        name = f"{self.domain}-{self.method}-{self.kept}-{self.train.seed}"
        name += "" if scored == CALIBRATION else f"-calibrated{scored}"
        name += "" if repaired == REPAIR else f"-repaired{repaired}"
        closed = "" if self.close in (None, CLOSE) else f"-closed{'-'.join(map(str, self.close))}"
        return name + closed

    def gates(self) -> GateConfig:
        """For every method the same shapes, free from layer to layer."""
        return GateConfig(
            target=self.kept,
            noise=0.0,
            width_multiple=self.width_multiple,
            equal_layers=False,
            seed=self.train.seed,
        )


def trained(cell: Cell, model, windows, log: Log) -> tuple[torch.nn.Module, dict]:
    """(the packed and merged model, what else there is to say of how it came about)."""
    train = cell.train
    with log.bar(cell.name, "step", train.steps) as tell:

        def on_step(tuning) -> None:
            tell(tuning.step, loss=round(tuning.losses[-1], 3))

        if cell.method == "dense":
            losses, merged = fine_tune(model, windows, train, None, on_step)
            report, settings = None, {}
        else:
            method = published(cell)
            settings, distilling = asdict(method), None
            if cell.method in OURS:  # which repairs on all batches that it is given
                train = replace(train, calibration_batches=train.repaired)
            if cell.method == "distilled":
                settings["distillation"] = asdict(DISTILLATION)
                distilling = DISTILLATION.start(model)
            # OneShot's own run: ContextPruning.run scores and splits texts besides.
            train_by = methods.OneShot.run if cell.method in ONE_SHOT else run_beside_lora
            run = train_by(method, model, windows, train, None, on_step)
            losses, merged, report = run.losses, run.model, run.report
            if distilling is not None:
                distilling.stop()
    return merged, {
        "losses": losses,
        "settings": settings,
        "kept_fraction": 1.0 if report is None else report.kept_fraction,
        "params": None if report is None else report.to_dict()["params"],
    }


def published(cell: Cell):
    """The method of a cell, with its published values but for what a short run needs."""
    if cell.method in OURS:
        return methods.CloseAndRepair(
            cell.gates(), cell.close, calibration_batches=cell.train.calibration_batches,
            autocast=cell.train.autocast,
        )  # fmt: skip
    if cell.method == "FineGates":
        return fine_gates(cell.kept, cell.train.steps, cell.train.seed, 0.5, trains="gates")
    if cell.method == "ATP":
        return methods.ATP(
            target=cell.kept, generator_rate=GENERATOR_RATE, seed=cell.train.seed,
            width_multiple=cell.width_multiple,
        )  # fmt: skip
    if cell.method == "ContextPruning":
        return methods.ContextPruning(gates=cell.gates(), rule="budget")
    return getattr(methods, cell.method)(gates=cell.gates())


def fine_gates(
    kept: float, steps: int, seed: int, freeze: float, warmup: float = 0.0, **fields
) -> methods.FineGates:
    """FineGates down to a kept fraction in few steps, at the rate that this takes."""
    return methods.FineGates(
        target_sparsity=1 - kept, budget=kept, freeze=freeze, warmup=warmup, seed=seed,
        learning_rate=TRAVEL / ((freeze - warmup) * steps), **fields,
    )  # fmt: skip


def figures(report: dict) -> dict:
    """kind -> name -> metrics of an evaluation report."""
    found: dict[str, dict] = {}
    for entry in report["entries"]:
        found.setdefault(entry["kind"], {})[Path(entry["name"]).name] = entry["metrics"]
    return found


def made(cell: Cell, options, folder: Path, log: Log) -> dict:
    """What is to be said of a cell's model, trained now or before, and then in folder."""
    said = folder / "made.json"
    if not settings_match(said, cell):
        model, tokenizer = load_model(options.model)
        model = model.to(torch_device(options.device))
        documents = [text for path in options.train for text in load_documents(path)]
        windows = to_windows(documents, tokenizer, cell.train.window).to(model.device)
        start = time.perf_counter()
        model, record = trained(cell, model, windows, log)
        record["train_seconds"] = round(time.perf_counter() - start, 1)
        save_pretrained(model, folder, tokenizer)
        write_json(said, {**plain(asdict(cell)), **record})
    return json.loads(said.read_text(encoding="utf-8"))


def scored(cell: Cell, options, folder: Path, log: Log) -> dict:
    """The figures of the model in folder, and its speed beside the model that it came from."""
    model, tokenizer = load_model(str(folder))
    model = model.to(torch_device(options.device))
    config = EvalConfig(
        texts=tuple(options.test), ood=tuple(options.ood), choices=tuple(options.choices),
        windows=options.windows, length=WINDOW, stride=STRIDE, questions=options.questions,
        latency=False,
    )  # fmt: skip
    report = evaluate(model, tokenizer, config, name=cell.name, log=log)
    speed = None
    if cell.method != "dense":
        dense, _ = load_model(options.model)
        speed = measure(model, dense=dense.to(model.device)).to_dict()
    return {
        "figures": figures(report),
        "inputs": {Path(entry["name"]).name: entry["inputs"] for entry in report["entries"]},
        "speed": speed,
    }


def settings_match(path: Path, cell: Cell) -> bool:
    """Whether path holds a record of this cell."""
    if not path.is_file():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    return all(record.get(name) == value for name, value in plain(asdict(cell)).items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", required=True, help="name for the results")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--choices", type=Path, nargs="*", default=[])
    parser.add_argument("--ood", type=Path, nargs="*", default=[])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--window", type=int, default=256, help="of training, in tokens")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--calibration-batches", type=int, default=CALIBRATION)
    parser.add_argument("--repair-batches", type=int, default=REPAIR)
    parser.add_argument("--close", type=float, nargs="+", default=CLOSE, help="of the steps")
    parser.add_argument("--width-multiple", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16, help="scored per text, of 512 tokens")
    parser.add_argument("--questions", type=int, default=60, help="of multiple choice, 0 for all")
    parser.add_argument("--train-only", action="store_true", help="score in a later call")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="for the models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    options = parser.parse_args(arguments)
    stamp = environment("cuda" if torch_device(options.device).type == "cuda" else "cpu")
    check_texts(options)
    log = Log()
    for cell in cells(options):
        path = options.out / f"{cell.name}.json"
        if settings_match(path, cell):
            continue
        folder = options.work / cell.name
        row = {"bench": "quality", **made(cell, options, folder, log)}
        if options.train_only:
            continue
        row |= scored(cell, options, folder, log)
        write_json(path, {**row, "command": command_line(), **stamp})
        print(cell.name, json.dumps(row["figures"]), flush=True)


def check_texts(options) -> None:
    """Raises what reading a text raises, and where one is both trained on and scored, before hours
    of training instead of behind them."""
    for name in ("test", "choices", "ood"):
        refuse_overlap(options.train, getattr(options, name), f"--{name}")
    for path in (*options.train, *options.test, *options.ood):
        load_documents(path)
    for path in options.choices:
        load_questions(path)


def refuse_overlap(train: list[Path], scored: list[Path], name: str) -> None:
    """ValueError if a file or folder to score is one to train on, or lies in one, or holds one."""
    for ours, theirs in itertools.product(scored, train):
        one, other = ours.resolve(), theirs.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise ValueError(f"{name} must not be trained on, got {ours} with --train {theirs}")


def cells(options) -> list[Cell]:
    """The dense model once per seed, then all methods at the first size, at the second, ..."""
    found = []
    model = Path(options.model).name
    for seed in options.seeds:
        train = TrainConfig(
            steps=options.steps, batch_size=options.batch_size, window=options.window,
            learning_rate=options.learning_rate, seed=seed, autocast="bfloat16",
            calibration_batches=options.calibration_batches,
            repair_batches=options.repair_batches,
        )  # fmt: skip
        for kept in options.kept:
            for method in options.methods:
                left = 1.0 if method == "dense" else kept
                shape = (options.domain, method, left, options.width_multiple)
                close = tuple(options.close) if method in OURS else None
                found.append(Cell(model, *shape, train, close))
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    main()
