"""FineGates and the recipe on an encoder, beside full, LoRA and final-layers-only fine-tuning.

python benchmarks/quality_encoder.py --model FOLDER --task qnli --train qnli_dev_train.jsonl \\
    --test qnli_dev_test.jsonl

The .jsonl files hold one {"text", "text2" (optional), "label"} per line. A new classification head
and the pooler below it are trained with each method on the same batches, of examples of like
length. FineGates then packs, and its training step is set beside a masked one (_step_cost.py); the
recipe is LoRA, or full fine-tuning, that stops once, at --close, for heads and channels to close
and the rest to be repaired. Attention has no dropout, for torch's fused attention on a CPU has
none. One JSON file per run in --out; runs that stand there with the same settings are left out, so
a call that was cut off goes on when it is given once more.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _harness import command_line, environment
from _step_cost import step_cost
from quality import fine_gates, refuse_overlap, settings_match
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gatepack.config import GateConfig
from gatepack.data import batches, json_lines, read_text
from gatepack.files import plain, write_json
from gatepack.methods import CloseAndRepair
from gatepack.packing import pack
from gatepack.progress import Log
from gatepack.quality import evaluating
from gatepack.scoring import wilson_interval
from gatepack.timing import measure
from gatepack.training import TrainConfig, add_lora, tune_last_layers

METHODS = (
    "full", "lora", "last_layers", "fine_gates", "fine_gates_lora", "recipe", "recipe_full",
)  # fmt: skip
RATES = {
    "full": 2e-4,
    "lora": 1e-3,
    "last_layers": 5e-4,
    "fine_gates": 3e-3,
    "fine_gates_lora": 1e-3,
    "recipe": 1e-3,
    "recipe_full": 2e-4,
}
PRICED, REPAIRED = 16, 32  # batches
HEAD = {"classifier", "pooler"}  # what follows the encoder, and was not trained with it
HEAD_RATE = 1e-3  # at least
LAST = 2  # layers that "last_layers" trains
RANK = 16
TIMED = 5  # batches of a step's cost
RUN = 16  # batches whose examples are sorted by length


@dataclass(frozen=True)
class Cell:
    """One run: a method on a task, the fraction of the encoder's weights it keeps, and a seed.

    warmup, freeze: of the steps, between which gates close; the same for the recipe.
    """

    model: str
    task: str
    method: str
    kept: float
    seed: int
    epochs: float
    batch_size: int
    length: int
    rate: float
    warmup: float
    freeze: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-{self.kept}-{self.seed}"


@dataclass(frozen=True)
class Examples:
    """Token ids and masks of examples, padded per batch, and their labels."""

    encoded: dict
    labels: torch.Tensor
    tokenizer: object

    @classmethod
    def load(cls, path: Path, names: list[str], tokenizer, length: int) -> "Examples":
        records = [record for _, record in json_lines(path, read_text(path))]
        pairs = [record["text2"] for record in records] if "text2" in records[0] else None
        encoded = tokenizer([r["text"] for r in records], pairs, truncation=True, max_length=length)
        return cls(encoded, torch.tensor([names.index(r["label"]) for r in records]), tokenizer)

    def order(self, size: int, steps: int, seed: int) -> list[torch.Tensor]:
        """The examples of each step: those of RUN batches sorted by length, the batches shuffled.

        So a batch holds a little over half of the padding-or-token positions of one at random.
        """
        lengths = torch.tensor([len(ids) for ids in self.encoded["input_ids"]])
        generator = torch.Generator().manual_seed(seed)
        found = []
        for run in batches(self.labels, size, steps, seed).split(RUN):
            rows = run.flatten()
            run = rows[torch.argsort(lengths[rows], stable=True)].view(-1, size)
            found += run[torch.randperm(len(run), generator=generator)].unbind()
        return found

    def batch(self, rows) -> dict[str, torch.Tensor]:
        rows = [int(row) for row in rows]
        chosen = {name: [values[row] for row in rows] for name, values in self.encoded.items()}
        return dict(self.tokenizer.pad(chosen, return_tensors="pt"), labels=self.labels[rows])


def encoder(name: str, labels: int) -> torch.nn.Module:
    """A fresh classification head on the encoder."""
    return AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=labels, attention_probs_dropout_prob=0.0
    )


def prepared(cell: Cell, model, train: TrainConfig, examples: Examples):
    """(model with what the method trains left trainable, what steps beside its optimizer)."""
    if cell.method in ("lora", "fine_gates_lora", "recipe"):
        model = add_lora(model, train)
    elif cell.method == "last_layers":
        tune_last_layers(model, LAST)
    beside = None
    if cell.method.startswith("fine_gates"):
        method = fine_gates(cell.kept, train.steps, cell.seed, cell.freeze, cell.warmup)
        beside = method.start(model, train.steps)
    if cell.method.startswith("recipe"):
        gates = GateConfig(target=cell.kept, noise=0.0, width_multiple=32, equal_layers=False)
        method = CloseAndRepair(gates, close=cell.freeze, calibration_batches=PRICED)
        some = examples.order(cell.batch_size, REPAIRED, cell.seed + 1)
        beside = method.start(model, train.steps, [examples.batch(rows) for rows in some])
    for parameter in head_of(model):
        parameter.requires_grad_(True)
    return model, beside


def head_of(model) -> list[torch.nn.Parameter]:
    """The parameters of HEAD, which start from nothing whatever the method."""
    return [p for name, p in model.named_parameters() if HEAD & set(name.split("."))]


def trained(cell: Cell, model, examples: Examples, log: Log) -> tuple[torch.nn.Module, list[float]]:
    """The model, its gates closed to the budget, and its losses."""
    steps = round(cell.epochs * (len(examples.labels) // cell.batch_size))
    train = TrainConfig(
        steps=steps, warmup_steps=round(0.06 * steps), learning_rate=cell.rate,
        lora_rank=RANK, seed=cell.seed,
    )  # fmt: skip
    order = examples.order(cell.batch_size, steps, cell.seed)
    model, beside = prepared(cell, model, train, examples)
    weights = model.parameters() if beside is None else beside.weights()
    weights = [p for p in weights if p.requires_grad]
    head = {id(p) for p in head_of(model)}
    groups = [
        {"params": [p for p in weights if (id(p) in head) == inside]} for inside in (False, True)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
    losses = []
    model.train()
    with log.bar(cell.name, "step", steps) as tell:
        for rows in order:
            rate = train.learning_rate_at(len(losses))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.param_groups[-1]["lr"] = rate * max(1.0, HEAD_RATE / cell.rate)
            loss = model(**examples.batch(rows)).loss
            loss.backward()
            if beside is not None:
                beside.step()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            tell(len(losses), loss=round(losses[-1], 3))
    if beside is not None:
        beside.finish()
    return model, losses


@torch.no_grad()
def hits(model, examples: Examples, size: int = 32) -> int:
    """How many examples the model classifies as labelled."""
    found = 0
    with evaluating(model):
        for rows in torch.arange(len(examples.labels)).split(size):
            batch = examples.batch(rows)
            labels = batch.pop("labels")
            found += int((model(**batch).logits.argmax(-1) == labels).sum())
    return found


def run(cell: Cell, options, log: Log) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    names = sorted({r["label"] for _, r in json_lines(options.train, read_text(options.train))})
    train = Examples.load(options.train, names, tokenizer, cell.length)
    test = Examples.load(options.test, names, tokenizer, cell.length)
    torch.manual_seed(cell.seed)
    start = time.perf_counter()
    model, losses = trained(cell, encoder(options.model, len(names)), train, log)
    seconds = time.perf_counter() - start
    report, speed, step = None, None, None
    if cell.method.startswith("fine_gates"):
        examples = train.order(cell.batch_size, RUN, cell.seed)[:TIMED]
        step = step_cost(model, [train.batch(rows) for rows in examples])
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.eval()
    if cell.kept < 1:
        report = pack(model).to_dict()
        dense = encoder(options.model, len(names))
        speed = measure(model, dense=dense, prompt_tokens=cell.length, batch_size=4).to_dict()
    correct, count = hits(model, test), len(test.labels)
    return {
        "bench": "quality_encoder",
        **plain(asdict(cell)),
        "accuracy": correct / count,
        "interval": wilson_interval(correct, count),
        "tested": count,
        "removed": None if report is None else 1 - report["kept_fraction"],
        "speed": speed,
        "step": step,
        "losses": losses,
        "train_seconds": round(seconds, 1),
        "command": command_line(),
    }


def cells(options) -> list[Cell]:
    """All methods with the first seed, then with the second, ..."""
    found = []
    model = Path(options.model).name
    for seed in options.seeds:
        for method in options.methods:
            removes = method.startswith(("recipe", "fine_gates"))
            for kept in options.kept if removes else [1.0]:
                size = (options.epochs, options.batch_size, options.length)
                closing = (options.warmup, options.freeze) if kept < 1 else (0.0, 1.0)
                if method.startswith("recipe"):
                    closing = (options.close, options.close)
                settings = (*size, RATES[method], *closing)
                found.append(Cell(model, options.task, method, kept, seed, *settings))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub name of an encoder")
    parser.add_argument("--task", required=True, help="name for the results")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example, at most")
    parser.add_argument(
        "--warmup", type=float, default=0.4, help="part of the steps before gates close: if the "
        "task is not learned by then, it may never be",
    )  # fmt: skip
    parser.add_argument(
        "--freeze", type=float, default=0.8, help="part of the steps to closed gates"
    )
    parser.add_argument(
        "--close", type=float, default=0.4, help="part of the steps before the recipe closes"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    options = parser.parse_args(arguments)
    refuse_overlap([options.train], [options.test], "--test")
    stamp, log = environment("cpu"), Log()
    for cell in cells(options):
        path = options.out / f"{cell.name}.json"
        if not settings_match(path, cell):
            row = {**run(cell, options, log), **stamp}
            write_json(path, row)
            print(cell.name, json.dumps({key: row[key] for key in ("accuracy", "removed")}))


if __name__ == "__main__":
    main()
