"""A gated MLP's training step (forward + backward) against the same MLP masked, dense, and small.

python benchmarks/bench_mlp.py [--device cuda] [--json results.jsonl]

Weights are frozen and gates train, as in gated fine-tuning: gradients go to x and to the gates.
"masked" multiplies the gate into the dense activation, as eager implementations do; "dense" has
no gate; "small" is the physically small MLP, which has no gate either; "gatepack" draws its sample
in every step.
"""

import argparse
import copy

import torch
from _harness import append, environment, interleaved
from transformers import LlamaConfig, LlamaForCausalLM

import gatepack as gp
from gatepack.testing import MODEL_SHAPES

OPEN = (1.0, 0.8, 0.6, 0.5)


def build(hidden: int, width: int, device: str, dtype: torch.dtype):
    """(one-layer model, its MLP): what attach needs around an MLP, and nothing more."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        vocab_size=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)
    return model, model.model.layers[0].mlp


def contenders(hidden: int, width: int, tokens: int, kept: float, device: str, dtype: torch.dtype):
    """name -> step, and name -> (y, dx, dz) of one step with the same upstream gradient."""
    model, mlp = build(hidden, width, device, dtype)
    dense = copy.deepcopy(mlp)
    gates = gp.attach(model, gp.GateConfig(units=("channels",), noise=0.0, target=0.5))
    gated = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(1)
    closed = torch.randperm(width, generator=generator)[: width - round(kept * width)]
    fractional = torch.full((width,), 0.8) + 0.2 * torch.rand(width, generator=generator)
    with torch.no_grad():
        gates.logits.copy_(gates.estimator.logits_of(fractional))
    gates.close(next(iter(gates)), closed)
    small = copy.deepcopy(model)
    gp.pack(small)
    small = small.model.layers[0].mlp
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    model.train()

    def step_gated():
        sample = gates.draw()
        y = gated(x)
        return y, *torch.autograd.grad(y, (x, gates.logits), dy), sample

    def step_masked():
        z = gates.deterministic_values()
        h = dense.act_fn(dense.gate_proj(x)) * dense.up_proj(x)
        y = dense.down_proj(h * z.to(h.dtype))
        return y, *torch.autograd.grad(y, (x, gates.logits), dy)

    def step_plain(module):
        y = module(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    return {
        "gatepack": step_gated,
        "masked": step_masked,
        "dense": lambda: step_plain(dense),
        "small": lambda: step_plain(small),
    }


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "roberta-base"])
    parser.add_argument("--seconds", type=float, default=6.0, help="per row")
    parser.add_argument("--json", help="file to append to, one line per number")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    stamp = environment(options.device)
    print(f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}, {options.dtype}")
    print("x NAME: how many times faster gatepack is; error: of y, dx and dlogits against masked")
    heading = ("model", "T", "open", "ms", "x masked", "x dense", "x small", "error")
    print(("{:14}{:>6}{:>7}{:>9}{:>10}{:>9}{:>9}{:>9}").format(*heading))
    for name in options.models:
        sizes = (MODEL_SHAPES[name].hidden, MODEL_SHAPES[name].mlp)
        for tokens in options.tokens:
            for kept in OPEN:
                steps = contenders(*sizes, tokens, kept, options.device, dtype)
                pairs = zip(steps["gatepack"]()[:3], steps["masked"](), strict=True)
                error = max(relative_error(ours, theirs) for ours, theirs in pairs)
                if not error <= bound:
                    raise SystemExit(f"gated MLP is wrong (error {error:.2g}): not timed")
                times = interleaved(steps, options.seconds, options.device)
                ratio = {key: value["ms"] / times["gatepack"]["ms"] for key, value in times.items()}
                print(
                    f"{name:14}{tokens:6}{kept:7.0%}{times['gatepack']['ms']:9.2f}"
                    f"{ratio['masked']:10.2f}{ratio['dense']:9.2f}{ratio['small']:9.2f}{error:9.1e}"
                )
                rows = [
                    {
                        "bench": "mlp_step",
                        "op": key,
                        "shape": list(sizes),
                        "model": name,
                        "tokens": tokens,
                        "open": kept,
                        "dtype": options.dtype,
                        **{k: round(v, 4) for k, v in value.items()},
                        "gatepack_is_faster_by": round(ratio[key], 4),
                        "error": error,
                        **stamp,
                    }
                    for key, value in times.items()
                ]
                if options.json:
                    append(options.json, rows)


if __name__ == "__main__":
    main()
