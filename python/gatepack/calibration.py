"""Stage 4, methods: the batches that methods calibrate on, and the model while it reads them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gatepack.layers import hf_model
from gatepack.quality import evaluating, forward_arguments

Batch = torch.Tensor | Mapping[str, torch.Tensor]


def inputs_of(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as keyword arguments of a model, on its device; bare token ids become input_ids."""
    return {name: value.to(device) for name, value in _by_name(batch).items()}


def _by_name(batch: Batch) -> Mapping[str, torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise ValueError(
            "batches must hold tensors of token ids [B, S] or mappings of a model's arguments, got "
            f"one of type {type(batch).__name__}"
        )
    return batch


def token_mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Which tokens are not padding, bool [B, S]; None for all. ValueError for another form."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, tokens], got {list(mask.shape)}")
    return mask.bool()


def token_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows [T, C] of x [*, C] for the tokens that mask, bool of as many elements, keeps."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1)]


def with_labels(root: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """inputs with labels (those of a language model are its input ids) and without a cache."""
    if "labels" not in inputs:
        if not hf_model(root).can_generate():
            raise ValueError(
                f"batches for {type(root).__name__} need labels: its loss is not that of the next "
                "token"
            )
        mask = token_mask(inputs)
        labels = inputs["input_ids"]
        inputs["labels"] = labels if mask is None else labels.masked_fill(~mask, -100)
    return {**inputs, "use_cache": False} if "use_cache" in forward_arguments(root) else inputs


def label_count(root: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """How many labels a model's loss is the mean over, int64 []: those that are not -100, without
    the first of each row where the loss is that of the next token."""
    counted = labels[:, 1:] if hf_model(root).can_generate() else labels
    return (counted != -100).sum()


def require_batches(done: int) -> None:
    if done == 0:
        raise ValueError("batches must hold at least one batch of token ids, got none")


def check_batches(batches: Sequence[Batch]) -> None:
    """ValueError, with the number of the batch, unless all are what a model takes by name."""
    require_batches(len(batches))
    for number, batch in enumerate(batches):
        given = _by_name(batch)
        for name, value in given.items():
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            if not isinstance(value, torch.Tensor) or (name == "input_ids" and value.dim() != 2):
                raise ValueError(
                    f"batches[{number}]: {name} must be a tensor of a whole batch, got {shape}: "
                    "give batches as a DataLoader makes them, not rows of a data set"
                )
        if not {"input_ids", "inputs_embeds"} & given.keys():
            raise ValueError(f"batches[{number}] must hold input_ids, got {', '.join(given)}")


@contextmanager
def frozen(root: nn.Module, but: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, eval mode with gradients on, for no parameter of the model except those in but.

    Modes and requires_grad are as before afterwards.
    """
    before = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        root.requires_grad_(False)
        for parameter in but:
            parameter.requires_grad_(True)
        with evaluating(root), torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
