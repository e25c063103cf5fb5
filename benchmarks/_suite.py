"""What a file in benchmarks/ops/ or benchmarks/levels/ holds, so that one runner serves all.

benchmarks/levels/<level>.py defines work(case); benchmarks/ops/<op>.py defines

    AOT        {case: call}: calls of the public op, forward and backward, on bf16 tensors from
               `bf16` below, at model shapes; benchmarks/aot.py compiles the launches they make
    work(case) the contenders that compute one Case, and what the least work for it costs, or None
               where the op is not meant for it (decode ops and many tokens, for one)

A new op or level is one more file.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from gatepack.testing import MODEL_SHAPES, ModelShape


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting to time: a model of MODEL_SHAPES, tokens T, the fraction of units open.

    Levels read three fields more. batch: sequences of `tokens` tokens. lora: rank of LoRA on every
    linear, 0 for none. layers: how many, where that is not the model's own number.
    """

    model: str
    tokens: int
    kept: float
    dtype: torch.dtype
    device: str
    batch: int = 1
    lora: int = 0
    layers: int | None = None

    @property
    def shape(self) -> ModelShape:
        return MODEL_SHAPES[self.model]

    def normal(self, *size: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
        """Gaussian values in the dtype and on the device of the case."""
        values = torch.randn(*size, device=self.device) * scale
        return values.to(self.dtype).requires_grad_(grad)

    def gate(self, units: int, grad: bool = True) -> torch.Tensor:
        """fp32 gate: round(kept * units) values in [0.5, 1), the others 0, at random places."""
        z = 0.5 + 0.5 * torch.rand(units, device=self.device)
        z[torch.randperm(units, device=self.device)[round(self.kept * units) :]] = 0.0
        return z.requires_grad_(grad)


@dataclasses.dataclass(frozen=True)
class Contender:
    """forward(*inputs) gives a tensor or a tuple of them; those of `inputs` that require a
    gradient get one. after: takes the gradients, such as an optimizer's step; timed, not checked.
    """

    forward: Callable
    inputs: tuple[torch.Tensor, ...]
    after: Callable[[tuple[torch.Tensor, ...]], None] | None = None

    def run(self, upstream: tuple[torch.Tensor, ...] | None = None) -> None:
        """What is timed."""
        results = self.step(upstream)
        if self.after is not None:
            leaves = sum(t.requires_grad for t in self.inputs)
            self.after(results[len(results) - leaves :])

    def step(self, upstream: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, ...]:
        """Outputs, then gradients. upstream: gradients of the floating-point outputs."""
        outputs = self.forward(*self.inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [t for t in self.inputs if t.requires_grad]
        if not leaves or upstream is None:
            return outputs
        differentiable = [y for y in outputs if y.requires_grad]
        return (*outputs, *torch.autograd.grad(differentiable, leaves, upstream))


@dataclasses.dataclass(frozen=True)
class Work:
    """The contenders of one case.

    contenders: "ours" (the kernel, or what a model calls without one), "masked" (eager torch,
    usually the op's _ref), and any of "folded" (pack, then vendor matmuls), "liger", "dense" (no
    gates) and "oracle" (the physically small model in torch). All but `differ` give the same
    results in the same order; `truth` gives them in higher precision. flops, bytes: the least that
    forward and backward over open units need, inputs and outputs moved once. graphs: contenders to
    time as CUDA graphs, None for all. compiles: contenders of which a torch.compile is timed, too.
    skipped: why a contender is absent.
    """

    contenders: dict[str, Contender]
    truth: Contender
    flops: float
    bytes: float
    differ: tuple[str, ...] = ("dense", "oracle")
    needs_gpu: tuple[str, ...] = ("ours", "liger")
    graphs: tuple[str, ...] | None = None
    compiles: tuple[str, ...] = ("masked",)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


def modules(names=None, folder: str = "ops") -> dict:
    """{name: module} of a folder of benchmarks; SystemExit names one that has no file there."""
    files = sorted((Path(__file__).parent / folder).glob("*.py"))
    known = [file.stem for file in files]
    unknown = set(names or ()) - set(known)
    if unknown:
        raise SystemExit(f"--{folder}: expected some of {known}, got {sorted(unknown)}")
    return {name: _load(folder, name) for name in names or known}


@functools.cache
def _load(folder: str, name: str):
    path = Path(__file__).parent / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarked_{folder}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bf16(*shape: int, grad: bool = True) -> torch.Tensor:
    """An uninitialised bf16 tensor for AOT cases: nothing is computed from it."""
    return torch.empty(*shape, dtype=torch.bfloat16).requires_grad_(grad)
