"""bitplan: from a model and a memory budget to a plan that runs.

import bitplan                                             # registers the plan with transformers; loads no torch
model = bitplan.load("plan.json", model="org/model")       # or, in plain transformers:
model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=bitplan.PlanConfig("plan.json"))
model = AutoModelForCausalLM.from_pretrained("saved/")     # a folder that `bitplan apply --save` wrote
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from bitplan.planner.hf.register import register_with_transformers

if TYPE_CHECKING:  # for type checkers, which do not run __getattr__
    from bitplan.planner.hf.quantizer import PlanConfig
    from bitplan.planner.load import load, resident_bytes
    from bitplan.planner.manager import QuantizationManager
    from bitplan.planner.plan import Plan

try:
    __version__ = version("bitplan")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

_MODULES = {
    "Plan": "bitplan.planner.plan",
    "PlanConfig": "bitplan.planner.hf.quantizer",
    "QuantizationManager": "bitplan.planner.manager",
    "load": "bitplan.planner.load",
    "resident_bytes": "bitplan.planner.load",
}
__all__ = ["Plan", "PlanConfig", "QuantizationManager", "__version__", "load", "resident_bytes"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'bitplan' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


register_with_transformers()
