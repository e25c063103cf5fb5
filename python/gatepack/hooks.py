"""Stage 4, methods: what works on a model through hooks, so that a rerun can take its place."""

from collections.abc import Callable, Mapping
from typing import TypeVar

Worker = TypeVar("Worker")


def at_work(hooks: Mapping[int, Callable] | None, kind: type[Worker]) -> list[Worker]:
    """The objects of a kind that have a method among the hooks of a module or a tensor.

    hooks: the module's _forward_hooks or _forward_pre_hooks, or the tensor's
    _post_accumulate_grad_hooks, which are None before the first.
    """
    owners = (getattr(hook, "__self__", None) for hook in (hooks or {}).values())
    return [owner for owner in owners if isinstance(owner, kind)]
