"""sample_gates: every head and channel gate of a model of 32 layers, drawn at once.

On a GPU ours is the kernel. On a CPU a model draws without one, and ours is that: a GateSet's draw
and its open sets.
"""

import torch
from _suite import Case, Contender, Work

from gatepack.config import GateConfig
from gatepack.estimators import STG, mix
from gatepack.gate_specs import GateSpec
from gatepack.gates import GateSet

LAYERS = 32


def _call(estimator):
    from gatepack.kernels import sample_gates_fn

    sizes = [32, 14336] * LAYERS
    logits = torch.empty(sum(sizes), requires_grad=True)
    offsets = torch.empty(len(sizes) + 1, dtype=torch.int32)
    draw = torch.empty(1, dtype=torch.int64)
    closed = torch.empty(logits.numel(), dtype=torch.bool)
    z, _ = sample_gates_fn(
        logits, offsets, max_segment=max(sizes), seed=3, draw=draw, estimator=estimator,
        closed=closed,
    )  # fmt: skip
    torch.autograd.grad(z, logits, torch.empty_like(z))


AOT = {
    "stg": lambda: _call("stg"),
    "hard_concrete": lambda: _call("hard_concrete"),
    "gumbel": lambda: _call("gumbel"),
}


def work(case: Case) -> Work:
    """Gates of 32 layers of the case's model; tokens and the open fraction play no part."""
    return kernel_work(case) if case.device.startswith("cuda") else model_work(case)


def model_work(case: Case) -> Work:
    """What a model calls where no kernel runs; masked: the same, gate by gate."""
    kinds = {"heads": case.shape.heads, "channels": case.shape.mlp}
    specs = {f"{i}:{k}": GateSpec(k, size) for i in range(LAYERS) for k, size in kinds.items()}
    gates = GateSet(GateConfig(noise=0.1), specs)
    with torch.no_grad():
        gates.logits.normal_()
    sizes = [gate.size for _, gate in gates.items()]
    generator = torch.Generator()

    def ours(logits):
        gates.draws.zero_()  # the same noise each time
        gates.sync_from_buffers()
        sample = gates.draw()
        for _, gate in gates.items():
            sample.open(gate)
        return sample.flat

    def masked(logits):
        generator.manual_seed(mix(gates.config.seed, 0))
        noise = gates.estimator.noise_like(gates.logits, generator).to(logits.dtype)
        found = []
        for part, eps in zip(logits.split(sizes), noise.split(sizes), strict=True):
            z = gates.estimator.values(part, eps)
            z.detach().nonzero()
            found.append(z)
        return torch.cat(found)

    return Work(
        contenders={
            "ours": Contender(ours, (gates.logits,)),
            "masked": Contender(masked, (gates.logits.detach().clone().requires_grad_(),)),
        },
        truth=Contender(masked, (gates.logits.detach().double().requires_grad_(),)),
        **least(gates.logits.numel()),
        needs_gpu=(),
    )


def kernel_work(case: Case) -> Work:
    """The kernel beside plain torch with the same noise, and beside model_work's way."""
    from gatepack.kernels import sample_gates_fn, sample_gates_ref

    sizes = [case.shape.heads, case.shape.mlp] * LAYERS
    device = case.device
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0).to(torch.int32)
    logits = torch.randn(sum(sizes), device=device, requires_grad=True)
    draw = torch.zeros((), dtype=torch.int64, device=device)
    segments = torch.arange(len(sizes), device=device).repeat_interleave(offsets.diff())
    generator = torch.Generator(device)
    estimator = STG(sigma=0.1)

    def ours(logits):
        return sample_gates_fn(logits, offsets, max_segment=max(sizes), draw=draw)[0]

    def masked(logits):
        return sample_gates_ref(logits, offsets, draw=draw)[0]

    def estimators(logits):
        """What gates.Sample computes: values, and open units through the host."""
        z = estimator.values(logits, estimator.noise_like(logits.detach(), generator))
        is_open = z.detach() > 0
        counts = torch.zeros(len(sizes), dtype=torch.int64, device=device)
        counts.index_add_(0, segments, is_open.long())
        torch.split(is_open.nonzero().squeeze(1), counts.tolist())
        return z

    return Work(
        contenders={
            "ours": Contender(ours, (logits,)),
            "masked": Contender(masked, (logits,)),
            "estimators": Contender(estimators, (logits,)),
        },
        truth=Contender(masked, (logits.detach().double().requires_grad_(),)),
        **least(logits.numel()),
        differ=("estimators",),
    )


def least(gates: int) -> dict[str, int]:
    """{"flops", "bytes"} of forward and backward."""
    return {"flops": 0, "bytes": gates * 4 * (3 + 3)}
