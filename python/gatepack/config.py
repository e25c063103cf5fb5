"""Stage 1, gates: what to gate and how far to close it, as a frozen, JSON-serialisable record."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from gatepack.estimators import ESTIMATORS
from gatepack.files import parse_json

UNITS = ("heads", "channels")
LINEAR_UNITS = ("rows", "columns")
COSTS = ("params",)
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
    target: kept fraction of the weights of the blocks' linears, gated or not, in (0, 1).
    target_of: the cost that target counts; "params".
    width_multiple: kept channels per layer (rows per linear) are a multiple of this, or of its
        largest half, quarter, ... with which the target can be met within 0.5 %; the multiple in
        use is logged and reported.
    equal_layers: the same number of heads and of channels in every layer, so that every engine
        loads the result.
    q_per_kv_uniform: the key/value groups that stay in a layer keep equally many query heads each.
    tp_divisor: kept heads, key/value heads and channels are divisible by this (tensor-parallel
        ranks).
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
    width_multiple: int = 64
    equal_layers: bool = True
    q_per_kv_uniform: bool = True
    tp_divisor: int = 1
    targets: tuple[str, ...] | None = None
    init_logit: float | None = None
    seed: int = 0
    version: int = CONFIG_VERSION

    def __post_init__(self):
        for field in ("units", "targets"):
            value = getattr(self, field)
            if value is None and field == "targets":
                continue
            if not isinstance(value, list | tuple) or not all(
                isinstance(part, str) for part in value
            ):
                raise ValueError(f"{field} must be a list or tuple of strings, got {value!r}")
            object.__setattr__(self, field, tuple(value))
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
        if not _is_number(self.target) or not 0.0 < self.target < 1.0:
            raise ValueError(f"target must be a kept fraction in (0, 1), got {self.target!r}")
        if not _is_number(self.noise) or self.noise < 0:
            raise ValueError(f"noise must be a finite number >= 0, got {self.noise!r}")
        if self.init_logit is not None and not _is_number(self.init_logit):
            raise ValueError(f"init_logit must be a finite number or None, got {self.init_logit!r}")
        for field in ("equal_layers", "q_per_kv_uniform"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False, got {getattr(self, field)!r}")
        for field in ("width_multiple", "tp_divisor"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be an integer >= 1, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {self.seed!r}")
        if self.version != CONFIG_VERSION or isinstance(self.version, bool):
            raise ValueError(
                f"version must be {CONFIG_VERSION}, got {self.version!r}: "
                "the configuration comes from another release of gatepack"
            )

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


def _is_number(value) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _check_choice(field: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {allowed}, got {value!r}")
