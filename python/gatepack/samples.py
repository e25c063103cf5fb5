"""Stage 1, gates: one sample of all gates of a model, their values and which units are open."""

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gatepack.gates import Gate, GateSet


class Open:
    """The open set of one gate in one sample: which units run, and their values.

    units: sorted unique int64 [n], or None when all run. values: fp32 [n], differentiable. ones:
    every running gate is exactly 1, so that multiplying by it can be left out where no gradient is
    wanted. A head gate whose units are all closed keeps one unit with value 0: attention has no
    zero-head form, and 0 contributes nothing.
    """

    def __init__(self, gate: "Gate", values: torch.Tensor, units: torch.Tensor | None, ones: bool):
        if units is not None and units.numel() == 0 and gate.kind == "heads":
            units = torch.zeros(1, dtype=torch.int64, device=values.device)
            ones = False
        self.gate = gate
        self.units = units
        self.values = values if units is None else values.index_select(0, units)
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
        self._shared_running: dict[str, torch.Tensor] = {}

    def open(self, gate: "Gate") -> Open:
        return self._open[gate.name]

    @functools.cached_property
    def _open(self) -> dict[str, Open]:
        flat = self.flat.detach()
        is_open = flat > 0
        # Two counts per gate cross to the host in one copy.
        sizes = torch.tensor([gate.size for gate in self.gates], device=flat.device)
        segments = torch.repeat_interleave(torch.arange(len(sizes), device=flat.device), sizes)
        counts = torch.zeros(2, len(sizes), dtype=torch.int64, device=flat.device)
        counts[0].index_add_(0, segments, is_open.long())
        counts[1].index_add_(0, segments, (is_open & (flat == 1)).long())
        open_counts, one_counts = counts.tolist()
        indices = torch.split(is_open.nonzero().squeeze(1), open_counts)
        found = {}
        for gate, index, n_open, n_one in zip(
            self.gates, indices, open_counts, one_counts, strict=True
        ):
            units = None if n_open == gate.size else index - gate.start
            found[gate.name] = Open(gate, self.values[gate.name], units, n_one == n_open)
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
