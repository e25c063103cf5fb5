"""Stage 3, modules: where gates act on a linear."""

import math
from dataclasses import dataclass

import torch

from gatepack.gates import Gate


@dataclass(frozen=True)
class RowBlock:
    """Rows of a linear that belong to a gate's units, or to their shared blocks, from offset on."""

    offset: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Site:
    """How gates act on one linear.

    in_gate: multiplies the input's lanes. out_gate: multiplies the output's rows. rows_gate: closed
    units of it take their rows (row_blocks) with them, with no multiplication. compact_in: x holds
    open lanes only where its width says so. compact_out: y holds open rows only, or all of them at
    full width, where what reads them gates them; else closed rows are 0.
    """

    in_gate: Gate | None = None
    out_gate: Gate | None = None
    rows_gate: Gate | None = None
    row_blocks: tuple[RowBlock, ...] = (RowBlock(),)
    compact_in: bool = False
    compact_out: bool = False

    @property
    def gate(self) -> Gate | None:
        """The gate whose path the linear takes."""
        return self.in_gate or self.out_gate or self.rows_gate

    def kept(self, device: torch.device, noise: bool = True) -> float:
        """Open fraction of the weight in the current sample, or without noise, on a CPU. Elsewhere
        1: paths do not go by it there, and counting would wait for the device."""
        if device.type != "cpu":
            return 1.0
        sides = (self.in_gate, self.out_gate or self.rows_gate)
        # Linears that hand each other open units only must agree: the side that they share counts.
        if self.compact_in or self.compact_out:
            sides = (sides[0] if self.compact_in else sides[1],)
        return math.prod(gate.open_fraction(noise) for gate in sides if gate is not None)
