"""Stage 1, gates: what to gate and how far to close it, as a frozen, JSON-serialisable record."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from gatepack.estimators import ESTIMATORS
from gatepack.files import parse_json

UNITS = ("heads", "channels")
LINEAR_UNITS = ("rows", "columns")
COSTS = ("params", "flops", "latency")
PHASES = ("prefill", "decode")
CONFIG_VERSION = 1


@dataclass(frozen=True)
class GateConfig:
    """Which units get gates, what their estimator is, and what the kept part may cost.

    units: "heads" (query heads; a key/value head goes with its last query head) and/or "channels"
        (MLP width); or else "rows" and/or "columns" of linears (FineGates), whose residual side is
        then gathered and scattered.
    estimator: "stg" (FineGates' clamped Gaussian) or "hard_concrete" (Louizos et al. 2018).
    noise: standard deviation of the STG noise, or whether hard-concrete samples (> 0) at all; 0 is
        deterministic.
    target: kept fraction, in (0, 1), of what target_of says: "params", the weights of the blocks'
        linears, gated or not; "flops", those of the blocks, attention included, for sequences of
        sequence_length; or "latency", the blocks' time in latency_phase, "prefill" or "decode".
        Rows and columns are counted by "params" and "flops", where attention keeps its width.
    latency_table: of the device that the model is for: a gatepack.latency.LatencyTable as a dict,
        or the path of one, which `gatepack bench --latency-table` writes. latency_device: the
        device that it must be of; None: the one that the model is on.
    width_multiple: kept channels per layer (rows per linear) are a multiple of this, or of its
        largest half, quarter, ... with which the target can be met within 0.5 %; the multiple in
        use is logged and reported.
    equal_layers: the same number of heads and of channels in every layer, so that every engine
        loads the result. Says nothing of rows and columns, which no engine loads.
    q_per_kv_uniform: the key/value groups that stay in a layer keep equally many query heads each;
        says nothing of rows and columns.
    tp_divisor: kept heads, key/value heads and channels are divisible by this (tensor-parallel
        ranks); 1 for rows and columns.
    targets: glob patterns over module names ("model.layers.1?.*"); only matching modules are gated.
        None: all; of rows and columns, all linears of the blocks.
    init_logit: where logits start; None takes the estimator's own (gates start open).
    seed: of the gate noise, the same on every rank.

    Raises ValueError naming field, value and what is allowed.
    """

    units: tuple[str, ...] = UNITS
    estimator: str = "stg"
    noise: float = 0.1
    target: float = 0.8
    target_of: str = "params"
    sequence_length: int = 2048
    latency_table: Mapping | str | None = field(default=None, hash=False)
    latency_phase: str = "decode"
    latency_device: str | None = None
    width_multiple: int = 64
    equal_layers: bool = True
    q_per_kv_uniform: bool = True
    tp_divisor: int = 1
    targets: tuple[str, ...] | None = None
    init_logit: float | None = None
    seed: int = 0
    version: int = CONFIG_VERSION

    def __post_init__(self):
        for name in ("units", "targets"):
            value = getattr(self, name)
            if value is None and name == "targets":
                continue
            if not isinstance(value, list | tuple) or not all(
                isinstance(part, str) for part in value
            ):
                raise ValueError(f"{name} must be a list or tuple of strings, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not self.units:
            raise ValueError(f"units must name at least one of {UNITS}, got none")
        for unit in self.units:
            _check_choice("units", unit, UNITS + LINEAR_UNITS)
        if self.of_linears and set(self.units) & set(UNITS):
            raise ValueError(
                f"units must be among {UNITS} or among {LINEAR_UNITS}, got {self.units!r}"
            )
        _check_choice("estimator", self.estimator, tuple(ESTIMATORS))
        _check_choice("target_of", self.target_of, COSTS)
        if not is_number(self.target) or not 0.0 < self.target < 1.0:
            raise ValueError(f"target must be a kept fraction in (0, 1), got {self.target!r}")
        if not is_number(self.noise) or self.noise < 0:
            raise ValueError(f"noise must be a finite number >= 0, got {self.noise!r}")
        if self.init_logit is not None and not is_number(self.init_logit):
            raise ValueError(f"init_logit must be a finite number or None, got {self.init_logit!r}")
        for name in ("equal_layers", "q_per_kv_uniform"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("width_multiple", "tp_divisor", "sequence_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.of_linears and self.tp_divisor != 1:
            raise ValueError(
                f"tp_divisor must be 1 with units {self.units!r}, got {self.tp_divisor}: ranks "
                f"share out whole heads and channels, units {UNITS!r}"
            )
        self._check_latency()
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {self.seed!r}")
        if self.version != CONFIG_VERSION or isinstance(self.version, bool):
            raise ValueError(
                f"version must be {CONFIG_VERSION}, got {self.version!r}: "
                "the configuration comes from another release of gatepack"
            )

    def _check_latency(self) -> None:
        _check_choice("latency_phase", self.latency_phase, PHASES)
        if self.latency_device is not None and not isinstance(self.latency_device, str):
            raise ValueError(f"latency_device must be a name or None, got {self.latency_device!r}")
        if self.target_of == "latency" and self.of_linears:
            raise ValueError(
                f"target_of must be 'params' or 'flops' with units {self.units!r}, got 'latency': "
                "tables hold the times of layers by their heads and channels, and those of linears "
                "that gather and scatter do not follow from them"
            )
        if (self.target_of == "latency") != (self.latency_table is not None):
            raise ValueError(
                "latency_table must be a table or its path with target_of='latency', else None; "
                f"got {type(self.latency_table).__name__} with target_of={self.target_of!r}"
            )
        if self.latency_table is not None:
            from gatepack.latency import LatencyTable

            table = self.latency_table
            read = LatencyTable.from_dict if isinstance(table, Mapping) else LatencyTable.read
            object.__setattr__(self, "latency_table", read(table).to_dict())

    @property
    def of_linears(self) -> bool:
        """Whether the units are rows and columns of single linears."""
        return bool(set(self.units) & set(LINEAR_UNITS))

    def to_dict(self) -> dict:
        """A dict of JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: dict) -> "GateConfig":
        """The inverse of to_dict; an unknown field is refused by name."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a GateConfig must be read from an object of fields, got {data!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known, key=str)
        if unknown:
            raise ValueError(f"unknown GateConfig field {unknown[0]!r}; known: {sorted(known)}")
        return cls(**data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "GateConfig":
        """The inverse of to_json."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"a GateConfig cannot be read: {error}") from error
        return cls.from_dict(data)


def is_number(value) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _check_choice(field: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {allowed}, got {value!r}")
