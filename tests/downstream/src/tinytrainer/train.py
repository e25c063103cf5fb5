"""Attach gates, train two steps, pack, save and reload; prints what happened as JSON."""

import json
import sys

import torch
import torch.nn.functional as F

import gatepack as gp
import tinytrainer.family  # noqa: F401
from tinytrainer.model import PebbleConfig, PebbleForCausalLM

FIXED = torch.arange(16)[None]


def train(out: str) -> dict[str, object]:
    torch.manual_seed(0)
    model = PebbleForCausalLM(PebbleConfig())
    gates = gp.attach(model, gp.GateConfig(target=0.6, width_multiple=8, noise=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 64, (2, 16))
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens).loss + gates.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
        losses.append(float(loss.detach()))
    gates.snap()
    model.eval()
    with torch.no_grad():
        gated = model(input_ids=tokens).logits
        report = gp.pack(model)
        packed = model(input_ids=tokens).logits
        fixed = model(input_ids=FIXED).logits
        gp.save_pretrained(model, out)
    return {
        "version": gp.__version__,
        "losses": losses,
        "kept": report.kept_fraction,
        "difference": float((packed - gated).abs().max()),
        "logits": fixed[0, -1].tolist(),
        "explained": len(gp.explain(model).rows),
        "op": own_layer(),
    }


def own_layer() -> float:
    """gatepack's module and op in a model of one's own; how far they are apart."""
    from gatepack.kernels import gated_linear_fn, gated_linear_ref

    layer = gp.GatedLinear(8, 4)
    x, z = torch.randn(3, 8), torch.tensor([1.0, 0.0, 0.5, 1.0] * 2)
    run = gated_linear_fn if torch.cuda.is_available() else gated_linear_ref
    y = run(x, layer.weight, layer.bias, z_in=z)
    return float((y - F.linear(x * z, layer.weight, layer.bias)).detach().abs().max())


def reload(out: str) -> dict[str, object]:
    with torch.no_grad():
        return {"logits": gp.from_pretrained(out).eval()(input_ids=FIXED).logits[0, -1].tolist()}


def main() -> None:
    command, out = sys.argv[1:]
    print(json.dumps({"train": train, "reload": reload}[command](out)))


if __name__ == "__main__":
    main()
