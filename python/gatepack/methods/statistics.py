"""Stage 4, methods: running statistics by channel of what flows through a model's linears."""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from gatepack.calibration import Batch, inputs_of, require_batches, token_mask
from gatepack.gates import GateSet
from gatepack.importance import gated_inputs
from gatepack.layers import hf_model
from gatepack.paths import has_kernels
from gatepack.quality import evaluating, input_device

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Sums(NamedTuple):
    """Over tokens, of v = x - shift: count [], and fp64 [C] sum v, sum |v|, sum v^2 and
    deviation = sum (v - mean)^2, all on the device of x."""

    count: torch.Tensor
    sum: torch.Tensor
    abs_sum: torch.Tensor
    square_sum: torch.Tensor
    deviation: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """sum / count [C]; 0 without tokens."""
        return self.sum / self.count.clamp(min=1)

    @property
    def mean_abs(self) -> torch.Tensor:
        """abs_sum / count [C]; 0 without tokens."""
        return self.abs_sum / self.count.clamp(min=1)

    @property
    def variance(self) -> torch.Tensor:
        """deviation / count [C], of the tokens as the whole population; 0 without tokens."""
        return self.deviation / self.count.clamp(min=1)

    def merge(self, other: "Sums") -> "Sums":
        """Of both sets of tokens together (Chan et al. 1979): the variance is Welford's."""
        count = self.count + other.count
        weight = self.count / count.clamp(min=1) * other.count
        return Sums(
            count,
            self.sum + other.sum,
            self.abs_sum + other.abs_sum,
            self.square_sum + other.square_sum,
            self.deviation + other.deviation + weight * (self.mean - other.mean).square(),
        )


def sums_of(
    x: torch.Tensor, token_mask: torch.Tensor | None = None, shift: torch.Tensor | None = None
) -> Sums:
    """Sums of x [*, C] over the tokens that token_mask, bool of as many elements, keeps.

    One Triton pass where kernels run, else plain torch; neither waits for the device.
    """
    x = x.detach()
    if token_mask is not None:
        token_mask = token_mask.reshape(x.shape[:-1])
    if x.dtype in _KERNEL_DTYPES and has_kernels(x.device):
        from gatepack.kernels import channel_stats_fn

        stats = channel_stats_fn(x, token_mask, None if shift is None else shift.float())
        parts = (stats.count, stats.sum, stats.abs_sum, stats.square_sum, stats.deviation)
        return Sums(*(part.double() for part in parts))
    v = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    keep = torch.ones(len(v), 1, dtype=torch.bool, device=v.device)
    if token_mask is not None:
        keep = token_mask.reshape(-1, 1)
    v = torch.where(keep, v if shift is None else v - shift, 0.0)
    count = keep.sum().double()
    total = v.sum(0, dtype=torch.float64)
    mean = (total / count.clamp(min=1)).to(v.dtype)
    # The rounding of the mean is taken back, as in the corrected two-pass algorithm.
    rest = torch.where(keep, v - mean, 0.0)
    slip = rest.sum(0, dtype=torch.float64)
    deviation = rest.square().sum(0, dtype=torch.float64) - slip.square() / count.clamp(min=1)
    return Sums(
        count,
        total,
        v.abs().sum(0, dtype=torch.float64),
        v.square().sum(0, dtype=torch.float64),
        deviation.clamp(min=0),
    )


class Watch:
    """Sums by key of what hooks see, without padding; token_mask is that of the present batch."""

    def __init__(self):
        self.sums: dict[Hashable, Sums] = {}
        self.token_mask: torch.Tensor | None = None
        self._handles: list = []

    def add(self, key: Hashable, x: torch.Tensor, shift: torch.Tensor | None = None) -> None:
        found = sums_of(x, self.token_mask, shift)
        self.sums[key] = self.sums[key].merge(found) if key in self.sums else found

    def on_forward(self, module: nn.Module, hook) -> None:
        """hook(x, y) after each forward of module, x its first argument."""
        self._handles.append(
            module.register_forward_hook(lambda module, args, output: hook(args[0], output))
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def watching() -> Iterator[Watch]:
    """A Watch whose hooks are taken off at the end."""
    watch = Watch()
    try:
        yield watch
    finally:
        watch.remove()


@torch.no_grad()
def run_batches(model: nn.Module, batches: Iterable[Batch], watch: Watch, title: str) -> None:
    """Runs the model's trunk in eval mode over batches, so that the hooks of watch see them.

    batches: token ids [B, S], or what the model takes by name; labels are ignored, and tokens
    that attention_mask leaves out do not count. Raises ValueError without a batch, without a token
    that counts, and where a hook saw nothing.
    """
    trunk, device = hf_model(model).base_model, input_device(model)
    done = 0
    with evaluating(model):
        for batch in tqdm(batches, desc=title, unit="batch", leave=False, disable=None):
            inputs = inputs_of(batch, device)
            inputs.pop("labels", None)
            watch.token_mask = token_mask(inputs)
            trunk(**inputs, use_cache=False)
            done += 1
    require_batches(done)
    if not watch.sums:
        raise ValueError(f"{type(trunk).__name__} ran, but none of the linears that were watched")
    if int(next(iter(watch.sums.values())).count) == 0:
        raise ValueError("batches hold no token that attention_mask keeps")


def gate_input_sums(gates: GateSet, batches: Iterable[Batch]) -> dict[str, Sums]:
    """Gate name -> Sums [K] of the input of the out or down linear that its units feed."""
    with watching() as watch:
        for gate, linear in gated_inputs(gates):
            watch.on_forward(linear, lambda x, y, name=gate.name: watch.add(name, x))
        run_batches(gates.attachment.root, batches, watch, "calibrating")
    return {name: watch.sums[name] for name in gates}
