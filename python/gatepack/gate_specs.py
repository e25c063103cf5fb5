"""Stage 1, gates: what a gate is of, and what a table says of all."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class GateSpec:
    """What one gate vector multiplies and what its units cost.

    size: units G. lanes: width of a unit on the gated axis (head_dim for heads, 1 for channels).
    unit_cost: parameters that go with one unit. shared_size units share shared_cost parameters,
    which go when all of them are closed (the query heads of one key/value head). kind: "heads",
    "channels", "rows" or "columns". attached: (size, shared_size) before units were removed
    (gatepack.remove_closed), None while all are there.
    """

    kind: str
    size: int
    lanes: int = 1
    unit_cost: int = 1
    shared_size: int = 1
    shared_cost: int = 0
    attached: tuple[int, int] | None = None

    @property
    def whole(self) -> tuple[int, int]:
        """(size, shared_size) when gates were attached."""
        return self.attached or (self.size, self.shared_size)

    def cut(self, mask: torch.Tensor) -> "GateSpec":
        """The spec of the units of mask bool [size], equally many of each block that has any."""
        blocks = mask.reshape(-1, self.shared_size).sum(1)
        size, shared = int(blocks.sum()), int(blocks.max())
        return replace(self, size=size, shared_size=shared, attached=self.whole)


@dataclass(frozen=True)
class GateSummary:
    """rows: (name, kind, size, open, fractional) per gate; fractions over all gates, kept_fraction
    of what target_of counts."""

    rows: tuple[tuple[str, str, int, int, int], ...]
    open_fraction: float
    kept_fraction: float
    target_of: str = "params"

    def __str__(self):
        width = max(len(row[0]) for row in self.rows)
        lines = [f"{'gate':<{width}}  {'kind':<8}  {'size':>6}  {'open':>6}  {'fractional':>10}"]
        lines += [f"{n:<{width}}  {k:<8}  {s:>6}  {o:>6}  {f:>10}" for n, k, s, o, f in self.rows]
        kept = {"params": "parameters", "flops": "FLOPs"}.get(self.target_of, self.target_of)
        lines.append(f"open units {self.open_fraction:.1%}, kept {kept} {self.kept_fraction:.1%}")
        return "\n".join(lines)
