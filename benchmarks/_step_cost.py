"""What a training step of a model with gates on rows and columns costs, beside masks.

A step is forward, backward and an AdamW step (with a learning rate of 0) of all that trains; the
masked model multiplies the same gates in at full width, as published. Its optimizer is the same,
and neither has the penalty of the gates, which does not depend on how they are computed.
"""

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from _harness import peak_bytes
from _measure import relative_errors
from _models import mask_rows_columns, optimizer_step
from _suite import Contender
from torch import nn

from gatepack.hf import detach, gates_of
from gatepack.quality import evaluating

PHASES = ("trained", "frozen")


def step_cost(model: nn.Module, batches: Sequence[dict]) -> dict[str, dict]:
    """Of each phase of the gates, still trained (with noise) and frozen: medians over batches.

    batches: keyword arguments of the model's forward, with labels. Checks loss and gradients on the
    first one, without noise and dropout; SystemExit if ours are wrong by more than 3 times the
    masked model's error and an eps. ratio: of the paired times. bytes: the peak of one step on the
    first batch. Leaves the gates frozen.
    """
    gates = gates_of(model)
    found = {}
    for phase in PHASES:
        gates.unfreeze() if phase == "trained" else gates.freeze()
        error = _checked(model, batches[0])
        contenders = _contenders(model)
        times = {name: [] for name in contenders}
        steps = {
            name: lambda batch, make=make: make(batch).run((torch.ones(()),))
            for name, make in contenders.items()
        }
        for step in steps.values():
            step(batches[0])
        for batch in batches:
            for name, step in steps.items():
                start = time.perf_counter()
                step(batch)
                times[name].append((time.perf_counter() - start) * 1e3)
        pairs = zip(times["masked"], times["ours"], strict=True)
        found[phase] = {
            **{f"{name}_ms": round(statistics.median(ms), 2) for name, ms in times.items()},
            "ratio": round(statistics.median(masked / ours for masked, ours in pairs), 4),
            **{
                f"{name}_bytes": peak_bytes(lambda step=step: step(batches[0]), "cpu")
                for name, step in steps.items()
            },
            "runs": len(batches),
            "error": error,
        }
    return found


def _contenders(model: nn.Module, dtypes=(torch.float32, torch.float32)) -> dict:
    """{"ours", "masked": batch -> Contender}; what the second dtype says, the masked one is in."""
    gates = gates_of(model)
    plain = copy.deepcopy(model)
    detach(plain)
    masked, logits = mask_rows_columns(plain.to(dtypes[1]), gates)
    made = {}
    for name, root, own, forward in (
        ("ours", model, gates.logits, lambda f: f(model)),
        ("masked", plain, logits, masked),
    ):
        leaves = [p for p in root.parameters() if p.requires_grad and p is not own]
        leaves += [own] if own.requires_grad else []
        made[name] = _with_batch(forward, tuple(leaves))
    return made


def _with_batch(forward, leaves: tuple[torch.Tensor, ...]):
    after = optimizer_step(leaves)

    def contender(batch: dict) -> Contender:
        return Contender(lambda *_: forward(lambda root: root(**batch).loss), leaves, after)

    return contender


def _checked(model: nn.Module, batch: dict) -> float:
    """The error of ours; both contenders' against the masked model in fp64."""
    with evaluating(model):
        makes = _contenders(model)
        exact = _contenders(model, (torch.float32, torch.float64))["masked"]
        one = torch.ones(())
        truth = _flat(exact(batch).step((one.double(),)))
        errors = {
            name: relative_errors(_flat(make(batch).step((one,))), truth)
            for name, make in makes.items()
        }
    # A loss is one number, which rounding may leave right by chance: the worse error counts.
    ours, masked = max(errors["ours"]), max(errors["masked"])
    if not ours <= 3 * masked + torch.finfo(torch.float32).eps:
        raise SystemExit(
            f"a training step is wrong by {ours:.2e} (masked: {masked:.2e}): not timed"
        )
    return ours


def _flat(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, all gradients in one vector): some, as of the biases of keys, are 0 by themselves."""
    loss, *gradients = results
    return loss, torch.cat([gradient.reshape(-1) for gradient in gradients])
