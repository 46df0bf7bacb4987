"""A model's parameters as units, groups and data flow.

A unit is one weight that takes one format. Units are found by walking the parameters; a probe of eight tokens
then shows which of them run, what feeds what, and which read the very same input.
May import: formats, sensitivity.trace/vocabulary.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitplan.formats.errors import UsageError
from bitplan.formats.modules import is_experts, is_transposed
from bitplan.formats.table import NATIVE, stored_bytes
from bitplan.sensitivity.trace import Trace, Use
from bitplan.sensitivity.vocabulary import vocabulary_size

GENERIC = ("modeling_utils.py", "module.py")
"""Files of transformers and torch that ask every parameter for its type or device."""
ON_REQUEST = "unquantized on request"
"""Why a unit that --keep names takes no format."""


@dataclass(frozen=True)
class Unit:
    """`name` is the module's exact name, or for experts the parameter's. Shapes are outputs by inputs."""

    name: str
    kind: str
    """linear, conv1d, embedding, experts or tied (an embedding and the heads that share its weight)."""
    parameter: str
    experts: int
    rows: int
    columns: int
    dtype: torch.dtype
    tied: tuple[str, ...] = ()
    """Names of the other modules that hold the same weight."""
    group: str = ""
    """The name of the group's first unit: all of a group take the same format."""
    order: int = 0
    """Place in the data flow, counted from the input."""

    @property
    def routed(self) -> bool:
        """The router decides which tokens reach it: in a rounded model, not the tokens of the full-precision one."""
        return self.kind == "experts" or listed_expert(self.name) is not None

    @property
    def native(self) -> str:
        """The name of the format that the checkpoint has it in."""
        return NATIVE[self.dtype]

    @property
    def weights(self) -> int:
        return self.experts * self.rows * self.columns

    def nbytes(self, format: str) -> int:
        """Bytes of the unit in a format."""
        return stored_bytes(format, self.native, self.experts * self.rows, self.columns)


@dataclass(frozen=True)
class Unquantized:
    """A tensor that stays as the checkpoint has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Graph:
    units: tuple[Unit, ...]
    unquantized: tuple[Unquantized, ...]
    ties: nx.Graph = field(default_factory=nx.Graph)
    """Units that must share a format are joined; an edge's `why` says what joins them."""
    readers: dict[str, str] = field(default_factory=dict)
    """Unit → the first unit that reads the very same input, where that is another one."""

    def reads(self, unit: Unit) -> str:
        """The name of the first unit, maybe itself, that reads the very same input: units share its second moment."""
        return self.readers.get(unit.name, unit.name)

    def leads(self, units: Iterable[Unit]) -> dict[str, str]:
        """By a unit's name, that of the first of `units` that reads the very same input, to which the others' inputs
        need not be added."""
        first: dict[str, str] = {}
        return {unit.name: first.setdefault(self.reads(unit), unit.name) for unit in units}


LISTED = re.compile(r"(.*\.\w*experts)\.(\d+)\.(.*)")
"""Names of modules inside the experts of a module list: the list, the expert, the rest."""


def listed_expert(name: str) -> tuple[str, str, str] | None:
    """Of a module in a list of experts: the list's name, the expert's number, and the name inside the expert."""
    found = LISTED.fullmatch(name)
    return (found[1], found[2], found[3]) if found else None


def _alike(unit: Unit) -> tuple[str, str]:
    """What units have in common that are the same part of the experts of one list; of any other, its name alone."""
    found = listed_expert(unit.name)
    return (found[0], found[2]) if found else (unit.name, "")


def build_graph(model: PreTrainedModel, keep: tuple[str, ...] = (), per_expert: bool = False) -> Graph:
    """Walk and probe a loaded causal LM. `keep`: globs over unit names; UsageError where one matches none.
    `per_expert`: the experts of a block may take different formats, where each is a module of its own."""
    for module in model.modules():
        if is_experts(module) and hasattr(module, "config"):  # one product per expert, which is what can be traced
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]
    units, unquantized = find_units(model)
    for glob in keep:
        if not any(fnmatchcase(unit.name, glob) for unit in units):
            raise UsageError(
                f"--keep {glob!r} matches no unit; the first names are {', '.join(u.name for u in units[:3])}"
            )
    uses, elsewhere = probe(model, units)
    # An expert that the few tokens of the probe do not reach is used as the others of its list are.
    by_parameter = {unit.parameter: unit for unit in units}
    order: dict[tuple[str, str], int] = {}
    for use in uses:
        order.setdefault(_alike(by_parameter[use.parameter]), len(order))
    learning = {_alike(by_parameter[use.parameter]) for use in uses if use.output.requires_grad}
    outside = {_alike(by_parameter[parameter]) for parameter in elsewhere}
    reasons = {}
    for unit in units:
        if any(fnmatchcase(unit.name, glob) for glob in keep):
            reasons[unit.name] = ON_REQUEST
        elif _alike(unit) in outside:
            reasons[unit.name] = (
                "its weight is read outside of its own module, where a packed one would not be understood"
            )
        elif _alike(unit) not in order:
            reasons[unit.name] = "no text runs through it, or not by a product or lookup"
        elif learning and _alike(unit) not in learning:
            reasons[unit.name] = "it runs without gradients alone, so that what a format costs it cannot be scored"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unquantized += [_kept(u.parameter, parameters[u.parameter], reasons[u.name]) for u in units if u.name in reasons]
    units = [u for u in units if u.name not in reasons]
    ties = find_ties(units, uses, per_expert)
    units.sort(key=lambda unit: order[_alike(unit)])
    place = {unit.name: i for i, unit in enumerate(units)}
    leaders = {}
    for component in nx.connected_components(ties):
        leaders.update(dict.fromkeys(component, min(component, key=place.__getitem__)))
    ordered = tuple(replace(unit, group=leaders[unit.name], order=i) for i, unit in enumerate(units))
    return Graph(ordered, tuple(unquantized), ties, find_readers(ordered, uses))


def find_units(model: nn.Module) -> tuple[list[Unit], list[Unquantized]]:
    """Units and unquantized tensors of a model, on any device (meta included), in the model's order; no groups yet."""
    units: list[Unit] = []
    unquantized: list[Unquantized] = []
    holders: dict[int, int] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{name}" if path else name
            if id(parameter) in holders:
                if holders[id(parameter)] >= 0:
                    at = holders[id(parameter)]
                    units[at] = replace(units[at], kind="tied", tied=(*units[at].tied, path))
                continue
            unit, reason = _as_unit(path, name, module, parameter)
            holders[id(parameter)] = len(units) if unit else -1
            if unit:
                units.append(unit)
            else:
                unquantized.append(_kept(full, parameter, reason))
    persistent = model.state_dict(keep_vars=True)
    unquantized += [_kept(n, b, "a buffer") for n, b in model.named_buffers() if n in persistent]
    return units, unquantized


def _as_unit(path: str, name: str, module: nn.Module, parameter: Tensor) -> tuple[Unit | None, str]:
    if parameter.ndim < 2:
        return None, "a vector"
    if parameter.dtype not in NATIVE:
        return None, f"its type {str(parameter.dtype).removeprefix('torch.')} is no format's"
    *experts, rows, columns = parameter.shape
    if is_transposed(module):
        rows, columns = columns, rows
    kinds = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)
    if kind and name == "weight":
        return Unit(path, kind, f"{path}.weight", 1, rows, columns, parameter.dtype), ""
    if parameter.ndim == 3 and is_experts(module):
        return Unit(f"{path}.{name}", "experts", f"{path}.{name}", experts[0], rows, columns, parameter.dtype), ""
    return None, f"a parameter of {type(module).__name__}, which is no Linear, Conv1D, Embedding or experts module"


def _kept(name: str, tensor: Tensor, reason: str) -> Unquantized:
    return Unquantized(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes, reason)


class _Watch(Trace):
    """A trace that also notes weights that the model's code reads while none of their modules runs."""

    def __init__(self, model: PreTrainedModel, units: list[Unit], seen: Callable[[Use], None]):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        super().__init__({unit.parameter: parameters[unit.parameter] for unit in units}, seen)
        self.running: Counter[str] = Counter()
        self.elsewhere: set[str] = set()
        self.handles = []
        for unit in units:
            for path in (unit.parameter.rpartition(".")[0], *unit.tied):
                module = model.get_submodule(path)
                self.handles += [
                    module.register_forward_pre_hook(lambda *_, name=unit.parameter: self.running.update([name])),
                    module.register_forward_hook(lambda *_, name=unit.parameter: self.running.subtract([name])),
                ]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        reader = sys._getframe(1).f_code.co_filename
        if not reader.endswith(GENERIC):
            self.elsewhere.update(name for name in self.touches(args) if self.running[name] <= 0)
        return super().__torch_function__(func, types, args, kwargs)


def probe(model: PreTrainedModel, units: list[Unit]) -> tuple[list[Use], set[str]]:
    """Run eight tokens; the uses in order, and the parameters that are read outside of their own modules."""
    uses: list[Use] = []
    ids = torch.arange(3, 11, device=next(model.parameters()).device).remainder(vocabulary_size(model)).unsqueeze(0)
    watch = _Watch(model, units, uses.append)
    try:
        with torch.enable_grad(), watch:
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in watch.handles:
            handle.remove()
    return uses, watch.elsewhere


def find_readers(units: tuple[Unit, ...], uses: list[Use]) -> dict[str, str]:
    """Unit → an earlier unit whose product has the very same input tensor."""
    names = {unit.parameter: unit.name for unit in units if unit.kind != "experts"}
    first: dict[tuple[object, int], str] = {}
    readers = {}
    for use in uses:
        if use.parameter in names and not use.lookup:
            # Two experts that got one tensor here may get two elsewhere.
            listed = listed_expert(names[use.parameter])
            leader = first.setdefault((listed and listed[:2], id(use.input)), names[use.parameter])
            if leader != names[use.parameter]:
                readers[names[use.parameter]] = leader
    return readers


def find_ties(units: list[Unit], uses: list[Use], per_expert: bool = False) -> nx.Graph:
    """Join siblings that read the very same tensor under one parent (q/k/v, gate/up), and the experts of a block;
    `per_expert`: where they are in a list, the parts of each expert alone."""
    ties = nx.Graph()
    ties.add_nodes_from(unit.name for unit in units)
    names = {unit.parameter: unit for unit in units}
    readers: dict[tuple[str, object], str] = {}
    for use in uses:
        unit = names.get(use.parameter)
        if unit is None or use.lookup:
            continue
        parent = unit.name.rpartition(".")[0]
        first = readers.setdefault((parent, id(use.input)), unit.name)
        if first != unit.name and unit.kind != "experts":
            ties.add_edge(first, unit.name, why="same input")
    blocks: dict[str, str] = {}
    for unit in units:
        block = unit.name.rpartition(".")[0] if unit.kind == "experts" else None
        if listed := listed_expert(unit.name):
            block = f"{listed[0]}.{listed[1]}" if per_expert else listed[0]
        if block:
            first = blocks.setdefault(block, unit.name)
            if first != unit.name:
                ties.add_edge(first, unit.name, why="one expert" if listed and per_expert else "experts of one block")
    return ties
