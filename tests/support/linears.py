"""Inputs of gated_linear, and one check of its outputs and gradients against fp64."""

import torch
from ops import make_gate, run

from gatepack.kernels import GatedLinearConfig, Tile, gated_linear_fn, gated_linear_ref
from gatepack.testing import assert_close_to_fp64, poisoned_empty

T, N, K, RANK = 5, 40, 48, 3
SMALL_TILES = GatedLinearConfig(*[Tile(16, 16, 16, num_warps=1, num_stages=1, group_m=2)] * 3)


def make_inputs(
    dtype,
    t=T,
    n=N,
    k=K,
    rank=RANK,
    z_in="fractional",
    z_out="fractional",
    group_in=1,
    group_out=1,
    seed=0,
):
    """CPU tensors for gated_linear_fn; z_in and z_out name a kind of gate, or None."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    inputs = {"x": normal(t, k), "w": normal(n, k) / k**0.5, "bias": normal(n)}
    if z_in is not None:
        inputs["z_in"] = make_gate(z_in, k // group_in, seed + 1)
    if z_out is not None:
        inputs["z_out"] = make_gate(z_out, n // group_out, seed + 2)
    if rank:
        inputs["lora_a"], inputs["lora_b"] = normal(rank, k) / k**0.5, normal(n, rank)
    return inputs


def check(inputs, device, dy=None, **settings):
    """Forward and every gradient, from poisoned memory, against fp64 and torch's own error."""
    inputs = {name: t.to(device) for name, t in inputs.items()}
    if dy is None:
        random = torch.Generator().manual_seed(7)
        shape = (*inputs["x"].shape[:-1], inputs["w"].shape[0])
        dy = torch.randn(*shape, generator=random).to(inputs["x"].dtype)
    dy = dy.to(device)
    settings = {"scale": 0.7, **settings}
    config = settings.pop("config", None)
    exact = {k: t.double() for k, t in inputs.items()}
    truth = run(gated_linear_ref, exact, dy, **settings)
    theirs = run(gated_linear_ref, inputs, dy, **settings)
    with poisoned_empty():
        ours = run(gated_linear_fn, inputs, dy, config=config, **settings)
    for name, got in ours.items():
        factor = 2 if name == "y" else 3
        terms = summed_terms(name, exact, dy.double(), **settings)
        dtype = inputs["x"].dtype
        assert_close_to_fp64(name, got, theirs[name], truth[name], factor, dtype, terms)
    if settings.get("form") != "masked":
        check_closed_lanes_are_zero(inputs, ours, settings)
    return ours


def summed_terms(name, inputs, dy, **settings):
    """The largest sum of |terms| behind one gate gradient: dy * h, or x * (W^T d + ...)."""
    if name not in ("dz_in", "dz_out") or inputs["x"].numel() * inputs["w"].numel() == 0:
        return 0.0
    z = inputs[name[1:]]
    inside = {k: t for k, t in inputs.items() if k != name[1:]}
    if settings.get("form") == "masked":
        inside = {k: t for k, t in inside.items() if k not in ("bias", "lora_a", "lora_b")}
    results = run(gated_linear_ref, inside, dy, **settings)
    terms = dy * results["y"] if name == "dz_out" else inputs["x"] * results["dx"]
    per_unit = terms.abs().reshape(-1, terms.shape[-1]).sum(0).view(len(z), -1).sum(1)
    counts = settings.get("closed_grad", "none") != "none"
    return torch.where((z != 0) | counts, per_unit, 0.0).max().item()


def check_closed_lanes_are_zero(inputs, results, settings):
    for gate, outputs in (("z_in", ("dx",)), ("z_out", ("y",))):
        if gate in inputs:
            group = settings.get(gate.replace("z_", "group_"), 1)
            closed = (inputs[gate] == 0).repeat_interleave(group)
            for name in outputs:
                assert (results[name][..., closed] == 0).all(), f"{name}: closed lanes are not 0"
