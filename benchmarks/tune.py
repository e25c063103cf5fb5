"""Search tile choices for an op on the GPU at hand, and print them as rows for _configs.py.

    python benchmarks/tune.py gated_mlp [--models llama-3-8b] [--tokens 2048 8192] [--open 1.0 0.6]
        [--dtype bfloat16] [--seconds S] [--json tuned.jsonl]

Starts at what choose_config gives and climbs: each integer of each tile is halved, doubled or moved
by one, the change is kept where the whole step gets faster, until nothing helps. A choice that does
not compile, does not fit the chip or changes the result is dropped. Each trial is timed in turn
with the best so far, and each step up is printed and written as it is found: a run may be cut off.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from unittest import mock

import torch
import triton
from _harness import append, environment, interleaved
from _measure import relative_errors
from _suite import MODEL_SHAPES, Case, modules

from gatepack.kernels import _configs

GAIN = 0.99  # a change is kept if it takes less than this part of the time


def neighbours(config):
    """Every config that differs in one field, of the config or of a tile inside it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changed = neighbours(value)
        elif isinstance(value, bool):
            changed = iter((not value,))
        elif field.name.startswith("block") or field.name == "num_warps":
            changed = iter((value // 2, value * 2))
        else:
            changed = iter(sorted({value // 2, value - 1, value + 1, value * 2}))
        while True:
            try:
                yield dataclasses.replace(config, **{field.name: next(changed)})
            except StopIteration:
                break
            except ValueError:  # the config's own check refuses it
                continue


def choices_of(step) -> dict:
    """{(op, shape, dtype, arch): config}: what choose_config is asked for while step runs."""
    asked = {}

    def recording(op, choose):
        def record(*key):
            asked[(op, *key)] = choose(*key)
            return asked[(op, *key)]

        return record

    recorders = {op: recording(op, choose) for op, choose in _configs._CHOICES.items()}
    with mock.patch.dict(_configs._CHOICES, recorders):
        step()
    return asked


def using(asked: dict):
    """Makes choose_config answer with these configs."""

    def fixed(op, choose):
        return lambda *key: asked.get((op, *key)) or choose(*key)

    return mock.patch.dict(
        _configs._CHOICES, {op: fixed(op, choose) for op, choose in _configs._CHOICES.items()}
    )


def faster(step, asked: dict, key, trial, expected, seconds: float, device: str) -> float | None:
    """Time of step with `trial` for one key over that without; None if it fails or is wrong."""

    def changed():
        with using({**asked, key: trial}):
            return step()

    def same():
        with using(asked):
            return step()

    try:
        errors = relative_errors(changed(), expected)
    except (triton.TritonError, RuntimeError, AssertionError):
        return None
    if max(errors) > 4 * torch.finfo(key[2]).eps:
        return None
    times = interleaved({"same": same, "changed": changed}, seconds, device)
    return times["changed"]["ms"] / times["same"]["ms"]


def climb(step, seconds: float, device: str) -> Iterator[tuple[tuple, object, float]]:
    """(key, config, time over that of the default) of each step up of a hill climb from the
    default, and once more where a climb ends."""
    asked = choices_of(step)
    expected = step()
    for key, config in asked.items():
        tried, gain, improved = {config}, 1.0, True
        while improved:
            improved = False
            for trial in neighbours(asked[key]):
                if trial in tried:
                    continue
                tried.add(trial)
                ratio = faster(step, asked, key, trial, expected, seconds, device)
                if ratio is not None and ratio < GAIN:
                    asked[key], gain, improved = trial, gain * ratio, True
                    yield key, trial, gain
                    break
        yield key, asked[key], gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", help="a file of benchmarks/ops")
    parser.add_argument("--models", nargs="+", default=["llama-3-8b"], choices=MODEL_SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--open", type=float, nargs="+", default=[1.0, 0.6])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.2, help="per trial")
    parser.add_argument("--json", help="file to append to, one line per choice")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune.py: expected a CUDA or ROCm device, found none")
    dtype, device = getattr(torch, options.dtype), "cuda"
    (module,) = modules([options.op]).values()
    for model, tokens, kept in itertools.product(options.models, options.tokens, options.open):
        work = module.work(Case(model, tokens, kept, dtype, device))
        if work is None:
            continue
        contender = work.contenders["ours"]
        outputs = contender.step()
        upstream = tuple(torch.randn_like(y) for y in outputs if y.requires_grad)
        print(f"# {options.op} {model} T={tokens} {kept:.0%} open")
        for key, config, ratio in climb(
            lambda c=contender, u=upstream: c.step(u), options.seconds, device
        ):
            op, shape, _, arch = key
            found = f"({op!r}, {shape}, {options.dtype}, {arch!r}): {config},  # {ratio:.3f}x"
            print(found, flush=True)
            if options.json:
                row = {"op": op, "shape": list(shape), "dtype": options.dtype, "arch": arch}
                row |= {"config": dataclasses.asdict(config), "time_ratio": round(ratio, 4)}
                append(options.json, [{**row, "open": kept, **environment(device)}])


if __name__ == "__main__":
    main()
