"""Every op of benchmarks/ops/ against its contenders: checked first, then timed side by side.

    python benchmarks/bench_ops.py --device cuda [--ops gated_mlp ...] [--models llama-3-8b ...]
        [--tokens 1 16 ...] [--open 1.0 0.6 ...] [--seconds S] [--json results.jsonl]

Contenders: ours (the kernel), folded (pack, then vendor matmuls), masked (eager torch), compiled
(torch.compile of masked), liger, dense (no gates), oracle (the physically small model). The last
column is the roofline's share: the time that the least FLOPs and bytes need at the rates of a large
matmul and a large copy measured in the same run, over our time. Without a GPU the kernels cannot
run, and only the others are timed.
"""

import argparse
import itertools

import torch
from _harness import append, ceilings, environment, interleaved
from _suite import MODEL_SHAPES, Case, Contender, modules

OPEN = (1.0, 0.8, 0.6, 0.5)
TOKENS = (1, 16, 256, 2048, 8192)
MODELS = ("llama-3-8b", "llama-2-7b", "roberta-base", "smollm2-135m")


def relative_errors(got, truth) -> list[float]:
    """Per result the relative error in the Frobenius norm; integers must be equal."""
    errors = []
    for one, true in zip(got, truth, strict=True):
        if not true.is_floating_point():
            errors.append(0.0 if torch.equal(one, true) else float("inf"))
            continue
        norm = true.double().norm().item()
        errors.append((one.double() - true.double()).norm().item() / (norm or 1.0))
    return errors


def prepare(work, dtype: torch.dtype, compiled: bool):
    """({name: step}, {name: worst error}); SystemExit if a contender's result is wrong.

    Bound: 3 times the error of the eager masked contender in the same dtype, result by result, and
    an eps of the dtype.
    """
    contenders = dict(work.contenders)
    if compiled:
        masked = contenders["masked"]
        contenders["compiled"] = Contender(torch.compile(masked.forward), masked.inputs)
    outputs = contenders["masked"].step()
    upstream = tuple(torch.randn_like(y) for y in outputs if y.requires_grad)
    truth = work.truth.step(tuple(g.to(work.truth.inputs[0].dtype) for g in upstream))
    allowed = relative_errors(contenders["masked"].step(upstream), truth)
    steps, errors = {}, {}
    for name, contender in contenders.items():
        own = upstream
        if name in work.differ:
            outputs = contender.step()
            own = tuple(torch.randn_like(y) for y in outputs if y.requires_grad)
        steps[name] = lambda contender=contender, own=own: contender.step(own)
        if name in work.differ:
            continue
        found = relative_errors(steps[name](), truth)
        errors[name] = max(found)
        for index, (error, masked_error) in enumerate(zip(found, allowed, strict=True)):
            if not error <= 3 * masked_error + torch.finfo(dtype).eps:
                raise SystemExit(
                    f"{name}: result {index} is wrong by {error:.2e} (masked: {masked_error:.2e}): "
                    "not timed"
                )
    return steps, errors


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
        f"{rates['flops'] / 1e12:.2f} TFLOP/s, copy {rates['bytes'] / 1e9:.0f} GB/s; ms per step"
    )
    grid = itertools.product(options.models, options.tokens, options.open)
    for (model, tokens, kept), (op, module) in itertools.product(
        list(grid), modules(options.ops).items()
    ):
        torch.manual_seed(0)
        work = module.work(Case(model, tokens, kept, dtype, options.device))
        if work is None:
            continue
        if not on_gpu:
            for name in work.needs_gpu:
                work.contenders.pop(name, None)
        steps, errors = prepare(work, dtype, compiled=on_gpu)
        times = interleaved(steps, options.seconds, options.device, graphs=True)
        least_ms = max(work.flops / rates["flops"], work.bytes / rates["bytes"]) * 1e3
        best = times.get("ours", times["masked"])["ms"]
        cells = "".join(f"  {name} {value['ms']:.3f}" for name, value in times.items())
        print(f"{op:22}{model:13}{tokens:6}{kept:5.0%}{cells}  roofline {least_ms / best:.0%}")
        rows = [
            {
                "bench": "op",
                "op": op,
                "contender": name,
                "model": model,
                "tokens": tokens,
                "open": kept,
                "dtype": options.dtype,
                **{k: round(v, 5) if isinstance(v, float) else v for k, v in value.items()},
                "flops": work.flops,
                "bytes": work.bytes,
                "roofline": round(least_ms / value["ms"], 4),
                "error": errors.get(name),
                **stamp,
            }
            for name, value in times.items()
        ]
        if options.json:
            append(options.json, rows)


if __name__ == "__main__":
    main()
