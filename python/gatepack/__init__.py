"""gatepack: train with gates, pack what stays open.

Names are imported on first use, so that ``import gatepack`` costs little beyond ``import torch``
and touches no device. The stages, left to right: gates, kernels, modules, methods, pack, save,
export.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "GateConfig": "config",
    "Gate": "gates",
    "GateSet": "gates",
    "BudgetController": "budget",
    "GatedLinear": "modules",
    "GatedMLP": "modules",
    "PackedLinear": "modules",
    "Family": "families",
    "register_family": "families",
    "attach": "hf",
    "detach": "hf",
    "gates_of": "hf",
    "calibrate": "importance",
    "GateCallback": "callback",
    "GateSchedule": "gate_training",
    "GateTraining": "gate_training",
    "pack": "packing",
    "unpack": "packing",
    "PackReport": "packing",
    "save_pretrained": "checkpoint",
    "from_pretrained": "checkpoint",
    "explain": "inspection",
    "measure": "timing",
}

__all__ = [*_EXPORTS, "methods", "__version__"]


def __getattr__(name):
    if name == "methods":
        return importlib.import_module("gatepack.methods")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gatepack' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gatepack.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
