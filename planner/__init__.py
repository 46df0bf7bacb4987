"""bitplan: from a model and a memory budget to a plan that runs.

import planner                                             # registers the plan with transformers; loads no torch
model = planner.load("plan.json", model="org/model")       # or, in plain transformers:
model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=planner.PlanConfig("plan.json"))
model = AutoModelForCausalLM.from_pretrained("saved/")     # a folder that `bitplan apply --save` wrote
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from planner.register import register_with_transformers

try:
    __version__ = version("bitplan")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

WHERE = {
    "Plan": "planner.plan",
    "PlanConfig": "planner.pretrained",
    "QuantizationManager": "planner.manager",
    "load": "planner.materialize",
    "resident_bytes": "planner.materialize",
}
__all__ = ["Plan", "PlanConfig", "QuantizationManager", "__version__", "load", "resident_bytes"]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(import_module(WHERE[name]), name)


register_with_transformers()
