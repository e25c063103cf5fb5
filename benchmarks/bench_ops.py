"""Every op of benchmarks/ops/ against its contenders: checked first, then timed side by side.

    python benchmarks/bench_ops.py --device cuda [--ops gated_mlp ...] [--models llama-3-8b ...]
        [--tokens 1 16 ...] [--open 1.0 0.6 ...] [--seconds S] [--json results.jsonl]

Contenders: ours (the kernel), folded (pack, then vendor matmuls), masked (eager torch), compiled
(torch.compile of masked), liger, dense (no gates), oracle (the physically small model). The last
column is the roofline's share: the time that the least FLOPs and bytes need at the rates of a large
matmul and a large copy measured in the same run, over our time. Without a GPU the kernels cannot
run, and only the others are timed; but ours of sample_gates is what a model calls there.
"""

import argparse
import itertools
import sys

import torch
from _harness import append, ceilings, environment
from _measure import line, measure
from _suite import MODEL_SHAPES, Case, modules

OPEN = (1.0, 0.8, 0.6, 0.5)
TOKENS = (1, 16, 256, 2048, 8192)
MODELS = ("llama-3-8b", "llama-2-7b", "roberta-base", "smollm2-135m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ops", nargs="+", help="files of benchmarks/ops, default all")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODEL_SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--open", type=float, nargs="+", default=OPEN)
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--json", help="file to append to, one line per number")
    options = parser.parse_args()
    dtype, on_gpu = getattr(torch, options.dtype), options.device.startswith("cuda")
    stamp = environment(options.device)
    rates = ceilings(options.device, dtype)
    print(
        f"{stamp['device']}, torch {stamp['torch']}, {options.dtype}: matmul "
        f"{rates['flops'] / 1e12:.2f} TFLOP/s, copy {rates['copy'] / 1e9:.0f} GB/s; ms per step"
    )
    failed = 0
    grid = itertools.product(options.models, options.tokens, options.open)
    for (model, tokens, kept), (op, module) in itertools.product(
        list(grid), modules(options.ops).items()
    ):
        torch.manual_seed(0)
        case = Case(model, tokens, kept, dtype, options.device)
        try:
            work = module.work(case)
            if work is None:
                continue
            rows = measure("op", op, case, work, rates, options.seconds, compiled=on_gpu)
        except (SystemExit, Exception) as error:  # one case shall not end the others
            failed += 1
            print(f"FAILED {op} {model} T={tokens} {kept:.0%} open: {error}", flush=True)
            continue
        print(line(rows), flush=True)
        if options.json:
            append(options.json, [{**row, **stamp} for row in rows])
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
