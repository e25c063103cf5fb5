"""What the tests of several kernels share: kinds of gates, and running an op with its gradients."""

import contextlib

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATES = ["open", "closed", "one", "mixed", "fractional"]


def ids(value):
    return str(value).removeprefix("torch.")


def make_gate(kind, size, seed=0):
    """fp32 gate [size]: open = all 1, closed = all 0, one = a single 1, mixed = 0 or 1,
    fractional = 0 for two in five, else in (0, 1]."""
    random = torch.Generator().manual_seed(seed)
    z = torch.ones(size)
    if kind == "closed":
        z.zero_()
    elif kind == "one":
        z.zero_()[size // 2] = 1.0
    elif kind in ("mixed", "fractional"):
        if kind == "fractional":
            z = 1.0 - torch.rand(size, generator=random)
        z[torch.rand(size, generator=random) < 0.4] = 0.0
    return z


def to(inputs, device):
    return {name: t.to(device) for name, t in inputs.items()}


def run(fn, inputs, dy, **settings):
    """{"y": ..., "dx": ..., "dw": ...} of fn, with the upstream gradient dy."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = fn(**leaves, **settings)
    grads = torch.autograd.grad(y, leaves.values(), dy.to(y))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


@contextlib.contextmanager
def no_host_sync():
    """On a GPU, anything inside that makes the host wait raises."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def warm_up(step, runs):
    """Runs of step() on a stream of their own, as a capture wants before it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(runs):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def captured(step):
    """Results of step() from a CUDA graph replay, after two runs outside of it to warm up."""
    warm_up(step, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    return results
