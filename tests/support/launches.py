"""Calls public ops through Triton's own launcher, for a chip that is not there; prints what failed.

    python tests/support/launches.py [op ...]        without TRITON_INTERPRET

Triton itself specialises each launch on what the op passes: integers that are 1 become constants,
multiples of 16 and aligned pointers are marked, None drops out. The kernel is then lowered to
Triton's IR, which shows what the interpreter does not, and nothing runs. Tensors are on the CPU.
"""

import inspect
import itertools
import sys

import torch
import triton.compiler
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gatepack import kernels

TARGET = GPUTarget("cuda", 90, 32)
# T, N, K of a linear, and what each op makes of them: every size that is 1 becomes a constant.
SIZES = ((1, 1, 1), (1, 48, 64), (40, 1, 64), (40, 48, 1), (33, 50, 72))
DTYPES = (torch.bfloat16, torch.float32)


class Chip:
    """The part of Triton's driver that a launch asks for."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Lowered:
    """A compiled kernel that does not run, but checks its grid."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, x, y, z, *arguments):
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, f"grid {x, y, z}"


def lower(source, target=None, options=None, **_):
    """In place of triton.compile: the first step of it."""
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    known = {
        "target": target,
        "options": options,
        "codegen_fns": backend.get_codegen_implementation(options),
        "module_map": backend.get_module_map(),
        "context": context,
    }
    wanted = inspect.signature(source.make_ir).parameters
    module = source.make_ir(**{name: known[name] for name in wanted})
    assert module.verify(), f"{source.fn.__name__}: invalid IR"
    return Lowered()


def prepare() -> None:
    """Makes launches end in lower() and kernels take CPU tensors for those of TARGET."""
    driver.set_active(Chip())
    triton.compiler.compile = lower
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{kernels.__name__}."):
            for key, stand_in in (
                ("arch_of", lambda _: "sm_90"),
                ("check_device", lambda *_: None),
            ):
                if hasattr(module, key):
                    setattr(module, key, stand_in)


def matrix(*sizes, dtype):
    return torch.zeros(*sizes, dtype=dtype, requires_grad=True)


def gate(size):
    return torch.ones(size, requires_grad=True)


def backward(outputs, *leaves):
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    leaves = [leaf for leaf in leaves if leaf is not None]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


def gated_linear(t, n, k, dtype):
    x, w, bias = (matrix(*size, dtype=dtype) for size in ((t, k), (n, k), (n,)))
    backward(kernels.gated_linear_fn(x, w), x, w)
    z_in, z_out, a, b = gate(k), gate(n), matrix(1, k, dtype=dtype), matrix(n, 1, dtype=dtype)
    gates = {"z_in": z_in, "z_out": z_out, "lora_a": a, "lora_b": b, "scale": 2.0}
    backward(kernels.gated_linear_fn(x, w, bias, **gates), x, w, bias, z_in, z_out, a, b)
    drawn = {"form": "masked", "dropout": 0.1, "seed": 1, "closed_grad": "sampled"}
    backward(kernels.gated_linear_fn(x, w, bias, **gates, **drawn), x, w, bias, z_in, z_out, a, b)
    head = {"z_in": gate(1), "group_in": k}
    backward(kernels.gated_linear_fn(x, w, **head), x, w, head["z_in"])


def mlp_arguments(t, n, k, dtype):
    x, w_a, w_u = (matrix(*size, dtype=dtype) for size in ((t, k), (n, k), (n, k)))
    low = matrix(1, k, dtype=dtype), matrix(n, 1, dtype=dtype), 2.0
    return x, w_a, w_u, gate(n), matrix(n, dtype=dtype), low


def gated_swiglu(t, n, k, dtype):
    x, w_a, w_u, z, bias, low = mlp_arguments(t, n, k, dtype)
    h = kernels.gated_swiglu_fn(x, w_a, w_u, z, bias_u=bias, lora_of_a=low)
    backward(h, x, w_a, w_u, z, bias, *low[:2])
    backward(kernels.gated_swiglu_fn(x, None, w_u, activation="gelu"), x, w_u)


def gated_mlp(t, n, k, dtype):
    x, w_a, w_u, z, bias, low = mlp_arguments(t, n, k, dtype)
    w_d = matrix(k, n, dtype=dtype)
    y = kernels.gated_mlp_fn(x, w_a, w_u, w_d, z, bias_a=bias, lora_of_u=low, capacity=1)
    backward(y, x, w_a, w_u, w_d, z, bias, *low[:2])
    backward(kernels.gated_mlp_fn(x, w_a, w_u, w_d, z, packed=True), x, w_a, w_u, w_d, z)


def gated_attention(t, n, k, dtype):
    groups, batch = (1, 1) if k == 1 else (3, 2)
    q = matrix(batch, t, 2 * groups, 16, dtype=dtype)
    keys, values = (matrix(batch, n, groups, lanes, dtype=dtype) for lanes in (16, 24))
    z, seen = gate(2 * groups), torch.ones(batch, n, dtype=torch.bool)
    attend = kernels.gated_attention_fn
    backward(attend(q, keys, values, z, key_mask=seen), q, keys, values, z)
    backward(attend(q, keys, values, window=1, scale=1.0), q, keys, values)
    one = matrix(t, 1, 16, dtype=dtype)
    starts = torch.zeros(2, dtype=torch.int32)
    varlen = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": False}
    backward(attend(one, one, one, gate(1), **varlen, max_seqlen_q=t, max_seqlen_k=t), one)


def sample_gates(t, n, k, dtype):
    offsets, draw = torch.tensor([0, n], dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    closed = torch.zeros(n, dtype=torch.bool)
    for estimator, seed in (("stg", t), ("hard_concrete", 2**40), ("gumbel", -1)):
        logits = gate(n)
        settings = {"max_segment": n, "estimator": estimator, "seed": seed, "sigma": 1.0}
        z, _ = kernels.sample_gates_fn(logits, offsets, draw=draw, closed=closed, **settings)
        backward(z, logits)
        z, _ = kernels.sample_gates_fn(logits, offsets, noise=False, **settings)
        backward(z, logits)


def gate_penalty(t, n, k, dtype):
    offsets, cost = torch.tensor([0, n], dtype=torch.int32), torch.ones(1)
    for shared in ((), (torch.ones(1, dtype=torch.int32), cost)):
        logits = gate(n)
        backward(kernels.gate_penalty_fn(logits, offsets, cost, *shared, max_segment=n), logits)


def open_set(t, n, k, dtype):
    kernels.open_set_fn(torch.ones(n))
    kernels.open_set_fn(torch.ones(2 * n)[::2])


def column_dot(t, n, k, dtype):
    a, b = matrix(t, n, dtype=dtype), matrix(t, n, dtype=torch.float32)
    backward(kernels.column_dot_fn(a, b), a, b)


def channel_stats(t, n, k, dtype):
    x = matrix(t, n, dtype=dtype)
    kernels.channel_stats_fn(x)
    kernels.channel_stats_fn(x, torch.ones(t, dtype=torch.bool), torch.zeros(n))


def scatter_add(t, n, k, dtype):
    residual, y, z = matrix(t, n, dtype=dtype), matrix(t, k, dtype=dtype), gate(n)
    opened = torch.zeros(n + 1, dtype=torch.int32)
    backward(kernels.scatter_add_fn(residual, y, opened, z), residual, y, z)
    backward(kernels.scatter_add_fn(residual, y, opened), residual, y)


def gather_norm(t, n, k, dtype):
    x, weight, z = matrix(t, n, dtype=dtype), matrix(n, dtype=dtype), gate(n)
    opened = torch.zeros(n + 1, dtype=torch.int32)
    for kind, gates in (("rms", [z, None]), ("layer", None)):
        used = {"open_sets": [opened] * 2, "capacities": [1, k], "gates": gates, "kind": kind}
        leaves = (x, weight, z) if gates else (x, weight)
        backward(kernels.gather_norm_fn(x, weight, **used), *leaves)


def packed_linear(t, n, k, dtype):
    x, w, bias = matrix(t, k, dtype=dtype), matrix(n, k, dtype=dtype), matrix(n, dtype=dtype)
    kernels.packed_linear_fn(x, w, bias)
    lanes = {"rows": torch.arange(n), "cols": torch.arange(k, dtype=torch.int32)}
    full = matrix(t, n + 1, dtype=dtype)
    kernels.packed_linear_fn(x, w, **lanes, out_features=n + 1, accumulate=full)


def linear_cross_entropy(t, n, k, dtype):
    x, w, bias = matrix(t, k, dtype=dtype), matrix(n, k, dtype=dtype), matrix(n, dtype=dtype)
    labels, remap = torch.zeros(t, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
    for ignored, settings in ((1, {"remap": remap, "chunk": 1}), (-100, {"reduction": "sum"})):
        made = kernels.linear_cross_entropy_fn(
            x, w, labels, bias=bias, ignore_index=ignored, **settings
        )
        backward(made.loss, x, w, bias)


OPS = (
    channel_stats, column_dot, gate_penalty, gated_attention, gated_linear, gated_mlp,
    gated_swiglu, gather_norm, linear_cross_entropy, open_set, packed_linear, sample_gates,
    scatter_add,
)  # fmt: skip


def main(names: list[str]) -> int:
    prepare()
    failed = 0
    for op, sizes, dtype in itertools.product(OPS, SIZES, DTYPES):
        if names and op.__name__ not in names:
            continue
        try:
            op(*sizes, dtype)
        except Exception as error:
            failed += 1
            print(f"{op.__name__} {sizes} {dtype}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
