"""gatepack: train with gates, pack what stays open.

Names are imported on first use, so that ``import gatepack`` costs little beyond ``import torch``
and touches no device. The stages, left to right: gates, kernels, modules, methods, pack, save,
export.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "GateConfig": "config",
    "Gate": "gates",
    "GateSet": "gates",
    "BudgetController": "budget",
    "GatedLinear": "modules",
    "GatedMLP": "mlp",
    "PackedLinear": "modules",
    "Family": "families",
    "register_family": "families",
    "attach": "hf",
    "detach": "hf",
    "gates_of": "hf",
    "calibrate": "importance",
    "Distillation": "distillation",
    "GateCallback": "callback",
    "GateSchedule": "gate_training",
    "GateTraining": "gate_training",
    "pack": "packing",
    "unpack": "packing",
    "PackReport": "packing",
    "PackPlan": "repack",
    "remove_closed": "closure",
    "save_pretrained": "checkpoint",
    "from_pretrained": "checkpoint",
    "explain": "inspection",
    "measure": "timing",
    "evaluate": "evaluation",
    "export": "exporters",
}

# What type checkers and editors see: _EXPORTS once more, written by `make api`.
if TYPE_CHECKING:
    from gatepack import methods as methods
    from gatepack.budget import BudgetController as BudgetController
    from gatepack.callback import GateCallback as GateCallback
    from gatepack.checkpoint import from_pretrained as from_pretrained
    from gatepack.checkpoint import save_pretrained as save_pretrained
    from gatepack.closure import remove_closed as remove_closed
    from gatepack.config import GateConfig as GateConfig
    from gatepack.distillation import Distillation as Distillation
    from gatepack.evaluation import evaluate as evaluate
    from gatepack.exporters import export as export
    from gatepack.families import Family as Family
    from gatepack.families import register_family as register_family
    from gatepack.gate_training import GateSchedule as GateSchedule
    from gatepack.gate_training import GateTraining as GateTraining
    from gatepack.gates import Gate as Gate
    from gatepack.gates import GateSet as GateSet
    from gatepack.hf import attach as attach
    from gatepack.hf import detach as detach
    from gatepack.hf import gates_of as gates_of
    from gatepack.importance import calibrate as calibrate
    from gatepack.inspection import explain as explain
    from gatepack.mlp import GatedMLP as GatedMLP
    from gatepack.modules import GatedLinear as GatedLinear
    from gatepack.modules import PackedLinear as PackedLinear
    from gatepack.packing import PackReport as PackReport
    from gatepack.packing import pack as pack
    from gatepack.packing import unpack as unpack
    from gatepack.repack import PackPlan as PackPlan
    from gatepack.timing import measure as measure

    __all__ = [
        "BudgetController",
        "Distillation",
        "Family",
        "Gate",
        "GateCallback",
        "GateConfig",
        "GateSchedule",
        "GateSet",
        "GateTraining",
        "GatedLinear",
        "GatedMLP",
        "PackPlan",
        "PackReport",
        "PackedLinear",
        "__version__",
        "attach",
        "calibrate",
        "detach",
        "evaluate",
        "explain",
        "export",
        "from_pretrained",
        "gates_of",
        "measure",
        "methods",
        "pack",
        "register_family",
        "remove_closed",
        "save_pretrained",
        "unpack",
    ]
else:
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
