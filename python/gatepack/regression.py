"""Stage 7, command line: an evaluation report against an earlier one, value by value."""

from dataclasses import dataclass
from pathlib import Path

from gatepack.files import parse_json

FORMAT_VERSION = 1
_FIELDS = {"kind": str, "name": str, "inputs": dict, "metrics": dict}
_FORM_NAMES = {str: "a string", dict: "an object"}


@dataclass(frozen=True)
class Bounds:
    """How much worse a value may be than in the earlier report.

    *_ratio: new / old of perplexity, of bits per byte, and of milliseconds per token. *_drop and
    *_rise: old - new of an accuracy, new - old of a calibration error, both as fractions.
    """

    perplexity_ratio: float = 1.02
    bits_per_byte_ratio: float = 1.01
    accuracy_drop: float = 0.01
    calibration_rise: float = 0.05
    latency_ratio: float = 1.05

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 1.0 if name.endswith("_ratio") else 0.0
            if not value >= least:
                raise ValueError(f"{name} must be >= {least:g}, got {value}")


# Metric of a report's entry -> (the bound in charge, how the two values are set against each other)
_RULES = {
    "perplexity": ("perplexity_ratio", "ratio"),
    "bits_per_byte": ("bits_per_byte_ratio", "ratio"),
    "accuracy": ("accuracy_drop", "drop"),
    "accuracy_per_byte": ("accuracy_drop", "drop"),
    "calibration_error": ("calibration_rise", "rise"),
    "prefill_ms_per_token": ("latency_ratio", "ratio"),
    "decode_ms_per_token": ("latency_ratio", "ratio"),
}
_ROUNDING = 1e-12  # 0.5 - 0.49 is a little more than 0.01
_FORMS = {
    "ratio": ("{:.4f}x", lambda old, new: new / old if old else float("nan")),
    "drop": ("a drop of {:.4f}", lambda old, new: old - new),
    "rise": ("a rise of {:.4f}", lambda old, new: new - old),
}


@dataclass(frozen=True)
class Comparison:
    """violations and skipped: one sentence each. compared: values that were set against each other.

    skipped says what could not be compared and why.
    """

    violations: tuple[str, ...]
    skipped: tuple[str, ...]
    compared: int


def load_report(path: Path) -> dict:
    """A report of gatepack eval; ValueError if the file is something else."""
    try:
        report = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a report: {error}") from error
    version = report.get("format") if isinstance(report, dict) else None
    if version != FORMAT_VERSION or not isinstance(report.get("entries"), list):
        raise ValueError(
            f"{path} is not a report of gatepack eval in format {FORMAT_VERSION} "
            f"(it says {version!r})"
        )
    for entry in report["entries"]:
        found = entry if isinstance(entry, dict) else {}
        missing = [field for field in _FIELDS if field not in found]
        if missing:
            raise ValueError(f"{path} has an entry without {', '.join(missing)}")
        for field, form in _FIELDS.items():
            if not isinstance(found[field], form):
                raise ValueError(
                    f"{path}: {field} of an entry must be {_FORM_NAMES[form]}, got {found[field]!r}"
                )
        for metric, value in found["metrics"].items():
            if not isinstance(value, int | float):
                raise ValueError(
                    f"{path}: {metric} of {_label(found)} must be a number, got {value!r}"
                )
        directions = found.get("higher_is_better", {})
        if not isinstance(directions, dict):
            raise ValueError(
                f"{path}: higher_is_better of {_label(found)} must be an object, got {directions!r}"
            )
    return report


def compare(new: dict, old: dict, bounds: Bounds) -> Comparison:
    """Every value of old against the one of new with the same kind, name and inputs.

    Values are compared only where both reports scored the same thing: equal checksums, window
    lengths, devices, and for perplexity equally many tokens, since another tokenizer changes what
    it counts. What old has and new lacks is a violation, and so is having nothing to compare.
    """
    found = {_key(entry): entry for entry in new["entries"]}
    violations, skipped, compared = [], [], 0
    for before in old["entries"]:
        label = _label(before)
        after = found.get(_key(before))
        if after is None:
            violations.append(f"{label}: missing from the new report")
            continue
        differs = _differing(before["inputs"], after["inputs"])
        if differs:
            skipped.append(f"{label}: not compared, {differs}")
            continue
        for metric, was in before["metrics"].items():
            if metric not in after["metrics"]:
                violations.append(f"{label}: {metric} is missing from the new report")
            elif metric == "perplexity" and before.get("tokens") != after.get("tokens"):
                skipped.append(
                    f"{label}: {metric} not compared, {after.get('tokens')} tokens against "
                    f"{before.get('tokens')}"
                )
            elif rule := _rule(metric, before):
                compared += 1
                now = after["metrics"][metric]
                violations += _violation(f"{label}: {metric}", was, now, rule, bounds)
    if not compared:
        violations.append("no value could be compared")
    return Comparison(tuple(violations), tuple(skipped), compared)


def _rule(metric: str, entry: dict) -> tuple[str, str] | None:
    """A task's metrics carry their direction; what has none (a count) is not compared."""
    if entry["kind"] != "task":
        return _RULES.get(metric)
    higher = entry.get("higher_is_better", {}).get(metric)
    if higher is None:
        return None
    return ("accuracy_drop", "drop") if higher else ("perplexity_ratio", "ratio")


def _violation(
    label: str, was: float, now: float, rule: tuple[str, str], bounds: Bounds
) -> list[str]:
    bound, form = getattr(bounds, rule[0]), rule[1]
    text, distance = _FORMS[form][0], _FORMS[form][1](was, now)
    # Written so that a NaN on either side is a violation; equal values never are one.
    if now == was or distance <= bound + _ROUNDING:
        return []
    return [f"{label} is {now:.6g}, was {was:.6g}: {text.format(distance)}, allowed {bound:g}"]


def _key(entry: dict) -> tuple[str, str]:
    return entry["kind"], entry["name"]


def _label(entry: dict) -> str:
    return f"{entry['kind']} {entry['name']}"


def _differing(old: dict, new: dict) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(
        f"{name} is {_short(new.get(name))}, was {_short(old.get(name))}" for name in names
    )


def _short(value) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else str(value)
