"""Stage 4, methods: the published ways to decide what closes, on gatepack's gates and packer.

method = gatepack.methods.FLAP(gates=gatepack.GateConfig(target=0.8, noise=0.0))
report = method.prune(model, batches)     # score, close, compensate, pack
result = method.run(model, windows)       # the same, then LoRA on what is left
training = gatepack.methods.FineGates(budget=0.8).start(model, steps)   # beside an optimizer
"""

import importlib

_EXPORTS = {
    "ATP": "atp",
    "CloseAndRepair": "close_and_repair",
    "ContextPruning": "context_pruning",
    "FLAP": "flap",
    "FineGates": "fine_gates",
    "Magnitude": "magnitude",
    "MethodRun": "one_shot",
    "OneShot": "one_shot",
    "Taylor": "taylor",
    "WandaSP": "wanda_sp",
}

__all__ = [*_EXPORTS]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gatepack.methods' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gatepack.methods.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
