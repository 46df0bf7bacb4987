"""Makes transformers know the plan as soon as both are imported, in either order, and imports neither torch nor it.

transformers has no entry point for quantizers: so where it is not imported yet, a finder waits for its table of
quantizers. What goes into the table is a stand-in that imports the plug-in when it is first used.
May import: the standard library.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

METHOD = "bitplan"
TABLE = "transformers.quantizers.auto"


class _LazyClass:
    """Stands for a class of planner.pretrained until something is asked of it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(import_module("bitplan.planner.hf.quantizer"), self._name), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("bitplan.planner.hf.quantizer"), self._name)(*args, **kwargs)


def _fill(table: Any) -> None:
    table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _LazyClass("SavedPlanConfig")
    table.AUTO_QUANTIZER_MAPPING[METHOD] = _LazyClass("PlanQuantizer")


class _AfterImport(MetaPathFinder):
    """Finds the table as usual, and fills it right after its own code has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _fill(module)
                sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    if TABLE in sys.modules:
        _fill(sys.modules[TABLE])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
