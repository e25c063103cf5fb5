"""LoRA layers built by hand, with any PEFT that pyproject.toml admits."""

import inspect

from peft.tuners.lora import Linear


def lora_around(linear, name: str, config) -> Linear:
    """A LoRA layer of the config's rank around a linear, which may be such a layer already."""
    given = {"config": config} if "config" in inspect.signature(Linear).parameters else {}
    return Linear(linear, name, r=config.r, **given)
