"""Stage 1, gates: one sample of all gates of a model, their values and which units are open."""

import functools
import itertools
from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gatepack.gates import Gate, GateSet


class Open:
    """The open set of one gate in one sample: which units run, and their values.

    units: sorted unique int64 [n], or None when all run. values: fp32 [n], differentiable.
    """

    def __init__(self, gate: "Gate", values: torch.Tensor, units: torch.Tensor | None):
        self.gate = gate
        self.units = units
        self.values = values

    @property
    def count(self) -> int:
        return self.gate.size if self.units is None else self.units.numel()

    @functools.cached_property
    def ones(self) -> bool:
        """Whether every running gate is exactly 1, so that multiplying by it can be left out where
        no gradient is wanted."""
        return bool((self.values.detach() == 1).all())

    @functools.cached_property
    def lanes(self) -> torch.Tensor | None:
        """Lane indices of the running units, int64 [n * lanes], or None for all."""
        return None if self.units is None else lane_indices(self.units, self.gate.lanes)

    @functools.cached_property
    def _running_in_blocks(self) -> Counter:
        """Key/value head -> how many of its units run, of those with any, in order."""
        return Counter(unit // self.gate.spec.shared_size for unit in self.units.tolist())

    @functools.cached_property
    def shared(self) -> torch.Tensor | None:
        """Sorted indices of the key/value heads with a running unit, int64, or None for all."""
        if self.units is None:
            return None
        blocks = list(self._running_in_blocks)
        if len(blocks) * self.gate.spec.shared_size == self.gate.size:
            return None
        return torch.tensor(blocks, dtype=torch.int64, device=self.units.device)

    @functools.cached_property
    def shared_lanes(self) -> torch.Tensor | None:
        """Lane indices of the shared blocks on their own axis, int64, or None for all."""
        return None if self.shared is None else lane_indices(self.shared, self.gate.lanes)

    @property
    def shared_count(self) -> int:
        spec = self.gate.spec
        return spec.size // spec.shared_size if self.shared is None else self.shared.numel()

    @functools.cached_property
    def shared_of_unit(self) -> torch.Tensor | None:
        """Per running unit the position of its block among the running blocks, int64 [n].

        None when the blocks keep equally many units, so that the usual repetition by groups is
        right.
        """
        if self.units is None:
            return None
        counts = list(self._running_in_blocks.values())
        if len(set(counts)) == 1:
            return None
        position = [block for block, count in enumerate(counts) for _ in range(count)]
        return torch.tensor(position, dtype=torch.int64, device=self.units.device)


class Sample:
    """Values and open sets of all gates, drawn at one time.

    number: of the draw whose noise is in it, on the device where kernels draw; None without noise.
    Open sets have their size on the host, which has to wait for a GPU to count: that is done for
    all gates at once, when the first of them is asked for.
    """

    def __init__(
        self, gates: "GateSet", key: tuple, flat: torch.Tensor, number: int | torch.Tensor | None
    ):
        self.key = key
        self.flat = flat
        self.number = number
        self.gates = list(gates.gates.values())
        self._offsets = gates.offsets
        self._shared_running: dict[str, torch.Tensor] = {}

    @functools.cached_property
    def values(self) -> dict[str, torch.Tensor]:
        with self._recording():
            parts = torch.split(self.flat, [gate.size for gate in self.gates])
        return {gate.name: part for gate, part in zip(self.gates, parts, strict=True)}

    def open(self, gate: "Gate") -> Open:
        return self._open[gate.name]

    def open_fraction(self, gate: "Gate") -> float:
        return self._open_places[1][gate.name] / gate.size

    def _recording(self):
        """Gradients on where the sample has any, also if it is first read without them."""
        return torch.set_grad_enabled(self.flat.requires_grad)

    @functools.cached_property
    def _open_places(self) -> tuple[torch.Tensor, dict[str, int]]:
        """Where units are open, int64, and how many of each gate."""
        index = (self.flat.detach() > 0).nonzero().squeeze(1)
        ends = torch.searchsorted(index, self._offsets().long()).tolist()
        names = [gate.name for gate in self.gates]
        counts = [end - start for start, end in itertools.pairwise(ends)]
        return index, dict(zip(names, counts, strict=True))

    @functools.cached_property
    def _open(self) -> dict[str, Open]:
        index, counts = self._open_places
        sizes = list(counts.values())
        # One gather for all gates: each of its own would be a step of autograd.
        with self._recording():
            values = torch.split(self.flat.index_select(0, index), sizes)
        found = {}
        for gate, units, part in zip(self.gates, torch.split(index, sizes), values, strict=True):
            n_open = counts[gate.name]
            if n_open == 0 and gate.kind == "heads":
                # Attention has no form without heads: one runs with value 0 and adds nothing.
                first = torch.zeros(1, dtype=torch.int64, device=index.device)
                found[gate.name] = Open(gate, self.values[gate.name][:1], first)
                continue
            units = None if n_open == gate.size else units - gate.start
            found[gate.name] = Open(gate, part, units)
        return found

    @functools.cached_property
    def _running(self) -> torch.Tensor:
        return (self.flat.detach() > 0).to(self.flat.dtype)

    def running(self, gate: "Gate") -> torch.Tensor:
        return self._running[gate.start : gate.start + gate.size]

    def shared_running(self, gate: "Gate") -> torch.Tensor:
        if gate.name not in self._shared_running:
            blocks = self.running(gate).reshape(-1, gate.spec.shared_size)
            self._shared_running[gate.name] = blocks.amax(1)
        return self._shared_running[gate.name]


class ValueGradients:
    """total: dL/dz, fp32 [N], of all backward passes since the last forward that has gradients,
    summed over the samples that they reach; None before the first."""

    def __init__(self):
        self.total: torch.Tensor | None = None
        self._begins = False

    def watch(self, flat: torch.Tensor) -> None:
        """Adds up what backward passes bring to the values of a new sample [N]."""
        # Not retain_grad: a sample that another forward has followed is not there any more.
        flat.register_hook(self._add)
        self._begins = True

    def _add(self, grad: torch.Tensor) -> None:
        begins, self._begins = self._begins or self.total is None, False
        self.total = grad.detach().clone() if begins else self.total + grad.detach()


def lane_indices(units: torch.Tensor, lanes: int) -> torch.Tensor:
    """Units [n] -> the lanes they cover, int64 [n * lanes]."""
    if lanes == 1:
        return units
    return (units[:, None] * lanes + torch.arange(lanes, device=units.device)).reshape(-1)
