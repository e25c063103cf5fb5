"""The CPU hot paths that compare.py runs in two trees: names on stdin, milliseconds on stdout.

Only what both trees have can be compared, so probes use the public API and little of it.
"""

import argparse
import functools
import sys
import time

import torch


def _model(small: bool, layers: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64 if small else 576, intermediate_size=128 if small else 1536,
        num_attention_heads=3 if not small else 1, num_key_value_heads=1 if small else 3,
        head_dim=64, num_hidden_layers=layers, vocab_size=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def _gated(small: bool, layers: int, kept: float = 0.6):
    import gatepack as gp

    model = _model(small, layers)
    gates = gp.attach(model, gp.GateConfig(units=("channels",), noise=0.0, target=0.999))
    for name, gate in gates.items():
        gates.close(name, range(round(kept * gate.size), gate.size))
    return model


def train_step(small: bool):
    """Forward and backward of a gated model at 60 % of its channels."""
    model = _gated(small, 2).train()
    ids = torch.randint(128, (1, 16 if small else 512))

    def run():
        model(input_ids=ids, labels=ids).loss.backward()

    return run


def _packed(small: bool):
    import gatepack as gp

    model = _gated(small, 4).eval()
    gp.pack(model)
    return model


def prefill(small: bool):
    model = _packed(small)
    ids = torch.randint(128, (1, 16 if small else 256))
    return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))


def decode(small: bool):
    model = _packed(small)
    ids = torch.randint(128, (1, 1))
    return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False))


def fold_pack(small: bool):
    from gatepack._ext import fold_pack

    n = 64 if small else 1536
    w, z = torch.randn(n, n), torch.rand(n // 2)
    index = torch.arange(0, n, 2)
    return lambda: fold_pack(w, index, index, z, z)


def draw(small: bool):
    """A sample of all gates and their open sets."""
    model = _gated(small, 2 if small else 8)
    gates = model.gatepack_gates.train()

    def run():
        gates._sample = None
        gates.draw()
        for _, gate in gates.items():
            gate.open()

    return run


PROBES = {f.__name__: f for f in (train_step, prefill, decode, fold_pack, draw)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join(PROBES))
        return
    torch.set_num_threads(options.threads)
    made = functools.cache(lambda name: PROBES[name](options.small))
    for name in map(str.strip, sys.stdin):
        try:
            run = made(name)
            start = time.perf_counter()
            run()
            print((time.perf_counter() - start) * 1e3, flush=True)
        except (AttributeError, ImportError, TypeError, ValueError, RuntimeError) as error:
            print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
