"""Candidate allocations, rounded in sequence as a plan is, but on less text, and run segment by segment.

The codes of a block follow from its own schemes and from those of the blocks before it, so candidates that agree up to
some block share all codes up to it, and the hidden states behind it.
May import: formats, sensitivity, planner.plan, planner.quantize.segment.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitplan.formats.base import Tensors
from bitplan.formats.table import format_named
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.segment import Segment
from bitplan.sensitivity.forward import after_blocks
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import States
from bitplan.sensitivity.texts.text import Blocks

TOKENS = 4096
"""Of the calibration text."""
AT_ONCE = 4
"""Blocks of the search text that run through a segment together: a candidate may be dropped after each block."""


@dataclass
class Rounded:
    """What follows from the schemes of a segment and of all before it."""

    tensors: dict[str, Tensors]
    """Unit → its stored tensors."""
    states: States | None
    """Hidden states behind the segment, float32 [blocks, length, width]; None behind the last."""
    weights: dict[str, Tensor]
    """Of the first segment: parameter → weight, which the last may read again (tied heads)."""
    search: dict[int, Tensor] = field(default_factory=dict)
    """Number of a block of the search text → the hidden states of it and those after it, as `states`."""
    kept: bool = True
    """For other plans; else its hidden states are given up as soon as the next segment has them."""

    @property
    def nbytes(self) -> int:
        tensors = [tensor for each in self.tensors.values() for tensor in each.values()]
        tensors += [*self.weights.values(), *self.search.values()]
        return sum(tensor.nbytes for tensor in tensors) + (0 if self.states is None else self.states.nbytes)


class Candidates:
    """Rounds plans, `tuned` ones excepted, in sequence on the first `tokens` of the calibration text, and runs them on
    the search text without a second model: one segment at a time. `segments` counts those of all plans, `shared` those
    that an earlier plan had rounded; `saved` is how many seconds these, and the text that an earlier plan had run,
    would have taken."""

    def __init__(self, session: Session, tokens: int = TOKENS):
        ids = session.texts.calibration.ids
        few = Blocks(ids[: max(1, tokens // ids.shape[1])])
        self._session = replace(session, texts=replace(session.texts, calibration=few))
        self._chain = session.chain()
        self._true: list[States | None] = [None]
        """Hidden states of the full-precision model in front of the segments so far."""
        kept = 4 * few.ids.numel() * sum(unit.columns for unit in session.graph.units)
        self._inputs: dict[tuple[str, int], list[Tensor]] | None = {} if kept <= session.in_memory else None
        self._cache: OrderedDict[tuple, Rounded] = OrderedDict()
        self._held = 0
        """Bytes of the cache."""
        self.segments = self.shared = 0
        self.saved = 0.0
        self._seconds, self._running = [math.inf] * len(self._chain), [math.inf] * len(self._chain)

    def round(self, plan: Plan) -> list[Rounded]:
        """A plan's segments. Raises RoundingFailed."""
        made: list[Rounded] = []
        for index, key in enumerate(self.prefixes(plan)):
            self.segments += 1
            if key in self._cache:
                self.shared += 1
                self.saved += self.seconds(index)
            else:
                began = time.perf_counter()
                states, first = (made[-1].states, made[0].weights) if made else (None, {})
                self._cache[key] = self._round(plan, index, states, first)
                self._keep(self._cache[key].nbytes)
                self._seconds[index] = min(self._seconds[index], time.perf_counter() - began)
            self._cache.move_to_end(key)
            made.append(self._cache[key])
        for key in reversed(self.prefixes(plan)):  # more plans share the first segments than the last
            if key in self._cache:
                self._cache.move_to_end(key)
        return made

    def log_probabilities(self, plan: Plan, segments: list[Rounded]) -> Callable[[int], Tensor]:
        """Of a plan that `round` gave the segments of: float32 [1, length - 1, vocabulary] by the number of a block of
        the search text."""
        ids, last = self._session.texts.search.ids, len(self._chain) - 1
        behind: dict[int, Tensor] = {}

        def hidden(block: int) -> Tensor:
            first = block - block % AT_ONCE
            if first not in behind:
                behind.clear()
                behind[first] = self._behind_blocks(plan, segments, first)
            return behind[first][block - first].unsqueeze(0)

        weights = segments[0].weights | self._weights(plan, last, segments[last])
        return after_blocks(self._chain, hidden, ids, weights)

    @contextmanager
    def exchanged(self, plan: Plan, segments: list[Rounded]) -> Iterator[PreTrainedModel]:
        """The session's model with the weights of a plan that `round` gave the segments of, beside its own."""
        swapper = self._session.swapper
        try:
            for index, segment in enumerate(segments):
                for unit, weight in self._dequantized(plan, index, segment):
                    swapper.exchange(unit, weight)
            yield self._session.model
        finally:
            for unit in swapper.units.values():
                swapper.restore(unit)

    def seconds(self, index: int) -> float:
        """The least that it took to round a segment so far: the first time also prepares what others use."""
        return self._seconds[index]

    def prefixes(self, plan: Plan) -> list[tuple]:
        """For each segment what its codes follow from: the schemes of its units and of all before it."""
        schemes = {unit.name: unit.scheme for unit in plan.units}
        parts = [tuple((unit.name, schemes[unit.name]) for unit in units) for units in self._chain.units]
        return [tuple(parts[: index + 1]) for index in range(len(parts))]

    def _dequantized(self, plan: Plan, index: int, rounded: Rounded) -> Iterator[tuple[Unit, Tensor]]:
        """A segment's units that are not native, each with its weight, float32 [experts * rows, columns]."""
        formats = {unit.name: unit.format for unit in plan.units}
        for unit in self._chain.units[index]:
            if unit.name in rounded.tensors:
                format = format_named(formats[unit.name])
                weight = format.dequantize_by_rows(rounded.tensors[unit.name], unit.columns, torch.float32)
                yield unit, weight.to(self._session.device)

    def _weights(self, plan: Plan, index: int, rounded: Rounded) -> dict[str, Tensor]:
        """Parameter → weight of a segment."""
        shaped = self._session.swapper.shaped
        return {unit.parameter: shaped(unit, weight) for unit, weight in self._dequantized(plan, index, rounded)}

    @torch.no_grad()
    def _behind_blocks(self, plan: Plan, segments: list[Rounded], first: int) -> Tensor:
        """Inputs of the last segment, for AT_ONCE blocks of the search text from `first` on; what an earlier plan ran
        with the same segments is not run again."""
        last = len(self._chain) - 1
        ids = self._session.texts.search.ids[first : first + AT_ONCE].to(self._session.device)
        begun = max((index for index in range(last) if first in segments[index].search), default=-1)
        self.saved += sum(self._running[: begun + 1])
        x = ids if begun < 0 else segments[begun].search[first].to(self._session.device)
        for index in range(begun + 1, last):
            began = time.perf_counter()
            weights = self._weights(plan, index, segments[index]) if index else segments[0].weights
            x = self._chain.run(index, self._chain.module(index, own=True), x, ids, weights)
            if segments[index].kept:
                segments[index].search[first] = x.cpu()
                self._keep(4 * x.numel())
            self._running[index] = min(self._running[index], time.perf_counter() - began)
        return x

    def _round(self, plan: Plan, index: int, states: States | None, first: dict[str, Tensor]) -> Rounded:
        work = Segment(plan, self._session, self._chain, index, self._true[index], states, first, self._inputs)
        native = {unit.name for unit in plan.units if unit.is_native}
        units = [unit for unit in self._chain.units[index] if unit.name not in native]
        work.refuse_not_finite(units)
        tensors = work.round(units)
        last = index == len(self._chain) - 1
        if not last and len(self._true) == index + 1:
            self._true.append(work.true_outputs)
        after = None if last else work.outputs(states, work.now)
        return Rounded(tensors, after, dict(work.now) if index == 0 else {})

    def _keep(self, nbytes: int) -> None:
        """So many bytes more are in the cache: least recently used segments make room."""
        self._held += nbytes
        while self._held > self._session.in_memory and len(self._cache) > 1:
            oldest = self._cache.popitem(last=False)[1]
            self._held -= oldest.nbytes
            oldest.kept, oldest.states = False, None
            oldest.search.clear()
