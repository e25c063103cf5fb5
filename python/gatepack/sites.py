"""Stage 3, modules: where gates act on a linear."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gatepack.families import Family
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


def gated_sites(
    family: Family, heads: Gate | None, channels: Gate | None
) -> Iterator[tuple[str, Site]]:
    """(path in the layer, Site) of every linear that a layer's gates act on."""
    if heads is not None:
        if family.qkv:
            lanes = heads.size * heads.lanes
            blocks = tuple(RowBlock(offset) for offset in (0, lanes, 2 * lanes))
            yield family.qkv, Site(rows_gate=heads, row_blocks=blocks, compact_out=True)
        else:
            yield family.q, Site(rows_gate=heads, compact_out=True)
            for path in family.kv:
                yield (
                    path,
                    Site(rows_gate=heads, row_blocks=(RowBlock(shared=True),), compact_out=True),
                )
        yield family.out, Site(in_gate=heads, compact_in=True)
    if channels is not None:
        blocks = tuple(RowBlock(offset) for offset in family.branch_offsets(channels.size))
        for path in family.up:
            yield path, Site(rows_gate=channels, row_blocks=blocks, compact_out=True)
        yield family.down, Site(in_gate=channels, compact_in=True)
