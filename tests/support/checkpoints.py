"""Tiny models to save, gated or with a tokenizer, and a text to train one on."""

import json
from pathlib import Path

import torch
from letters import letter_tokenizer
from tiny import set_gates, tiny_model, token_ids

import gatepack as gp

GATED = gp.GateConfig(noise=0.1, target=0.5, width_multiple=4, seed=3)


def save_tiny(folder: Path) -> Path:
    """A checkpoint of a tiny Llama with a tokenizer of one token per printable ASCII character."""
    tiny_model("llama", torch.float32).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def write_documents(path: Path) -> Path:
    """18 documents, a .jsonl line each."""
    lines = [
        json.dumps({"text": f"Document {i} speaks of {i * i} things. " * 6}) for i in range(18)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def gated(model_type="llama", pattern="mixed", dtype=torch.float32, **overrides):
    """(a tiny model, its gates)."""
    model = tiny_model(model_type, dtype, **overrides)
    gates = gp.attach(model, GATED)
    set_gates(gates, pattern)
    return model, gates


@torch.no_grad()
def logits_of(model):
    return model.eval()(token_ids()).logits


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
