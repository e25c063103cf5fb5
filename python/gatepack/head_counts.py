"""Stage 3, modules: the head counts that the forward of an attention module goes by."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import nn

from gatepack.families import Family

_CONFIG = "config."


class LayerConfig:
    """A config that a model's modules share, with values of its own for one of them.

    What it does not have itself it asks the shared config for, so a change of that is seen.
    """

    def __init__(self, shared: Any, own: dict[str, int]):
        self.__dict__.update(own, _shared=shared, _own=tuple(own))

    def __getattr__(self, name: str):
        # Not there yet while it is unpickled or copied, which asks for methods of their own.
        if name in ("_shared", "_own") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._shared, name)


def set_head_counts(
    attention: nn.Module, family: Family, queries: int, kv_heads: int, head_dim: int
) -> None:
    """Writes head counts to the attributes that the family's attention reads."""
    values = {
        "queries": queries,
        "kv_heads": kv_heads,
        "groups": queries // kv_heads,
        "width": queries * head_dim,
    }
    write_head_counts([(attention, name, values[what]) for name, what in family.head_attributes])


def head_counts(places: Iterable[tuple]) -> list[tuple[nn.Module, str, int]]:
    """(attention, attribute, its value) at each place (attention, attribute, ...)."""
    return [(attention, name, attrgetter(name)(attention)) for attention, name, *_ in places]


def write_head_counts(counts: Iterable[tuple[nn.Module, str, int]]) -> None:
    """Writes counts as head_counts gives them."""
    for attention, name, count in counts:
        if attrgetter(name)(attention) == count:
            continue
        if name.startswith(_CONFIG):
            _write_to_config(attention, name.removeprefix(_CONFIG), count)
        else:
            setattr(attention, name, count)


def _write_to_config(attention: nn.Module, name: str, count: int) -> None:
    """Gives an attention a LayerConfig, or the shared config where it differs in nothing."""
    config: Any = attention.config
    shared, own = config, {name: count}
    if isinstance(config, LayerConfig):
        shared = config._shared
        own = {key: getattr(config, key) for key in config._own} | own
    own = {key: value for key, value in own.items() if getattr(shared, key) != value}
    attention.config = LayerConfig(shared, own) if own else shared
