"""pytest-benchmark view of benchmarks/ops: `pytest benchmarks/test_ops.py`.

One group per op, model and open fraction, at 256 tokens; a contender is checked against the truth
before it is timed. bench_ops.py runs the full grid and writes JSONL.
"""

import pytest
import torch
from _measure import prepare
from _suite import Case, modules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (op, contender, kept)
    for op in modules()
    for contender in ("ours", "folded", "masked", "dense", "oracle")
    for kept in (1.0, 0.6)
]


@pytest.mark.parametrize(("op", "contender", "kept"), CASES)
def test_op(op, contender, kept, benchmark):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    work = modules([op])[op].work(Case("smollm2-135m", 256, kept, dtype, DEVICE))
    if work is None or contender not in work.contenders:
        pytest.skip(f"{op} has no {contender} at 256 tokens")
    if DEVICE == "cpu":
        if contender in work.needs_gpu:
            pytest.skip("needs a GPU")
        for name in work.needs_gpu:
            work.contenders.pop(name, None)
    steps, _ = prepare(work, dtype, compiled=False)

    def step():
        steps[contender]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} smollm2-135m {kept:.0%} open"
    benchmark(step)
