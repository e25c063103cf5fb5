"""Linears that stay whole on a CPU: which do, that both ways agree, and what a step holds."""

import copy
import math

import pytest
import torch
from _harness import peak_bytes
from _models import mask_rows_columns
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack import functional, modules
from gatepack.full_width import full_width_limit, tokens_at_full_width
from gatepack.gates import GateSet, GateSpec
from gatepack.methods import FineGates

N, K = 24, 40


def gated_linear(rows=9, columns=12):
    """A GatedLinear [N, K] in fp64 with so many rows and columns closed."""
    config = gp.GateConfig(units=("rows", "columns"), noise=0.0)
    gates = GateSet(config, {"l:rows": GateSpec("rows", N), "l:columns": GateSpec("columns", K)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        values = 0.2 + 0.8 * torch.rand(N + K, generator=generator)
        gates.logits.copy_(gates.estimator.logits_of(values))
    gates.close("l:rows", torch.randperm(N, generator=generator)[:rows])
    gates.close("l:columns", torch.randperm(K, generator=generator)[:columns])
    linear = modules.GatedLinear(
        K, N, dtype=torch.float64, in_gate=gates["l:columns"], out_gate=gates["l:rows"]
    )
    return linear, gates


def test_packing_pays_from_fewer_tokens_the_more_is_closed():
    limits = [tokens_at_full_width((768, 768), (kept, kept)) for kept in (700, 600, 460, 300)]
    assert limits == sorted(limits, reverse=True) and 1 < limits[-1] < limits[0] < 1000
    assert tokens_at_full_width((768, 768), (767, 767)) == math.inf  # moves lanes for nothing
    assert tokens_at_full_width((768, 768), (0, 768)) == 0
    assert tokens_at_full_width((768, 768), (768, 768)) > limits[0]


@pytest.mark.parametrize("whole", [True, False])
def test_both_sides_of_the_limit_equal_the_masked_linear(whole, monkeypatch):
    linear, gates = gated_linear()
    limit = math.floor(full_width_limit(linear.site, (N, K), K - 12, N - 9))
    tokens = limit if whole else limit + 1
    shapes = []
    own = functional.fold_pack
    monkeypatch.setattr(
        functional, "fold_pack", lambda w, *rest: shapes.append(tuple(w.shape)) or own(w, *rest)
    )
    x = torch.randn(tokens, K, dtype=torch.float64).requires_grad_()
    logits = gates.logits.detach().double().requires_grad_()
    values = gates.split(gates.estimator.values(logits).masked_fill(gates.closed, 0.0))
    expected = torch.nn.functional.linear(x * values["l:columns"], linear.weight, linear.bias)
    expected = expected * values["l:rows"]
    upstream = torch.randn(tokens, N, dtype=torch.float64)
    leaves = (x, linear.weight, linear.bias)
    y = linear(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)  # gate values are fp32
    ours = torch.autograd.grad(y, (*leaves, gates.logits), upstream)
    theirs = torch.autograd.grad(expected, (*leaves, logits), upstream)
    for mine, their in zip(ours, theirs, strict=True):
        size = float(their.abs().max())
        torch.testing.assert_close(mine.double(), their, rtol=1e-5, atol=1e-6 * size)
    assert (shapes.count((N, K)) == 0) == whole


def test_heads_and_channels_are_never_whole():
    model = tiny_model("llama", torch.float32)
    gates = gp.attach(model, gp.GateConfig(noise=0.0))
    gates.close("model.layers.0.mlp:channels", range(20))
    for layer in model.model.layers:
        linear = layer.mlp.down_proj
        assert full_width_limit(linear.site, (48, 40), 20, None) == 0


def test_explain_says_up_to_how_many_tokens():
    model = tiny_model("bert", torch.float32)
    gates = gp.attach(model, gp.GateConfig(units=("rows", "columns"), noise=0.0))
    name = "bert.encoder.layer.0.attention.self.query"
    gates.close(f"{name}:columns", range(20))
    gates.close("bert.encoder.layer.1.attention.self.query:columns", [0])
    rows = {row.module: row for row in gp.explain(model).rows}
    limit = int(tokens_at_full_width((48, 48), (48, 28)))
    assert (rows[name].few, rows[name].many) == ("full width", "folded")
    assert rows[name].why == f"on cpu; full width up to {limit} tokens"
    row = rows[name.replace("0", "1")]
    assert (row.few, row.many, row.why) == ("full width", "full width", "on cpu")


def trained_step(closed: float, frozen: bool):
    """(ours, masked): a step of FineGates on a small encoder each, a part of its units closed."""
    model = tiny_model(
        "bert", torch.float32, hidden_size=128, intermediate_size=512, num_attention_heads=4
    ).train()
    FineGates(noise=0.0).start(model, 4)
    gates = gp.gates_of(model)
    generator = torch.Generator().manual_seed(0)
    for name, gate in gates.items():
        order = torch.randperm(gate.size, generator=generator)
        gates.close(name, order[: round(closed * gate.size)])
        with torch.no_grad():
            gates.logits[gate.start : gate.start + gate.size] *= 0.4
    if frozen:
        gates.freeze()
    dense = copy.deepcopy(model)
    gp.detach(dense)
    masked, _ = mask_rows_columns(dense, gates)
    ids = token_ids(2, 32)
    return (
        lambda: model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward(),
        lambda: masked(lambda m: m(input_ids=ids, labels=torch.tensor([0, 1])).loss).backward(),
    )


def saved_bytes(step) -> int:
    """Bytes of all storages, once each, that a forward saves for its backward."""
    found = {}
    own = lambda t: found.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage())  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (own(t), t)[1], lambda t: t):
        step()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("closed", [0.0, 0.23, 0.4])
def test_a_step_holds_no_more_than_a_masked_one(closed, frozen):
    ours, masked = trained_step(closed, frozen)
    assert saved_bytes(ours) <= saved_bytes(masked)
    largest = 4 * 128 * 512  # bytes of a weight: what is packed lives for one product
    assert peak_bytes(ours, "cpu") <= peak_bytes(masked, "cpu") + largest
