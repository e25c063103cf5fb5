"""Stage 3, modules: where gates act on a linear."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gatepack.families import Family
from gatepack.gates import Gate
from gatepack.samples import Open, lane_indices


@dataclass(frozen=True)
class RowBlock:
    """Rows of a linear that belong to a gate's units, or to their shared blocks, from offset on.

    parts: how often a unit has its lanes, one part after the other.
    """

    offset: int = 0
    shared: bool = False
    parts: int = 1

    def rows(self, gate: Gate) -> int:
        """How many rows these are."""
        units = gate.size // gate.spec.shared_size if self.shared else gate.size
        return units * gate.lanes * self.parts


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
            yield (
                family.qkv,
                Site(rows_gate=heads, row_blocks=_fused_blocks(family, heads), compact_out=True),
            )
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


def _fused_blocks(family: Family, heads: Gate) -> tuple[RowBlock, ...]:
    """Where in the fused linear the rows of q, k and v are."""
    if family.by_head:
        return (RowBlock(parts=3),)
    queries, shared = RowBlock(), heads.spec.shared_size > 1
    keys = RowBlock(queries.rows(heads), shared)
    return queries, keys, RowBlock(keys.offset + keys.rows(heads), shared)


@dataclass(frozen=True)
class OpenRows:
    """Open rows of one call (None: all), and how shared blocks spread over units (None: evenly)."""

    index: torch.Tensor | None
    spread: torch.Tensor | None = None


def open_rows(site: Site, out_open: Open | None) -> OpenRows:
    """The rows of a site that run, out_open being the open set of its out_gate."""
    if out_open is not None:
        return OpenRows(out_open.lanes)
    if site.rows_gate is None:
        return OpenRows(None)
    gate, spread = site.rows_gate, _spread(site)
    current = gate.open()
    found = [_block_lanes(current, block) for block in site.row_blocks]
    if all(lanes is None for lanes in found):
        return OpenRows(None, spread)
    parts = []
    for block, lanes in zip(site.row_blocks, found, strict=True):
        if lanes is None:
            lanes = torch.arange(block.rows(gate), device=current.values.device)
        parts.append(lanes + block.offset if block.offset else lanes)
    return OpenRows(parts[0] if len(parts) == 1 else torch.cat(parts), spread)


def _block_lanes(current: Open, block: RowBlock) -> torch.Tensor | None:
    """Rows of a block's open units, from its offset on, or None for all."""
    if block.parts == 1:
        return current.shared_lanes if block.shared else current.lanes
    units = current.shared if block.shared else current.units
    return None if units is None else lane_indices(units, current.gate.lanes * block.parts)


def _spread(site: Site) -> torch.Tensor | None:
    """Which of the open units or shared blocks, in the order of their rows, each unit takes."""
    current = site.rows_gate.open()
    of_unit = current.shared_of_unit
    if of_unit is None or not any(block.shared for block in site.row_blocks):
        return None
    if len(site.row_blocks) == 1:
        return of_unit
    parts, start = [], 0
    for block in site.row_blocks:
        own = of_unit if block.shared else torch.arange(current.count, device=of_unit.device)
        parts.append(own + start)
        start += current.shared_count if block.shared else current.count
    return torch.cat(parts)


def row_gate(site: Site) -> tuple[torch.Tensor | None, int]:
    """What multiplies the rows at full width, and lanes per unit: the out-gate's values, or 0 and 1
    for rows that go with the units of another gate."""
    if site.out_gate is not None:
        return site.out_gate.values(), site.out_gate.lanes
    if site.rows_gate is None:
        return None, 1
    gate = site.rows_gate
    parts = [gate.shared_running() if b.shared else gate.running() for b in site.row_blocks]
    parts = [
        part if block.parts == 1 else part.repeat_interleave(block.parts)
        for part, block in zip(parts, site.row_blocks, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts), gate.lanes
