"""The quality page of the documentation, from benchmarks/results/quality (docs/hooks.py)."""

import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as the page's hook loads it by path

from _results import RESULTS, conditions, spread, table

LANGUAGE_METHODS = {
    "dense": "LoRA, nothing removed",
    "recipe": "gatepack's recipe",
    "distilled": "gatepack's recipe, distilled",
    "Magnitude": "magnitude",
    "WandaSP": "Wanda-sp",
    "FLAP": "FLAP",
    "Taylor": "Taylor (LLM-Pruner)",
    "ContextPruning": "ContextPruning",
    "FineGates": "FineGates",
    "ATP": "ATP",
}
ENCODER_METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "last_layers": "last 2 layers",
    "fine_gates": "FineGates",
    "fine_gates_lora": "FineGates, LoRA inside",
}


ENCODER_HEADER = (
    "method", "removed", "accuracy", "inference, x", "step, x", "step, frozen, x", "step, memory",
)  # fmt: skip


def rows_of(bench: str) -> list[dict]:
    files = sorted((RESULTS / "quality").glob("*.json"))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [row for row in rows if row["bench"] == bench]


def language_section(domain: str, rows: list[dict]) -> str:
    """A table: each method at each size, beside the dense model with the same fine-tuning."""
    dense = [row for row in rows if row["method"] == "dense"]
    lines = []
    for kept in sorted({row["kept"] for row in rows}, reverse=True):
        for method, title in LANGUAGE_METHODS.items():
            runs = [row for row in rows if (row["method"], row["kept"]) == (method, kept)]
            for read in sorted({_tokens_read(row) for row in runs}):
                same = [row for row in runs if _tokens_read(row) == read]
                lines.append([title, *map("{:,}".format, read), *language_cells(same, dense)])
    header = ["method", "scored on", "repaired on", "removed", "perplexity", "of dense"]
    header += [*_choice_names(rows), "perplexity elsewhere", "prefill, x", "decode, x", "seeds"]
    train = rows[0]["train"]
    tokens = _tokens(train, "steps")
    return "\n\n".join(
        [
            f"## {Path(rows[0]['model']).name}, {domain}",
            f"{tokens:,} tokens of training for every row, in {train['steps']} steps; LoRA of rank "
            f"{train['lora_rank']}. Scored on: tokens by which units are scored before training. "
            "Repaired on: those of which the recipe's repair learns what the rest must give. "
            "Removed: of the blocks' weights, physically, by the same packer. Of dense: the "
            "perplexity of the first row over this one, that is how much is recovered. Multiple "
            "choice: accuracy on the first questions of the file named, a few dozen, so that "
            "differences of some points say nothing. Methods that train gates were "
            "published with thousands of steps; here they get as many as the others. "
            "Speed beside the model before pruning, interleaved in one run, batch 1.",
            table(header, lines),
            conditions(rows[-1]) + ".",
        ]
    )


def _tokens(train: dict, batches: str) -> int:
    return train[batches] * train["batch_size"] * train["window"]


def _tokens_read(row: dict) -> tuple[int, int]:
    """(by which units are scored, by which the rest is repaired), 0 where a method does not."""
    if row["method"] in ("dense", "Magnitude", "FineGates", "ATP"):
        return 0, 0
    scored = _tokens(row["train"], "calibration_batches")
    if row["method"] not in ("recipe", "distilled"):
        return scored, 0
    # calibration_batches said both before there was repair_batches.
    both = "repair_batches" not in row["train"]
    return scored, scored if both else _tokens(row["train"], "repair_batches")


def language_cells(runs: list[dict], dense: list[dict]) -> list[str]:
    def perplexities(rows, kind):
        return [next(iter(row["figures"][kind].values()))["perplexity"] for row in rows]

    best = mean(perplexities(dense, "text")) if dense else None
    removed = [1 - row["kept_fraction"] for row in runs]
    ratio = "" if best is None else f"{best / mean(perplexities(runs, 'text')):.1%}"
    cells = [
        spread(removed, "{:.1%}", mean) if max(removed) else "0 %",
        spread(perplexities(runs, "text"), "{:.2f}", mean),
        ratio,
    ]
    for name in _choice_names(runs):
        found = [row["figures"]["choices"][name] for row in runs]
        cells.append(spread([each["accuracy"] for each in found], "{:.1%}", mean))
    cells.append(spread(perplexities(runs, "ood"), "{:.2f}", mean))
    for phase in ("prefill", "decode"):
        ratios = [row["speed"]["ratios"][phase] for row in runs if row["speed"]]
        cells.append(spread(ratios, "{:.2f}", mean) if ratios else "1")
    return [*cells, str(len(runs))]


def _choice_names(rows: list[dict]) -> list[str]:
    return sorted({name for row in rows for name in row["figures"].get("choices", {})})


def encoder_section(task: str, rows: list[dict]) -> str:
    lines = []
    for kept in sorted({row["kept"] for row in rows}, reverse=True):
        for method, title in ENCODER_METHODS.items():
            runs = [row for row in rows if (row["method"], row["kept"]) == (method, kept)]
            if not runs:
                continue
            removed = [row["removed"] for row in runs if row["removed"] is not None]
            ratios = [row["speed"]["ratios"]["prefill"] for row in runs if row["speed"]]
            lines.append(
                [
                    title,
                    spread(removed, "{:.1%}", mean) if removed else "0 %",
                    spread([row["accuracy"] for row in runs], "{:.1%}", mean),
                    spread(ratios, "{:.2f}", mean) if ratios else "1",
                    *_step_cells(runs),
                    str(len(runs)),
                ]
            )
    first = rows[0]
    return "\n\n".join(
        [
            f"## {Path(first['model']).name}, {task}",
            f"A new classification head, with the pooler: {first['epochs']:g} epochs, "
            f"{first['batch_size']} examples a step, at most {first['length']} tokens each; "
            f"accuracy on {first['tested']:,} held-out examples, mean (lowest-highest) over seeds. "
            f"{_closing(rows)}"
            "Speed is the forward of 4 sequences beside the dense model, in one run. Step: a "
            "training step of the gated model once it has reached its size, beside the same gates "
            "multiplied in at full width, on the same batches in turn: how much faster while the "
            "gates still train and after they are frozen, and the peak memory of the former as a "
            "part of the masked one's.",
            table([*ENCODER_HEADER, "seeds"], lines),
            conditions(rows[-1]) + ".",
        ]
    )


def _closing(rows: list[dict]) -> str:
    """When gates closed, where all rows say so."""
    gated = [row for row in rows if row["method"].startswith("fine_gates")]
    if not all("warmup" in row for row in gated):
        return ""
    found = {(row["warmup"], row["freeze"]) for row in gated}
    spans = [f"{warmup:.0%} and {freeze:.0%}" for warmup, freeze in sorted(found)]
    return f"Gates close between {' or '.join(spans)} of the steps. " if spans else ""


def _step_cells(runs: list[dict]) -> list[str]:
    """Of the rows that hold the cost of a step (_step_cost.py), else of none."""
    steps = [row["step"] for row in runs if row.get("step")]
    if not steps:
        return ["", "", ""]
    memory = [step["trained"]["ours_bytes"] / step["trained"]["masked_bytes"] for step in steps]
    return [
        *(
            spread([step[phase]["ratio"] for step in steps], "{:.2f}", mean)
            for phase in ("trained", "frozen")
        ),
        spread(memory, "{:.0%}", mean),
    ]


def quality_page() -> str:
    """All of it, as Markdown."""
    parts = [
        "# Quality",
        "What is left of a model's quality at a size, against other methods with the same text, "
        "tokens and packer. Made from `benchmarks/results/quality`; the command that wrote each "
        "file stands in it (`benchmarks/quality.py`, `benchmarks/quality_encoder.py`).",
    ]
    for bench, key, section in (
        ("quality", "domain", language_section),
        ("quality_encoder", "task", encoder_section),
    ):
        rows = rows_of(bench)
        for name in sorted({row[key] for row in rows}):
            parts.append(section(name, [row for row in rows if row[key] == name]))
    return "\n\n".join(parts) + "\n"
