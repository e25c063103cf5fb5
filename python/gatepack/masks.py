"""Stage 1, gates: which units stay in memory, and how a config records them."""

import base64
from collections.abc import Mapping

import numpy as np
import torch


def physical_mask(kind: str, shared_size: int, mask: torch.Tensor) -> torch.Tensor:
    """The units that stay in memory for an open mask, bool [size]: the open ones and what the
    layout needs.

    At least one, because no engine takes a linear of width 0 (nor does GPT-2's Conv1D); of heads,
    equally many per remaining key/value head.
    """
    mask = mask.clone()
    if not mask.any():
        mask[0] = True
    if kind != "heads":
        return mask
    grid = mask.reshape(-1, shared_size)
    most = int(grid.sum(1).max())
    for row in grid:
        closed = (~row).nonzero().squeeze(1)
        if 0 < int(row.sum()) < most:
            row[closed[: most - int(row.sum())]] = True
    return grid.reshape(-1)


def record_of(config) -> dict:
    """What a model's config says of gates and of units that are gone, as a dict of its own."""
    return dict(getattr(config, "gatepack", None) or {})


def is_packed(config) -> bool:
    """Whether the model that a config describes lacks units, or rows and columns."""
    record = record_of(config)
    return bool(record.get("kept") or record.get("linears"))


def encode_mask(mask: torch.Tensor) -> dict:
    """bool [size] -> {"size", "kept", "bits"}: bits are packed little-endian, base64."""
    bits = np.packbits(mask.cpu().numpy(), bitorder="little").tobytes()
    return {"size": mask.numel(), "kept": int(mask.sum()), "bits": base64.b64encode(bits).decode()}


def decode_mask(record: Mapping) -> torch.Tensor:
    """The inverse of encode_mask; ValueError for a record that contradicts itself."""
    try:
        raw = np.frombuffer(base64.b64decode(record["bits"], validate=True), dtype=np.uint8)
        size, kept = int(record["size"]), int(record["kept"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"config.gatepack holds an unreadable open set: {error!r}") from error
    bits = np.unpackbits(raw, bitorder="little")
    if bits.size < size or bits.size - size >= 8 or bits[size:].any() or int(bits.sum()) != kept:
        raise ValueError(
            f"config.gatepack holds an open set of {kept} of {size} units that its bits contradict"
        )
    return torch.from_numpy(bits[:size].astype(bool))
