"""What "fast" means: every speed goal of the project, as a row that run.py measures and judges."""

import dataclasses
import statistics


@dataclasses.dataclass(frozen=True)
class Goal:
    """One bound on one case.

    device: "cpu", "gpu" or "any". bench: "level", or the bench whose results decide ("fold_pack",
    "pack_tensors", "startup"). name: of the level, the op, or what is timed. case: fields of Case
    beside dtype and device; of another bench, those of its rows. against: the contender compared
    with; "" for shares of a ceiling. measure: "ratio" (its time / ours is at least the bound),
    "peak" (our peak memory / its is at most the bound), "read" (bytes moved per second over what a
    large read reaches, at least), or "seconds" (at most).
    """

    work: str
    device: str
    bench: str
    name: str
    case: dict
    against: str
    bound: float
    measure: str = "ratio"

    @property
    def at_most(self) -> bool:
        return self.measure in ("peak", "seconds")


def _mlp(kept: float, lora: int = 0) -> dict:
    return {"model": "llama-3-8b", "tokens": 8192, "kept": kept, "lora": lora}


_LAYER = {"model": "llama-3-8b", "tokens": 4096, "batch": 2, "kept": 0.6}
_DECODE = {"model": "llama-3-8b", "tokens": 256, "kept": 0.6}
_FINE = {"model": "roberta-base", "tokens": 128, "batch": 16, "kept": 1.0}
_CPU_MLP = {"model": "smollm2-135m", "tokens": 1024}
_MATRIX = {"along": "rows", "shape": [4096, 14336], "dtype": "bfloat16", "kept": 0.6}
_MATRICES = {"shape": "llama-3-8b", "dtype": "bfloat16", "kept": 0.6, "memory": "mapped"}
_FINE_CPU = {"model": "roberta-base", "tokens": 32, "batch": 2, "kept": 1.0}
_SMOLLM2 = {"model": "smollm2-135m", "tokens": 256, "kept": 0.6}

# In order of importance. 1 / 1.03: at most 1.03 times the time.
GOALS = (
    Goal("MLP step, 60 % open", "gpu", "level", "mlp", _mlp(0.6), "dense", 1.5),
    Goal("MLP step, 60 % open", "gpu", "level", "mlp", _mlp(0.6), "masked", 1.8),
    Goal("MLP step, 60 % open", "gpu", "level", "mlp", _mlp(0.6), "compiled", 1.6),
    Goal("MLP step, 60 % open", "gpu", "level", "mlp", _mlp(0.6), "oracle", 1.0),
    Goal("MLP step, 60 % open", "gpu", "level", "mlp", _mlp(0.6), "oracle, compiled", 0.9),
    Goal("MLP step, 100 % open", "gpu", "level", "mlp", _mlp(1.0), "dense", 1 / 1.03),
    Goal("MLP step, 60 % open, LoRA", "gpu", "level", "mlp", _mlp(0.6, 16), "dense", 1.7),
    Goal("decoder layer step, 60 %", "gpu", "level", "decoder_layer", _LAYER, "dense", 1.45),
    Goal("decoder layer, peak", "gpu", "level", "decoder_layer", _LAYER, "dense", 0.75, "peak"),
    Goal("decode, batch 1, 60 %", "gpu", "level", "decode", _DECODE, "dense", 1.55),
    Goal("decode, batch 1, 60 %", "gpu", "level", "decode", _DECODE, "", 0.85, "read"),
    Goal("FineGates step", "gpu", "level", "finegates_step", _FINE, "finegates", 2.0),
    Goal("fold_pack", "gpu", "fold_pack", "pack", _MATRIX, "copy", 0.85),
    Goal("MLP step, 60 % open", "cpu", "level", "mlp", {**_CPU_MLP, "kept": 0.6}, "dense", 1.45),
    Goal("MLP step, 60 % open", "cpu", "level", "mlp", {**_CPU_MLP, "kept": 0.6}, "masked", 1.45),
    Goal("MLP step, 100 % open", "cpu", "level", "mlp", {**_CPU_MLP, "kept": 1.0}, "dense",
         1 / 1.03),
    Goal("SmolLM2-135M - 40 %, prefill", "cpu", "level", "prefill", _SMOLLM2, "dense", 1.45),
    Goal("SmolLM2-135M - 40 %, decode", "cpu", "level", "decode", _SMOLLM2, "dense", 1.35),
    Goal("FineGates step", "cpu", "level", "finegates_step", _FINE_CPU, "finegates", 2.0),
    Goal("packing rows", "cpu", "pack_tensors", "pack", {**_MATRICES, "along": "rows"}, "copy",
         0.85),
    Goal("packing columns", "cpu", "pack_tensors", "pack", {**_MATRICES, "along": "columns"},
         "copy", 0.6),
    Goal("import GatedLinear, beyond torch", "any", "startup", "import GatedLinear", {}, "", 0.3,
         "seconds"),
    Goal("import kernels, beyond torch", "any", "startup", "import kernels", {}, "", 0.3,
         "seconds"),
    Goal("first call, warm cache", "gpu", "startup", "first call, warm", {}, "", 0.5, "seconds"),
)  # fmt: skip


def of_device(device: str) -> list[Goal]:
    """The goals that this kind of device decides."""
    kind = "gpu" if device.startswith("cuda") else "cpu"
    return [goal for goal in GOALS if goal.device in (kind, "any")]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a goal fared over the runs of the newest commit that measured it.

    reached: the median, low and high: of single runs. rows: contender -> row of the newest run.
    """

    reached: float
    low: float
    high: float
    passed: bool
    rows: dict[str, dict]


def judge(goal: Goal, results: list[dict]) -> Verdict | None:
    """The verdict of one device's results, oldest first; None if they do not say.

    Contenders are compared within a run only, and those before the newest commit's are history.
    """
    runs: dict[tuple, dict[str, dict]] = {}
    for row in results:
        if name := _contender(goal, row):
            runs.setdefault((row.get("commit"), row.get("date")), {})[name] = row
    rates = ceilings(results, _dtype(goal))
    found = [(run, _reached(goal, rows, rates)) for run, rows in runs.items()]
    found = [(run, reached) for run, reached in found if reached is not None]
    if not found:
        return None
    last = found[-1][0]
    values = [reached for (commit, _), reached in found if commit == last[0]]
    middle = statistics.median(values)
    passed = middle <= goal.bound if goal.at_most else middle >= goal.bound
    return Verdict(middle, min(values), max(values), passed, runs[last])


def ceilings(results: list[dict], dtype: str) -> dict | None:
    """What one device can do: the best of all runs, for each may have met a busy machine."""
    measured = [r for r in results if r["bench"] == "ceilings" and r["dtype"] == dtype]
    if not measured:
        return None
    return {key: max(row[key] for row in measured) for key in ("flops", "copy", "read", "bytes")}


def of_roofline(row: dict, results: list[dict]) -> float | None:
    """The share of its time that a row's FLOPs or bytes take at the best of the results of its
    device; None if the row was not timed, or does not count them."""
    rates = ceilings(results, row["dtype"])
    if rates is None or not {"ms", "flops"} <= set(row):
        return None
    return max(row[key] / rates[key] for key in ("flops", "bytes")) / row["ms"] * 1e3


def _reached(goal: Goal, rows: dict[str, dict], rates: dict | None) -> float | None:
    """What one run says of a goal."""
    if goal.measure == "seconds":
        return max(row["seconds"] for row in rows.values())
    ours, theirs = rows.get("ours"), rows.get(goal.against)
    if goal.measure == "read":
        read = ours and rates and ours["bytes"] / ours["ms"] * 1e3 / rates["read"]
        return read or None
    if ours is None or theirs is None:
        return None
    if goal.measure == "peak":
        known = ours["peak_bytes"] and theirs["peak_bytes"]
        return ours["peak_bytes"] / theirs["peak_bytes"] if known else None
    return theirs["ms"] / ours["ms"]


def _dtype(goal: Goal) -> str:
    return "bfloat16" if goal.device == "gpu" else "float32"


def _contender(goal: Goal, row: dict) -> str | None:
    """Whose time a row tells of a goal's case; None for rows of other cases, and untimed ones."""
    renamed = {{"kept": "open"}.get(key, key): value for key, value in goal.case.items()}
    if goal.bench == "level":
        wanted = {"level": goal.name, "batch": 1, "lora": 0, **renamed}
        wanted["dtype"] = _dtype(goal)
        name = row.get("contender") if "ms" in row else None
    elif goal.bench == "startup":
        wanted, name = {"what": goal.name}, row.get("what")
    else:
        wanted, name = goal.case, {goal.name: "ours"}.get(row.get("op"), row.get("op"))
    same = row["bench"] == goal.bench and all(row.get(k) == v for k, v in wanted.items())
    return name if same else None
