"""Every speed goal and every curve, on whatever device there is: `make bench`.

    python benchmarks/run.py [--device auto] [--out DIR] [--budget MINUTES] [--parts goals ...]
        [--dtype bfloat16] [--again] [--table]

Parts, in this order: goals (the cases that decide them, results checked first, contenders timed in
turn), packing (fold_pack and pack_tensors), startup, levels (each level once), ops, and curves (as
gates close, as T and the batch grow). Each case is written to DIR as it ends; what does not fit
into the budget is named and left out, and the same command goes on where the last one stopped, on
the same commit and device. --again measures all anew; --table prints what DIR holds. An error ends
its own case; after one that takes the GPU from the process, a new process goes on (--tried).

The table: goal, what was reached, ours, every contender, the share of the roofline, and pass or
short; for goals of a GPU that is not at hand, what benchmarks/_roofline.py predicts; and where a
curve rises or is above dense (benchmarks/_curves.py). Exit code 1 if a contender is wrong or fails.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import _curves
import _roofline
import torch
from _harness import append, ceilings, environment
from _measure import line, measure, run_level
from _suite import Case, modules
from goals import GOALS, judge, of_device, of_roofline

HERE = Path(__file__).resolve().parent
PARTS = ("goals", "packing", "startup", "levels", "ops", "curves")
FACTS = HERE / "results" / "aot.json"
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# A compile takes up to a minute of two busy cores.
COMPILED_ON_CPU = (("goals", "mlp"), ("levels", "decoder_layer"))
FEW = (1.0, 0.8, 0.6, 0.4)


def cases_of(part: str, device: str) -> list[tuple[str, str, dict]]:
    """(kind, name, fields of Case) of a part, most important first, without repetition."""
    on_gpu = device.startswith("cuda")
    main = "llama-3-8b" if on_gpu else "smollm2-135m"
    long, batch = (8192, 4) if on_gpu else (1024, 1)
    prompt = {"model": main, "tokens": 256, "kept": 0.6}
    if part == "goals":
        found = [("level", g.name, g.case) for g in of_device(device) if g.bench == "level"]
    elif part == "levels":
        wide = {"model": main, "tokens": 2048 if on_gpu else 256, "kept": 0.6}
        found = [
            ("level", "train_step", {"model": "smollm2-135m", "tokens": 256, "kept": 0.6}),
            ("level", "train_step", {**wide, "lora": 16}),
            ("level", "decoder_layer", {"model": main, "tokens": long // batch, "batch": batch,
                                        "kept": 0.6}),
            ("level", "attention", {"model": main, "tokens": long // batch, "batch": batch,
                                    "kept": 0.6}),
            ("level", "mlp", {"model": main, "tokens": long, "kept": 0.6, "lora": 16}),
            ("level", "finegates_step", {"model": "roberta-base", "tokens": 128 if on_gpu else 32,
                                         "batch": 16 if on_gpu else 2, "kept": 1.0}),
            ("level", "prefill", prompt),
            ("level", "decode", prompt),
        ]  # fmt: skip
    elif part == "ops":
        found = [
            ("op", op, {"model": main, "tokens": tokens, "kept": 0.6})
            for tokens in ((8192, 16) if on_gpu else (256,))
            for op in modules()
        ]
        found.sort(key=lambda entry: entry[1] != "sample_gates")
    else:
        found = _curve_cases(main, long, batch, on_gpu)
    unique = {json.dumps(entry, sort_keys=True): entry for entry in found}
    return list(unique.values())


def _curve_cases(main: str, long: int, batch: int, on_gpu: bool) -> list[tuple[str, str, dict]]:
    """Of "curves": closing gates at a few shares first, then growing sizes, then all shares."""
    mlp, layer = {"model": main, "tokens": long}, {"model": main, "tokens": long // batch}
    layer["batch"] = batch
    # On a GPU one sequence of so small a model would show the cost of launches alone.
    step, steps = {"model": "smollm2-135m", "tokens": 256}, (4, 16) if on_gpu else (2, 4)
    prompt = {"model": main, "tokens": 256}
    closing = [
        ("mlp", mlp), ("train_step", {**step, "batch": steps[-1] if on_gpu else 1}),
        ("decoder_layer", layer), ("decode", prompt), ("prefill", prompt), ("attention", layer),
    ]  # fmt: skip
    found = [(name, {**fields, "kept": s}) for name, fields in closing for s in FEW]
    found += [
        ("mlp", {"model": main, "tokens": tokens, "kept": 0.6})
        for tokens in (1, 4, 16, 64, 256, long // 2, 2 * long)
    ]
    found += [("train_step", {**step, "tokens": t, "kept": 0.6}) for t in (1, 4, 16, 64, 256)]
    short = step if on_gpu else {**step, "tokens": 64}
    found += [("train_step", {**short, "batch": b, "kept": 0.6}) for b in steps]
    found += [
        (name, {**prompt, "batch": b, "kept": 0.6})
        for name in ("decode", "prefill")
        for b in (2, 4, 16)[: 3 if on_gpu else 2]
    ]
    found += [
        (name, {**fields, "kept": s})
        for name, fields in (("mlp", mlp), ("decode", prompt), ("prefill", prompt))
        for s in SHARES
    ]
    found += [
        ("mlp", {"model": main, "tokens": tokens, "kept": s})
        for tokens in (16, 64, 256)
        for s in (1.0, 0.8, 0.4)
    ]
    found += [
        (name, {"model": main, "tokens": tokens, "kept": 0.6})
        for name in ("attention", "decoder_layer")
        for tokens in (16, 64, long // batch)
    ]
    return [("level", name, {"batch": 1, **fields}) for name, fields in found]


class DeviceLost(Exception):
    """An error on a GPU that ends all use of it in this process."""


class Bench:
    """One run: where results go, what is there already, and how much time is left."""

    def __init__(self, options):
        self.device = options.device
        self.dtype = getattr(torch, options.dtype or ("bfloat16" if self.on_gpu else "float32"))
        self.out = options.out
        self.stamp = environment(self.device)
        self.deadline = time.monotonic() + 60 * options.budget
        self.again = options.again
        self.before, self.tried = frozenset(options.tried), list(options.tried)
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.rates = self._ceilings()

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def results(self) -> list[dict]:
        return read_results(self.out)

    def write(self, file: str, rows: list[dict]) -> None:
        append(self.out / file, [{**row, **self.stamp} for row in rows])

    def _ceilings(self) -> dict:
        rates = ceilings(self.device, self.dtype)
        row = {"bench": "ceilings", "dtype": self.dtype_name, **rates}
        self.write("ceilings.jsonl", [row])
        return rates

    def known(self, kind: str, name: str, case: Case) -> bool:
        """Whether this commit, as it is, has measured the case on this device."""
        wanted = {
            kind: name, "bench": kind, "model": case.model, "tokens": case.tokens,
            "batch": case.batch, "lora": case.lora, "open": case.kept, "dtype": self.dtype_name,
            **self.identity,
        }  # fmt: skip
        return not self.again and self._holds(wanted)

    @property
    def identity(self) -> dict:
        """Of what was measured on what."""
        return {key: self.stamp[key] for key in ("commit", "dirty", "device", "torch")}

    def _holds(self, wanted: dict) -> bool:
        """Whether the results have such a row; local changes are never the same twice."""
        return not self.stamp["dirty"] and any(
            all(row.get(key) == value for key, value in wanted.items()) for row in self.results()
        )

    def case(self, part: str, kind: str, name: str, fields: dict) -> None:
        case = Case(dtype=self.dtype, device=self.device, **fields)
        label = f"{name} {json.dumps(fields)}"
        if label in self.before or self.known(kind, name, case):
            return
        if self.left < 20:
            self.left_out.append(label)
            return
        self.tried.append(label)
        torch.manual_seed(0)
        seconds = min(12.0 if part == "goals" else 5.0, self.left / 4)
        compiled = self.on_gpu or (part, name) in COMPILED_ON_CPU
        try:
            if kind == "level":
                module = modules([name], "levels")[name]
                rows = run_level(name, module, case, self.rates, seconds, compiled=compiled)
            else:
                work = modules([name])[name].work(case)
                if work is None:
                    return
                rows = measure("op", name, case, work, self.rates, seconds, compiled=self.on_gpu)
        except (SystemExit, Exception) as error:  # one case shall not end the others
            self.failed.append(f"{label}: {str(error).splitlines()[0] if str(error) else error!r}")
            print(f"FAILED {self.failed[-1]}", flush=True)
            if not isinstance(error, SystemExit):
                traceback.print_exception(error)
            return
        finally:
            self._free()
        self.write("ops.jsonl" if kind == "op" else "levels.jsonl", rows)
        print(line(rows), flush=True)

    def _free(self) -> None:
        """Gives back a GPU's memory; DeviceLost where a kernel left it unusable."""
        if not self.on_gpu:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost from error

    def script(self, name: str, file: str, *arguments: str) -> None:
        """Another bench of this folder, which writes its own lines."""
        finished = {"bench": "finished", "script": name, **self.identity}
        if not self.again and self._holds(finished):
            return
        if self.left < 40:
            self.left_out.append(name)
            return
        command = [sys.executable, HERE / name, *arguments, "--json", self.out / file]
        try:
            subprocess.run(command, check=True, timeout=self.left, stdout=subprocess.DEVNULL)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            self.failed.append(f"{name}: {error}")
            print(f"FAILED {self.failed[-1]}", flush=True)
            return
        self.write("finished.jsonl", [{"bench": "finished", "script": name}])

    def part(self, part: str) -> None:
        if part == "packing":
            device = ("--device", self.device)
            self.script("bench_fold_pack.py", "fold_pack.jsonl", *device, "--seconds", "1")
            self.script("bench_pack_tensors.py", "pack_tensors.jsonl", *device, "--seconds", "1")
        elif part == "startup":
            self.script("bench_startup.py", "startup.jsonl", "--device", self.device)
        else:
            for kind, name, fields in cases_of(part, self.device):
                self.case(part, kind, name, fields)


def read_results(folder: Path) -> list[dict]:
    """Every line in a folder of results, oldest first."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        rows += [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row.get("date", ""))


def table(results: list[dict], device: str, facts: list[dict]) -> str:
    """Every goal, those of this device as measured, those of a GPU as predicted, too."""
    here = set(map(id, of_device(device)))
    lines = [("goal", "against", "bound", "reached", "ours", "theirs", "of roofline", "")]
    lines[0] += tuple(f"{chip}, predicted" for chip in _roofline.CHIPS)
    for goal in GOALS:
        found = judge(goal, results) if id(goal) in here else None
        verdict = "not measured" if found is None else ("pass" if found.passed else "short")
        rows = {} if found is None else found.rows
        ours, theirs = rows.get("ours"), rows.get(goal.against)
        share = of_roofline(ours, results) if ours else None
        sign = "<=" if goal.at_most else ">="
        unit = {"ratio": "x", "peak": "x peak", "read": " of read", "seconds": " s"}[goal.measure]
        guesses = [
            _roofline.predicted(goal, chip, facts) if goal.device == "gpu" else None
            for chip in _roofline.CHIPS.values()
        ]
        lines.append(
            (
                f"{goal.device}: {goal.work}",
                goal.against,
                f"{sign} {goal.bound:.2f}{unit}",
                "" if found is None else f"{found.reached:.2f}{unit}",
                "" if ours is None else f"{ours['ms']:.2f} ms",
                "" if theirs is None else f"{theirs['ms']:.2f} ms",
                "" if share is None else f"{share:.0%}",
                verdict,
                *("" if guess is None else f"{guess:.2f}{unit}" for guess in guesses),
            )
        )
    found = _curves.curves(results)
    curves = [_aligned([_curves.HEADER, *(curve.cells() for curve in found)]), ""] if found else []
    return "\n".join([_aligned(lines), "", *curves, _contenders(results)])


def _contenders(results: list[dict]) -> str:
    """Every case of every level: ms, and peak MB where it was taken, of each contender."""
    newest: dict[tuple, dict[str, dict]] = {}
    for row in results:
        if row["bench"] == "level":
            key = tuple(row[k] for k in ("level", "model", "batch", "tokens", "lora", "open"))
            newest.setdefault(key, {})[row["contender"]] = row
    names = list(dict.fromkeys(name for rows in newest.values() for name in rows))
    lines = [("level", "model", "B x T", "LoRA", "open", *(f"{n}: ms (MB)" for n in names))]
    for (level, model, batch, tokens, lora, kept), rows in sorted(newest.items()):
        cells = []
        for name in names:
            row = rows.get(name, {})
            peak = row.get("peak_bytes")
            text = f"{row['ms']:.2f}" if "ms" in row else "skipped" if "skipped" in row else ""
            cells.append(f"{text} ({peak / 1e6:.0f})" if peak is not None else text)
        setting = (level, model, f"{batch} x {tokens}", str(lora or ""), f"{kept:.0%}")
        lines.append((*setting, *cells))
    reasons = {(r["contender"], r["skipped"]) for rows in newest.values() for r in rows.values()
               if "skipped" in r}  # fmt: skip
    return "\n".join([_aligned(lines), *(f"skipped: {n}: {why}" for n, why in sorted(reasons))])


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    )


def default_out(device: str) -> Path:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return HERE / "results" / (slug or f"{platform.machine()}-cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where present")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--budget", type=float, default=12.0, help="minutes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--tried", nargs="*", default=[], help="cases to leave out, as printed")
    parser.add_argument("--table", action="store_true", help="print what DIR holds and stop")
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out = options.out or default_out(options.device)
    facts = _roofline.read_facts(FACTS)
    if options.table:
        print(table(read_results(options.out), options.device, facts))
        return
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    bench = Bench(options)
    stamp, rates = bench.stamp, bench.rates
    print(
        f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}, commit "
        f"{stamp['commit']}{' with local changes' if stamp['dirty'] else ''}; matmul "
        f"{rates['flops'] / 1e12:.3f} TFLOP/s, copy {rates['copy'] / 1e9:.1f}, read "
        f"{rates['read'] / 1e9:.1f} GB/s; ms per step",
        flush=True,
    )
    try:
        for part in options.parts:
            bench.part(part)
    except KeyboardInterrupt:
        bench.failed.append("interrupted")
    except DeviceLost:
        print("the GPU is lost to this process, the other cases follow in a new one", flush=True)
        rest = ["--budget", str(bench.left / 60), "--tried", *bench.tried]
        os.execv(sys.executable, [sys.executable, *sys.argv, *rest])
    print(table(bench.results(), options.device, facts))
    for text in bench.left_out:
        print(f"LEFT OUT, no time: {text}")
    for text in bench.failed:
        print(f"FAILED {text}")
    sys.exit(bool(bench.failed or options.tried))


if __name__ == "__main__":
    main()
