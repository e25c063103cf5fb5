"""A made-up table of layer times for tiny Llamas, and gates with a budget by it."""

import torch

import gatepack as gp
from gatepack.latency import LatencyTable, device_label

HERE = device_label(torch.device("cpu"))


def table(channels=40, **fields):
    """Of the tiny Llama: steps in time where widths meet a multiple, as devices have them."""
    scale = channels // 40
    widths = tuple(scale * w for w in (4, 8, 16, 24, 32, 40))
    seconds = {}
    for phase, unit in (("prefill", 1e-3), ("decode", 1e-4)):
        heads = [[unit * (1.3 + 0.5 * k * q + 0.2 * k) for q in (1, 2, 3)] for k in (1, 2)]
        dense = heads[-1][-1]
        steps = [dense - unit * (0.1 * (40 - w / scale) + 0.3 * (w % 16 == 0)) for w in widths]
        mlps = [step - steps[-1] + dense for step in steps]
        seconds[phase] = {"heads": heads, "channels": mlps}
    known = {
        "device": HERE, "dtype": "float32", "hidden_size": 48, "head_dim": 8, "query_heads": 6,
        "kv_heads": 2, "channels": channels, "batch_size": 1, "prompt_tokens": 16,
        "kv_counts": (1, 2),
        "per_kv": (1, 2, 3), "widths": widths, "seconds": seconds, "environment": {},
    }  # fmt: skip
    return LatencyTable(**{**known, **fields})


def config(**fields):
    known = {"target_of": "latency", "latency_table": table().to_dict(), "width_multiple": 4}
    return gp.GateConfig(**{**known, "noise": 0.0, "target": 0.7, **fields})
