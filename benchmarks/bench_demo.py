"""The demo for several seeds and targets: quality, size, speed and parity, one line a run.

python benchmarks/bench_demo.py --targets 0.8 0.7 --seeds 0 1 2 [--json results.jsonl]

Base and LoRA without gates are measured once per seed and shared between targets. A run that was
cut off goes on when the same command is given again.
"""

import argparse
import time
from pathlib import Path

from _harness import append, environment

from gatepack.demo import DemoConfig, run
from gatepack.progress import Log
from gatepack.training import TrainConfig


def row_of(report: dict, seconds: float) -> dict:
    """The figures of one report; the error is the largest logit difference of packed and gated."""
    return {
        "bench": "demo",
        "model": report["model"],
        "target": report["target"],
        "kept": report["pack"]["kept_fraction"],
        "seed": report["settings"]["train"]["seed"],
        "train": report["settings"]["train"],
        "close": report["settings"]["close"],
        "perplexity": report["perplexity"],
        "params": report["pack"]["params"],
        "bytes_on_disk": report["bytes_on_disk"],
        "speed": report["speed"],
        "error": report["parity"]["max_abs_difference"],
        "error_bound": report["parity"]["bound"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench_demo"))
    parser.add_argument("--json", help="file to append to, one line per run")
    options = parser.parse_args()
    stamp = environment()
    for seed in options.seeds:
        known: dict[str, float] = {}
        for target in options.targets:
            config = DemoConfig(
                model=options.model,
                text=options.text,
                target=target,
                out=options.out / f"{target}-{seed}",
                train=TrainConfig(seed=seed),
            )
            start = time.perf_counter()
            report = run(config, Log(), known)
            known = {name: report["perplexity"][name] for name in ("base", "lora")}
            row = row_of(report, time.perf_counter() - start)
            print(f"seed {seed} target {target}: {row['perplexity']}, {row['speed']['ratios']}")
            if options.json:
                append(options.json, [{**row, **stamp}])


if __name__ == "__main__":
    main()
