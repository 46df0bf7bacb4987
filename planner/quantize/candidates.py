"""Weights of candidate allocations, rounded in sequence as a plan's are, but on less text and with shared work.

The codes of a block follow from its own schemes and from those of the blocks before it, so candidates that agree up to
some block share all codes up to it, and the hidden states behind it.
May import: formats, sensitivity, planner.plan, planner.quantize.segment.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitplan.formats.base import Tensors
from bitplan.formats.table import format_named
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.segment import Segment
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import IN_MEMORY
from bitplan.sensitivity.texts.text import Blocks

TOKENS = 4096
"""Of the calibration text."""


@dataclass(frozen=True)
class Rounded:
    """What follows from the schemes of a segment and of all before it."""

    tensors: dict[str, Tensors]
    """Unit → its stored tensors."""
    states: Tensor | None
    """Hidden states behind the segment, float32 [blocks, length, width]; None behind the last."""
    weights: dict[str, Tensor]
    """Of the first segment: parameter → weight, which the last may read again (tied heads)."""

    @property
    def nbytes(self) -> int:
        tensors = [tensor for each in self.tensors.values() for tensor in each.values()] + list(self.weights.values())
        return sum(tensor.nbytes for tensor in tensors) + (0 if self.states is None else self.states.nbytes)


class Candidates:
    """Rounds plans in sequence on the first `tokens` of the calibration text, and puts their weights into the session's
    model. `segments` counts those of all plans, `shared` those that an earlier plan had rounded."""

    def __init__(self, session: Session, tokens: int = TOKENS):
        ids = session.texts.calibration.ids
        few = Blocks(ids[: max(1, tokens // ids.shape[1])])
        self._session = replace(session, texts=replace(session.texts, calibration=few))
        self._chain = session.chain()
        self._true: list[Tensor | None] = [None]
        """Hidden states of the full-precision model in front of the segments so far."""
        kept = 4 * few.ids.numel() * sum(unit.columns for unit in session.graph.units)
        self._inputs: dict[tuple[str, int], list[Tensor]] | None = {} if kept <= IN_MEMORY else None
        self._cache: OrderedDict[tuple, Rounded] = OrderedDict()
        self.segments = self.shared = 0
        self.saved = 0.0
        """Seconds that the shared segments would have taken."""
        self._seconds, self._rounded = [0.0] * len(self._chain), [0] * len(self._chain)

    def put(self, plan: Plan) -> None:
        """Round a plan's units and exchange the model's weights for theirs. Raises RoundingFailed."""
        self.restore()  # segments are rounded from the full-precision weights
        schemes = {unit.name: unit.scheme for unit in plan.units}
        before: Rounded | None = None
        first: dict[str, Tensor] = {}
        made: list[tuple[Unit, Tensors]] = []
        for index, (units, key) in enumerate(zip(self._chain.units, self.prefixes(plan), strict=True)):
            self.segments += 1
            if key in self._cache:
                self.shared += 1
                self.saved += self.seconds(index)
            else:
                began = time.perf_counter()
                self._remember(key, self._round(plan, index, before, first))
                self._seconds[index] += time.perf_counter() - began
                self._rounded[index] += 1
            self._cache.move_to_end(key)
            before = self._cache[key]
            first = before.weights if index == 0 else first
            made += [(unit, before.tensors[unit.name]) for unit in units if unit.name in before.tensors]
        for unit, tensors in made:
            format = format_named(schemes[unit.name].format)
            weight = format.dequantize(tensors, unit.columns, torch.float32)
            self._session.swapper.exchange(unit, weight.to(self._session.device))

    def seconds(self, index: int) -> float:
        """What it took to round a segment so far, on average."""
        return self._seconds[index] / max(1, self._rounded[index])

    def prefixes(self, plan: Plan) -> list[tuple]:
        """For each segment what its codes follow from: the schemes of its units and of all before it."""
        schemes = {unit.name: unit.scheme for unit in plan.units}
        parts = [tuple((unit.name, schemes[unit.name]) for unit in units) for units in self._chain.units]
        return [tuple(parts[: index + 1]) for index in range(len(parts))]

    def restore(self) -> None:
        """Put the full-precision weights back."""
        for unit in self._session.swapper.units.values():
            self._session.swapper.restore(unit)

    def _round(self, plan: Plan, index: int, before: Rounded | None, first: dict[str, Tensor]) -> Rounded:
        states = None if before is None else before.states
        work = Segment(plan, self._session, self._chain, index, self._true[index], states, first, self._inputs)
        native = {unit.name for unit in plan.units if unit.is_native}
        units = [unit for unit in self._chain.units[index] if unit.name not in native]
        work.refuse_not_finite(units)
        tensors = work.round(units)
        last = index == len(self._chain) - 1
        if not last and len(self._true) == index + 1:
            self._true.append(work.outputs(self._true[index], {}))
        after = None if last else work.outputs(states, work.now)
        return Rounded(tensors, after, dict(work.now) if index == 0 else {})

    def _remember(self, key: tuple, rounded: Rounded) -> None:
        """Least recently used ones make room."""
        self._cache[key] = rounded
        size = sum(each.nbytes for each in self._cache.values())
        while size > IN_MEMORY and len(self._cache) > 1:
            size -= self._cache.popitem(last=False)[1].nbytes
