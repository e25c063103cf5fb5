"""What "fast" means: every speed goal of the project, as a row that run.py measures and judges."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Goal:
    """One bound on one case.

    device: "cpu" or "gpu". bench: "level", or the bench whose results decide ("fold_pack",
    "startup"). case: fields of Case beside dtype and device. against: the contender compared with;
    "" for shares of a ceiling. measure: "ratio" (its time / ours is at least the bound), "peak"
    (our peak memory / its is at most the bound), "read" (bytes moved per second over what a large
    read reaches, at least), or "seconds" (at most).
    """

    work: str
    device: str
    bench: str
    name: str
    case: dict
    against: str
    bound: float
    measure: str = "ratio"


def _mlp(kept: float, lora: int = 0) -> dict:
    return {"model": "llama-3-8b", "tokens": 8192, "kept": kept, "lora": lora}


_LAYER = {"model": "llama-3-8b", "tokens": 4096, "batch": 2, "kept": 0.6}
_DECODE = {"model": "llama-3-8b", "tokens": 256, "kept": 0.6}
_FINE = {"model": "roberta-base", "tokens": 128, "batch": 16, "kept": 1.0}
_CPU_MLP = {"model": "smollm2-135m", "tokens": 1024}
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
    Goal("fold_pack", "gpu", "fold_pack", "pack", {"kept": 0.6}, "copy", 0.85),
    Goal("MLP step, 60 % open", "cpu", "level", "mlp", {**_CPU_MLP, "kept": 0.6}, "dense", 1.45),
    Goal("MLP step, 60 % open", "cpu", "level", "mlp", {**_CPU_MLP, "kept": 0.6}, "masked", 1.45),
    Goal("MLP step, 100 % open", "cpu", "level", "mlp", {**_CPU_MLP, "kept": 1.0}, "dense",
         1 / 1.03),
    Goal("SmolLM2-135M - 40 %, prefill", "cpu", "level", "prefill", _SMOLLM2, "dense", 1.45),
    Goal("SmolLM2-135M - 40 %, decode", "cpu", "level", "decode", _SMOLLM2, "dense", 1.35),
    Goal("import beyond torch", "any", "startup", "import", {}, "", 0.3, "seconds"),
    Goal("first call, warm cache", "gpu", "startup", "first call, warm", {}, "", 0.5, "seconds"),
)  # fmt: skip


def of_device(device: str) -> list[Goal]:
    """The goals that this kind of device decides."""
    kind = "gpu" if device.startswith("cuda") else "cpu"
    return [goal for goal in GOALS if goal.device in (kind, "any")]


def share(goal: Goal, rows: list[dict], rates: dict | None = None) -> tuple[float, bool] | None:
    """(what was reached, whether that meets the bound); None if rows do not say.

    rows: those of the goal's case, one per contender.
    """
    timed = {row["contender"]: row for row in rows if "ms" in row}
    if goal.measure == "seconds":
        worst = max((row["seconds"] for row in rows), default=None)
        return None if worst is None else (worst, worst <= goal.bound)
    ours = timed.get("ours")
    if ours is None:
        return None
    if goal.measure == "read":
        if not rates:
            return None
        reached = ours["bytes"] / ours["ms"] * 1e3 / rates["read"]
        return reached, reached >= goal.bound
    theirs = timed.get(goal.against)
    if theirs is None:
        return None
    if goal.measure == "peak":
        if not ours["peak_bytes"] or not theirs["peak_bytes"]:
            return None
        reached = ours["peak_bytes"] / theirs["peak_bytes"]
        return reached, reached <= goal.bound
    reached = theirs["ms"] / ours["ms"]
    return reached, reached >= goal.bound


def rows_of(goal: Goal, results: list[dict]) -> list[dict]:
    """The newest row per contender of a goal's case."""
    wanted = {
        {"kept": "open"}.get(key, key): value for key, value in goal.case.items()
    } | {"bench": goal.bench}  # fmt: skip
    if goal.bench == "level":
        wanted |= {"level": goal.name, "batch": goal.case.get("batch", 1)}
        wanted |= {"lora": goal.case.get("lora", 0)}
    elif goal.bench == "startup":
        wanted["what"] = goal.name
    else:
        return _fold_pack_rows(results)
    found = {}
    for row in results:
        if all(row.get(key) == value for key, value in wanted.items()):
            found[row.get("contender") or row.get("op") or row["what"]] = row
    return list(found.values())


def _fold_pack_rows(results: list[dict]) -> list[dict]:
    """Of bench_fold_pack.py: the widest matrix in bf16, rows; ours is "pack"."""
    own = [r for r in results if r["bench"] == "fold_pack" and r["dtype"] == "bfloat16"]
    own = [r for r in own if r["along"] == "rows" and r["shape"] == [4096, 14336]]
    names = {"pack": "ours", "copy": "copy"}
    found = {r["op"]: {**r, "contender": names[r["op"]]} for r in own if r["op"] in names}
    return list(found.values())
