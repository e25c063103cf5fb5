"""Stage 6, export: the model card that lies beside every export."""

import json
from collections.abc import Sequence
from pathlib import Path

from gatepack.exporters.source import Source
from gatepack.inspection import identify
from gatepack.layers import layers_of
from gatepack.masks import record_of

_TITLES = {
    "uniform": "Loads with plain transformers, and with every engine that takes its model_type.",
    "hf": "Loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or "
    "with `gatepack.from_pretrained(folder)`, which runs no code of the folder.",
    "gguf": "Loads with llama.cpp and what is built on it.",
    "decilm": "Loads with engines that have DeciLM (`nemotron-nas`), and with transformers and "
    "`trust_remote_code=True`.",
    "onnx": "Loads with onnxruntime: `input_ids`, `attention_mask` and each layer's "
    "`past_key_values` in, `logits` and each layer's `present` out.",
}


def write_card(source: Source, folder: Path, report: dict, base: str, data: str, speed) -> None:
    """README.md: what was removed, from what, on which data, parity and speed."""
    facts = identify(source.model)
    front = {"library_name": "gguf" if report["format"] == "gguf" else "transformers"}
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        front["base_model"] = base
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items())]
    lines += ["tags:", "- gatepack", "- pruned", "---", "", f"# {base or facts['class']}, packed"]
    lines += ["", _TITLES[report["format"]], "", "## What was removed", ""]
    lines += _removed(source, facts, base, data)
    lines += ["", "## Parity", "", *_parity(report["parity"])]
    lines += ["", "## Speed", "", *_speed(speed)]
    if report["notes"]:
        lines += ["", "## Not carried", "", *(f"- {note}" for note in report["notes"])]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _removed(source: Source, facts: dict, base: str, data: str) -> Sequence[str]:
    lines = [
        f"{1 - facts['kept_fraction']:.1%} of the weights of the blocks' linears; "
        f"{facts['parameters']:,} parameters stay.",
        "",
        f"- from: {base or 'not recorded'}",
        f"- pruned or trained on: {data or 'not recorded'}",
        "",
        "| layer | query heads | key/value heads | MLP channels |",
        "|---|---:|---:|---:|",
    ]
    dense = _dense_sizes(source)
    for index, sizes in enumerate(source.sizes):
        cells = (
            f"{kept} of {whole}"
            for kept, whole in zip(
                (sizes.queries, sizes.kv_heads, sizes.width), dense[index], strict=True
            )
        )
        lines.append(f"| {index} | {' | '.join(cells)} |")
    return lines


def _dense_sizes(source: Source) -> list[tuple[int, int, int]]:
    """(query heads, key/value heads, channels) of each layer before packing."""
    kept = record_of(source.config).get("kept", {})
    config, found = source.config, []
    for layer, sizes in zip(layers_of(source.model), source.sizes, strict=True):
        heads = kept.get(f"{layer.heads_name}:heads")
        channels = kept.get(f"{layer.channels_name}:channels")
        queries = heads["size"] if heads else sizes.queries
        whole = getattr(config, "num_key_value_heads", None) or queries
        found.append(
            (
                queries,
                whole if heads else sizes.kv_heads,
                channels["size"] if channels else sizes.width,
            )
        )
    return found


def _parity(parity: dict) -> Sequence[str]:
    count, length = parity["windows"]
    if "skipped" in parity:
        lines = [f"Not run: {parity['skipped']}."]
        if "perplexity" in parity:
            lines += [
                "",
                f"The weights were read back, and scored on {count} x {length} tokens:",
                "",
            ]
            lines += _perplexity(parity["perplexity"])
        return lines
    lines = [
        f"Loaded and run by {parity['consumer']}, against the packed model in torch, on {count} x "
        f"{length} tokens:",
        "",
    ]
    if "max_abs_difference" in parity:
        bound = f" (rounding bound {parity['bound']:.3g})" if "bound" in parity else ""
        weights = (
            " from the same weights in torch" if "stored" in parity.get("perplexity", ()) else ""
        )
        lines.append(
            f"- logits differ by at most {parity['max_abs_difference']:.3g}{weights}{bound}"
        )
    if "rounding" in parity:
        found, alone = (parity["rounding"][name] for name in ("found", "rounding"))
        lines.append(
            f"- half of the tokens' logits differ by no more than {found[0]:.3g}, nine in ten by "
            f"{found[1]:.3g}; rounding as this program does, torch moves its own by {alone[0]:.3g} "
            f"and {alone[1]:.3g}"
        )
    lines += _perplexity(parity.get("perplexity", {}))
    if "greedy" in parity:
        greedy = parity["greedy"]
        form = "- {same} of {prompts} greedy continuations of {tokens} tokens are the model's"
        if greedy.get("ties"):
            form += (
                "; {same_stored} are those of the weights as stored, and {ties} part from these "
                "where two tokens are closer than rounding"
            )
        lines.append(form.format(**greedy))
    if "tokenized" in parity:
        form = "- {same} of {texts} texts give the same tokens"
        lines.append(form.format(**parity["tokenized"]))
    return lines


def _perplexity(figures: dict[str, float]) -> Sequence[str]:
    labels = {
        "export": "perplexity",
        "model": "perplexity of the model",
        "stored": "perplexity of the weights as stored, in torch",
    }
    return [f"- {labels[name]} {figures[name]:.4f}" for name in labels if name in figures]


def _speed(speed) -> Sequence[str]:
    if speed is None:
        return ["Not measured."]
    header, *rows = speed.rows()
    table = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(row)} |" for row in table), "", f"{speed.conditions()}."]
