"""finegates_step: a training step of RoBERTa-base with gates on the rows and columns of linears.

ours is gatepack.methods.FineGates; masked multiplies the same gates in unfused; finegates is the
published code, whose row and column gates draw their own samples. The gates' logits train; AdamW
has a learning rate of 0.
"""

import copy
import dataclasses

import torch
from _contenders import with_fine_gates
from _models import build, mask_rows_columns, optimizer_step, shared_copy
from _suite import Case, Contender, Work

from gatepack.hf import gates_of
from gatepack.layers import layers_of
from gatepack.methods import FineGates

CHECK = {"layers": 2, "batch": 2, "tokens": 16}
TARGET = 0.4


def work(case: Case) -> Work:
    base = build(dataclasses.replace(case, model="roberta-base"))
    ids = torch.randint(4, base.config.vocab_size, (case.batch, case.tokens), device=case.device)
    labels = torch.zeros(case.batch, dtype=torch.int64, device=case.device)
    method = FineGates(noise=0.0, target_sparsity=TARGET)
    gated = shared_copy(base)
    method.prepare(gated)
    gates = gates_of(gated)
    gates.unfreeze()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        values = 0.8 + 0.2 * torch.rand(gates.logits.shape, generator=generator)
        gates.logits.copy_(gates.estimator.logits_of(values))
    for name, one in gates.items():
        order = torch.randperm(one.size, generator=generator)
        gates.close(name, order[round(case.kept * one.size) :])
    training = method.start(gated, 1)
    gates.unfreeze()
    masked, logits = mask_rows_columns(shared_copy(base), gates)
    fine = shared_copy(base)
    names = {path.rpartition(".")[2] for path in layers_of(base)[0].family.linears}
    linears = with_fine_gates(fine.base_model.encoder, names, case.kept)
    fine_logits = [p for linear in linears for p in (linear.rows, linear.columns)]

    # The timed case is not checked: check_case is.
    wide = copy.deepcopy(base).double() if case.layers else shared_copy(base)
    exact, exact_logits = mask_rows_columns(wide, gates)

    def loss(model):
        return model(input_ids=ids, labels=labels).loss

    def ours(logits):
        return loss(gated) + 0.0 * training.soft_distance()

    def published(*_):
        penalty = torch.stack([linear.penalty(TARGET) for linear in linears]).mean()
        return loss(fine) + 50.0 * penalty

    contenders = {
        "ours": Contender(ours, (gates.logits,), optimizer_step([gates.logits])),
        "masked": Contender(lambda _: masked(loss), (logits,), optimizer_step([logits])),
        "finegates": Contender(published, tuple(fine_logits), optimizer_step(fine_logits)),
    }
    return Work(
        contenders=contenders,
        truth=Contender(lambda _: exact(loss), (exact_logits,)),
        **least(case, base, ids),
        differ=("finegates",),
        needs_gpu=(),
        graphs=(),
    )


def least(case: Case, base, ids) -> dict[str, float]:
    """{"flops", "bytes"} with a kept fraction of the rows and of the columns of each linear."""
    weights = sum(
        layer.linear(path).weight.numel()
        for layer in layers_of(base)
        for path in layer.family.linears
    )
    weights *= case.kept**2
    size = torch.empty((), dtype=case.dtype).element_size()
    return {"flops": 4 * ids.numel() * weights, "bytes": size * 2 * weights}


def check_case(case: Case) -> Case:
    return dataclasses.replace(case, **CHECK)
