"""Stage 1, gates: how long layers of each shape take on a device, as a table and as a budget."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from gatepack.budget import Costs, all_units

TABLE_VERSION = 1
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one layer by what it keeps, as `gatepack bench --latency-table` measures them.

    device, dtype: what was timed (device_label). The dense layer has query_heads, kv_heads and
    channels. kv_counts, per_kv: heads of a layer with all its channels, so many key/value heads
    with so many query heads each; widths: channels of a layer with all its heads, all ascending and
    ending with the dense layer's. seconds: phase -> {"heads": [kv_counts][per_kv], "channels":
    [widths]} of one layer, for a prefill of batch_size x prompt_tokens or a step of decode after
    it; "decode" is None for encoders. environment: versions, threads. Between its points a table is
    linear. Raises ValueError naming field, value and what is allowed.
    """

    device: str
    dtype: str
    hidden_size: int
    head_dim: int
    query_heads: int
    kv_heads: int
    channels: int
    batch_size: int
    prompt_tokens: int
    kv_counts: tuple[int, ...]
    per_kv: tuple[int, ...]
    widths: tuple[int, ...]
    seconds: Mapping[str, Mapping | None]
    environment: Mapping
    version: int = TABLE_VERSION

    def __post_init__(self):
        if self.version != TABLE_VERSION:
            raise ValueError(
                f"version: expected {TABLE_VERSION}, got {self.version!r}; measure the table again"
            )
        per_kv = self.query_heads // self.kv_heads
        for field, last in (
            ("kv_counts", self.kv_heads), ("per_kv", per_kv), ("widths", self.channels)
        ):  # fmt: skip
            points = tuple(getattr(self, field))
            object.__setattr__(self, field, points)
            if not points or list(points) != sorted(set(points)) or points[-1] != last:
                raise ValueError(f"{field}: expected ascending counts up to {last}, got {points}")
        for phase in PHASES:
            found = self.seconds.get(phase)
            if found is None and phase == "decode":
                continue
            shapes = {
                "heads": (len(self.kv_counts), len(self.per_kv)),
                "channels": (len(self.widths),),
            }
            for part, shape in shapes.items():
                values = np.asarray((found or {}).get(part, ()), dtype=np.float64)
                if values.shape != shape or not (values > 0).all():
                    raise ValueError(
                        f"seconds[{phase!r}][{part!r}]: expected positive numbers {list(shape)}, "
                        f"got {list(values.shape)}"
                    )

    def to_dict(self) -> dict:
        """A dict of JSON types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping) -> "LatencyTable":
        """The inverse of to_dict."""
        try:
            return cls(**data)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"latency_table: not a table of this release: {error}") from error

    @classmethod
    def read(cls, path: str | os.PathLike) -> "LatencyTable":
        """The table in a JSON file; ValueError naming the file if it is none."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"latency_table: {path} cannot be read: {error}. Measure one with "
                "gatepack bench MODEL --latency-table FILE"
            ) from error

    def layer_seconds(self, phase: str, kv_heads: int, per_kv: int, channels: int) -> float:
        """Of a layer with all three, whose savings add up; seconds."""
        heads = self._heads(phase, np.float64(kv_heads), np.float64(per_kv))
        width = _interpolate(np.float64(channels), self.widths, self.seconds[phase]["channels"])
        return float(heads + width - self.dense_seconds(phase))

    def dense_seconds(self, phase: str) -> float:
        """Of the dense layer, which both parts of the table have: their mean."""
        found = self.seconds[phase]
        return (found["heads"][-1][-1] + found["channels"][-1]) / 2

    def _heads(self, phase: str, kv_heads, per_kv):
        rows = self.seconds[phase]["heads"]
        along = [_interpolate(per_kv, self.per_kv, row) for row in rows]
        return _interpolate(kv_heads, self.kv_counts, along)


def _interpolate(x, points, values):
    """Linear between points, and beyond them as at the end; x and values: numbers or alike."""
    if len(points) == 1:
        return values[0] + 0.0 * x
    place = np.clip(np.searchsorted(points, x), 1, len(points) - 1)
    left, right = points[place - 1], points[place]
    share = (x - left) / (right - left)
    return values[place - 1] * (1 - share) + values[place] * share


class LatencyCosts(Costs):
    """Seconds of a model's blocks in one phase, by a LatencyTable, as a budget.

    specs: name -> GateSpec. layers: how many the model has; of those, gates may act on some. What
    no gate removes is fixed. Heads count as they are packed: equally many per key/value head.
    removed: whether gates may have lost units, which then count as closed.
    Raises ValueError for a table of other layers or without the phase.
    """

    def __init__(
        self, table: LatencyTable, phase: str, specs: Mapping, layers: int, removed: bool = False
    ):
        if table.seconds.get(phase) is None:
            raise ValueError(f"latency_phase: expected one that the table has, got {phase!r}")
        self.table, self.phase = table, phase
        for name, spec in specs.items():
            _check_spec(table, name, spec, removed)
        self._least = {
            "heads": float(np.min(table.seconds[phase]["heads"])),
            "channels": float(np.min(table.seconds[phase]["channels"])),
        }
        total = layers * table.dense_seconds(phase)
        self.specs, self.total = dict(specs), total
        dense = {part: np.asarray(v).flat[-1] for part, v in table.seconds[phase].items()}
        self.fixed = total - sum(float(dense[s.kind]) - self._least[s.kind] for s in specs.values())
        self._tensors = {}

    def price(self, spec, mask: torch.Tensor) -> float:
        """Seconds that the open units of a gate add to its layer."""
        if spec.kind == "channels":
            values = self.table.seconds[self.phase]["channels"]
            found = _interpolate(float(mask.sum()), self.table.widths, values)
        else:
            counts = mask.reshape(-1, spec.shared_size).sum(1)
            kept = float((counts > 0).sum())
            found = self.table._heads(self.phase, kept, float(counts.max()))
        return float(found) - self._least[spec.kind]

    def unit_price(self, name: str) -> float:
        """Seconds of one unit of a gate, on average over them."""
        spec = self.specs[name]
        return self.price(spec, all_units(spec)) / spec.size

    def expected(self, probability: torch.Tensor) -> torch.Tensor:
        """Expected kept fraction, a differentiable scalar, without a host sync; fp32 [N].

        The table at the expected counts: channels, key/value heads with an open query head, and
        query heads for each of those.
        """
        kept = probability.new_tensor(self.fixed)
        for kind, units, points in self._on(probability.device):
            p = probability[units]  # [gates, blocks, units of a block]
            count = p.sum((1, 2))
            if kind == "channels":
                found = _on_line(count, *points)
            else:
                blocks = (1.0 - (1.0 - p).prod(2)).sum(1)
                kv_counts, per_kv, rows = points
                each = count / blocks.clamp(min=1e-6)
                along = torch.stack([_on_line(each, per_kv, row) for row in rows], 1)
                found = _on_line(blocks, kv_counts, along)
            kept = kept + (found - self._least[kind]).sum()
        return kept / self.total

    def _on(self, device: torch.device):
        """(kind, units of its gates [gates, blocks, size], points of the table) per kind."""
        if device not in self._tensors:
            units, start = {}, 0
            for spec in self.specs.values():
                index = torch.arange(start, start + spec.size, device=device)
                index = index.reshape(1, -1, spec.shared_size)
                shape = (spec.kind, *index.shape[1:])
                units.setdefault(shape, []).append(index)
                start += spec.size
            table, found = self.table, self.table.seconds[self.phase]

            def tensor(values):
                return torch.tensor(values, dtype=torch.float32, device=device)

            points = {
                "channels": (tensor(table.widths), tensor(found["channels"])),
                "heads": (tensor(table.kv_counts), tensor(table.per_kv), tensor(found["heads"])),
            }
            self._tensors[device] = [
                (kind, torch.cat(index), points[kind]) for (kind, *_), index in units.items()
            ]
        return self._tensors[device]

    def check_device(self, device: torch.device, wanted: str | None) -> None:
        """ValueError if the table is of another device than wanted, by default this one."""
        here = device_label(device) if wanted is None else wanted
        if here != self.table.device:
            raise ValueError(
                f"latency_table: measured on {self.table.device!r}, got {here!r}: measure one here "
                "with gatepack bench MODEL --latency-table FILE, or, to train here for that "
                f"device, set latency_device={self.table.device!r}"
            )


def _on_line(x: torch.Tensor, points: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """_interpolate for tensors: x [gates], points [n], values [n] or [gates, n]."""
    values = values.expand(len(x), -1)
    if len(points) == 1:
        return values[:, 0] + 0.0 * x
    place = torch.searchsorted(points, x.detach().contiguous()).clamp(1, len(points) - 1)
    left, right = points[place - 1], points[place]
    share = (x - left) / (right - left)
    low = values.gather(1, place[:, None] - 1)[:, 0]
    return low + (values.gather(1, place[:, None])[:, 0] - low) * share


def _check_spec(table: LatencyTable, name: str, spec, removed: bool) -> None:
    if spec.kind == "channels":
        found, expected = (spec.size,), (table.channels,)
    else:
        found = (spec.size, spec.size // spec.shared_size, spec.lanes)
        expected = (table.query_heads, table.kv_heads, table.head_dim)
    fits = removed and all(f <= e for f, e in zip(found, expected, strict=True))
    if found != expected and not fits:
        raise ValueError(
            f"latency_table: does not cover {name!r}: it has {_words(spec.kind, found)}, the table "
            f"is of layers with {_words(spec.kind, expected)}. Measure one of this model with "
            "gatepack bench MODEL --latency-table FILE"
        )


def _words(kind: str, shape: tuple[int, ...]) -> str:
    if kind == "channels":
        return f"{shape[0]} channels"
    return f"{shape[0]} query and {shape[1]} key/value heads of {shape[2]}"


def device_label(device: torch.device) -> str:
    """What a table is of: the name of a GPU, or machine and threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
