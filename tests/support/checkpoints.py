"""A tiny model with its tokenizer on disk, and a text to train it on."""

import json
from pathlib import Path

import torch
from letters import letter_tokenizer
from tiny import tiny_model


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
