"""Stage 1, gates: one sample of all gates of a model, their values and which units are open."""

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from gatepack.gates import Gate, GateSet


class Open:
    """The open set of one gate in one sample: which units run, and their values.

    units: sorted unique int64 [n], or None when all run. values: fp32 [n], differentiable. ones:
    every running gate is exactly 1, so that multiplying by it can be left out where no gradient is
    wanted.
    """

    def __init__(self, gate: "Gate", values: torch.Tensor, units: torch.Tensor | None, ones: bool):
        self.gate = gate
        self.units = units
        self.values = values
        self.ones = ones

    @property
    def count(self) -> int:
        return self.gate.size if self.units is None else self.units.numel()

    @functools.cached_property
    def lanes(self) -> torch.Tensor | None:
        """Lane indices of the running units, int64 [n * lanes], or None for all."""
        return None if self.units is None else lane_indices(self.units, self.gate.lanes)

    @functools.cached_property
    def shared(self) -> torch.Tensor | None:
        """Sorted indices of the key/value heads with a running unit, int64, or None for all."""
        if self.units is None:
            return None
        blocks = torch.unique(self.units // self.gate.spec.shared_size)
        return None if blocks.numel() * self.gate.spec.shared_size == self.gate.size else blocks

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
        blocks = self.units // self.gate.spec.shared_size
        _, position, counts = torch.unique(blocks, return_inverse=True, return_counts=True)
        return None if bool((counts == counts[0]).all()) else position


class Sample:
    """Values and open sets of all gates, drawn at one time.

    Open sets have their size on the host, which has to wait for a GPU to count: that is done for
    all gates at once, when the first of them is asked for.
    """

    def __init__(self, gates: "GateSet", key: tuple, flat: torch.Tensor):
        self.key = key
        self.flat = flat
        self.gates = list(gates.gates.values())
        parts = torch.split(flat, [gate.size for gate in self.gates])
        self.values = dict(zip(gates.gates, parts, strict=True))
        self._segments = gates.segments
        self._shared_running: dict[str, torch.Tensor] = {}

    def open(self, gate: "Gate") -> Open:
        return self._open[gate.name]

    def open_fraction(self, gate: "Gate") -> float:
        return self._counts[gate.name][0] / gate.size

    @functools.cached_property
    def _counts(self) -> dict[str, tuple[int, int]]:
        """How many units of each gate are open, and how many of those are exactly 1."""
        flat = self.flat.detach()
        is_open, is_one = flat > 0, flat == 1
        names = [gate.name for gate in self.gates]
        if flat.device.type == "cpu":
            count = np.count_nonzero
            places = [slice(gate.start, gate.start + gate.size) for gate in self.gates]
            found = [[count(mask[i]) for i in places] for mask in (is_open.numpy(), is_one.numpy())]
        else:
            # Two counts per gate cross to the host in one copy.
            segments = self._segments()
            counts = torch.zeros(2, len(self.gates), dtype=torch.int64, device=flat.device)
            counts[0].index_add_(0, segments, is_open.long())
            counts[1].index_add_(0, segments, is_one.long())
            found = counts.tolist()
        return dict(zip(names, zip(*found, strict=True), strict=True))

    @functools.cached_property
    def _open(self) -> dict[str, Open]:
        index = (self.flat.detach() > 0).nonzero().squeeze(1)
        sizes = [n_open for n_open, _ in self._counts.values()]
        # One gather for all gates: each of its own would be a step of autograd.
        values = torch.split(self.flat.index_select(0, index), sizes)
        found = {}
        for gate, units, part in zip(self.gates, torch.split(index, sizes), values, strict=True):
            n_open, n_one = self._counts[gate.name]
            if n_open == 0 and gate.kind == "heads":
                # Attention has no form without heads: one runs with value 0 and adds nothing.
                first = torch.zeros(1, dtype=torch.int64, device=index.device)
                found[gate.name] = Open(gate, self.values[gate.name][:1], first, False)
                continue
            units = None if n_open == gate.size else units - gate.start
            found[gate.name] = Open(gate, part, units, n_one == n_open)
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


def lane_indices(units: torch.Tensor, lanes: int) -> torch.Tensor:
    """Units [n] -> the lanes they cover, int64 [n * lanes]."""
    if lanes == 1:
        return units
    return (units[:, None] * lanes + torch.arange(lanes, device=units.device)).reshape(-1)
