"""gated_linear (Triton) forward + backward against fold-pack + matmul, masks and no gates.

python benchmarks/bench_gated_linear.py --device cuda [--json results.jsonl]

Head gates on o_proj shapes (group 128 or 64) and channel gates on down_proj shapes (group 1);
weights are frozen, gradients go to x and to the gates. On a CPU only the contenders without Triton
are timed.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from _harness import append, environment, interleaved

from gatepack.functional import FoldedLinear
from gatepack.testing import MODEL_SHAPES

OPEN = (1.0, 0.8, 0.6, 0.5)


def shape_of(model: str, linear: str) -> tuple[int, int, int]:
    """(in features, out features, lanes per gate) of "o_proj" or "down_proj"."""
    sizes = MODEL_SHAPES[model]
    if linear == "o_proj":
        return sizes.heads * sizes.head_dim, sizes.hidden, sizes.head_dim
    return sizes.mlp, sizes.hidden, 1


def contenders(shape, tokens: int, kept: float, device: str, dtype: torch.dtype):
    """name -> step returning (y, dx, dz), and which gates are open; all but "dense" are gated."""
    inner, outer, lanes = shape
    generator = torch.Generator().manual_seed(0)
    units = inner // lanes
    z = 0.5 + 0.5 * torch.rand(units, generator=generator)
    z[torch.randperm(units, generator=generator)[: units - round(kept * units)]] = 0.0
    z = z.to(device).requires_grad_()
    x = torch.randn(tokens, inner, generator=generator).to(device, dtype).requires_grad_()
    w = (torch.randn(outer, inner, generator=generator) / inner**0.5).to(device, dtype)
    dy = torch.randn(tokens, outer, generator=generator).to(device, dtype)

    def gradients(y):
        return y, *torch.autograd.grad(y, (x, z), dy)

    def triton():
        from gatepack.kernels import gated_linear_fn

        return gradients(gated_linear_fn(x, w, z_in=z, group_in=lanes))

    def folded():
        units_open = (z.detach() > 0).nonzero().squeeze(1)
        cols = (units_open[:, None] * lanes + torch.arange(lanes, device=device)).reshape(-1)
        compact = x.index_select(1, cols)
        z_open = z.index_select(0, units_open)
        return gradients(FoldedLinear.apply(compact, w, None, z_open, None, None, cols, lanes, 1))

    def masked():
        return gradients(F.linear(x * z.repeat_interleave(lanes).to(dtype), w))

    def dense():
        y = F.linear(x, w)
        return y, torch.autograd.grad(y, x, dy)[0]

    steps = {"folded": folded, "masked": masked, "dense": dense}
    return ({"triton": triton, **steps} if device == "cuda" else steps), (z.detach() > 0).float()


def error_against(reference, step, is_open: torch.Tensor) -> float:
    """Largest relative error of y, dx and dz; dz of closed gates is defined as 0."""
    worst = 0.0
    for i, (expected, got) in enumerate(zip(reference(), step(), strict=True)):
        if i == 2:
            expected = expected * is_open
        worst = max(worst, ((got - expected).float().norm() / expected.float().norm()).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 2048, 8192])
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "smollm2-135m"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--json", help="file to append to, one line per number")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    stamp = environment(options.device)
    print(f"{stamp['device']}, torch {stamp['torch']}, {options.dtype}; ms, forward + backward")
    cases = itertools.product(options.models, ("o_proj", "down_proj"), options.tokens, OPEN)
    for model, linear, tokens, kept in cases:
        shape = shape_of(model, linear)
        steps, is_open = contenders(shape, tokens, kept, options.device, dtype)
        errors = {
            key: error_against(steps["masked"], steps[key], is_open)
            for key in ("triton", "folded")
            if key in steps
        }
        if not all(error <= bound for error in errors.values()):
            raise SystemExit(f"{model} {linear}: wrong result {errors}: not timed")
        times = interleaved(steps, options.seconds, options.device)
        cells = "".join(f"{key:>9}{value['ms']:9.3f}" for key, value in times.items())
        print(f"{model:14}{linear:10}{tokens:6}{kept:6.0%}{cells}")
        rows = [
            {
                "bench": "gated_linear_step",
                "op": key,
                "model": model,
                "linear": linear,
                "shape": list(shape),
                "tokens": tokens,
                "open": kept,
                "dtype": options.dtype,
                **{k: round(v, 5) for k, v in value.items()},
                "of_dense": round(times["dense"]["ms"] / value["ms"], 4),
                "error": errors.get(key, 0.0),
                **stamp,
            }
            for key, value in times.items()
        ]
        if options.json:
            append(options.json, rows)


if __name__ == "__main__":
    main()
