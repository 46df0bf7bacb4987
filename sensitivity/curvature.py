"""One pass forward and one back over the calibration text, a decoder block at a time → statistics of every unit.

For a weight with outputs y = W x and a change dW, half the Fisher's quadratic form gives

    nats per token = 1/2 * sum_o G_oo * (dW A dW^T)_oo,    A = E[x x^T],  G = E[g g^T]

with g the gradient, at y, of the summed loss, and E the mean over tokens; tokens' cross terms are left out, and A
and G are taken as independent (as K-FAC does: Martens & Grosse 2015). A looked-up row v of frequency f_v has
A = f_v and the gradients of the lookup's output.

The pass forward keeps each block's input. The pass back runs one block again with gradients inside of it alone, so
that one block's weights, activations and second moments are in memory at a time; of a moment only vectors stay
(sensitivity.statistics). After each block its units' statistics and the gradient at its input are on disk: an
interrupted pass goes on from there. Of several ranks, each takes a part of the text's blocks.
May import: formats, sensitivity.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from bitplan.formats.errors import RoundingFailed, UsageError
from bitplan.sensitivity import ranks
from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.forward import inputs
from bitplan.sensitivity.gradients import backward
from bitplan.sensitivity.graph import Graph, Unit
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.resume import Back, Finished, Sums
from bitplan.sensitivity.statistics import StatisticsStore
from bitplan.sensitivity.store import IN_MEMORY, States, locked
from bitplan.sensitivity.sums import SegmentSums, statistics
from bitplan.sensitivity.texts.text import Blocks
from bitplan.sensitivity.trace import Trace

T = TypeVar("T")
PASS_BYTES = 8 << 30
"""Second moments of one block that are gathered at once; a block of more experts is run again for the rest."""
SAMPLED = 4
"""Units of which A is kept whole, to compare GPTQ's estimated loss with GPTQ's."""


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at most, at even distances."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def sampled(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units that GPTQ is run on: of those of the fewest columns, a few at even distances through the model."""
    products = [unit for unit in units if unit.kind in ("linear", "conv1d")]
    least = min((unit.columns for unit in products), default=0)
    narrow = [unit for unit in products if unit.columns == least]
    return tuple(evenly(narrow, SAMPLED))


def gather(
    chain: Callable[[], Chain],
    graph: Graph,
    units: Sequence[Unit],
    blocks: Blocks,
    store: StatisticsStore,
    seed: int = 0,
    memory: int = IN_MEMORY,
    moments: int = PASS_BYTES,
) -> None:
    """Fill `store` for those of the units that it lacks; `chain()` cuts the model, where something is missing. Labels
    are drawn from the model's own predictions (the true Fisher, which is the curvature of KL), with `seed`. Hidden
    states of more than `memory` bytes lie in files; second moments of one block take `moments` bytes at once, or as
    much as one unit's do. The ranks share the text out; of other processes, one works at a time. Raises RoundingFailed
    where a statistic is not finite."""
    whole = sampled(graph.units)
    with locked(store.folder) if ranks.rank() == 0 else nullcontext():
        lacking = {u.name for u in units if u not in store or (u in whole and store[u].moment is None)}
        lacking = ranks.gathered(lacking)[0]
        missing = [unit for unit in units if unit.name in lacking]
        if missing:
            _Pass(chain(), graph, missing, whole, blocks.ids, store, seed, memory, moments).run()
            if ranks.rank() == 0:
                _report_unreached({unit: store[unit].routed for unit in units})
    if any(unit not in store for unit in units):
        raise UsageError(
            f"what rank 0 wrote is not in {store.folder} on this machine: set BITPLAN_CACHE to a folder that all share"
        )


@dataclass
class _Pass:
    chain: Chain
    graph: Graph
    missing: list[Unit]
    whole: tuple[Unit, ...]
    ids: Tensor
    store: StatisticsStore
    seed: int
    memory: int
    moments: int

    def __post_init__(self) -> None:
        self.tokens = self.ids.numel()
        self.numbers = ranks.share(range(len(self.ids)))
        """Of this rank's text blocks among all."""
        self.ids = self.ids[self.numbers]
        self.device = self.chain.device
        self.back = Back(self.store.folder)

    def run(self) -> None:
        if self.chain.why and ranks.rank() == 0:
            print(f"{self.chain.why}: the statistics are gathered with the whole model in memory", file=sys.stderr)
        last = len(self.chain) - 1
        lowest = min(segment for segment in range(last + 1) if self.watched(segment))
        found = self.resume(last, lowest)
        if len(set(ranks.gathered(found and found.segment))) > 1:  # one was stopped elsewhere than the others
            found = None
        start, gradient = (found.segment - 1, found.gradient) if found else (last, None)
        heads: Sums = found.heads if found else {}
        states = inputs(self.chain, self.ids, start, self.memory, self.refuse_not_finite)
        # By text blocks: a model that is not cut is one segment, and large ones take minutes each.
        bar = progress(total=(start - lowest + 1) * len(self.ids), desc="statistics", unit="block")
        for segment in range(start, lowest - 1, -1):
            here = states[segment]
            below = None if here is None or segment <= lowest else States(here.shape, self.back.path(segment))
            for part, units in enumerate(self.parts(self.watched(segment)) or [[]]):
                sums = self.backward(segment, units, here, gradient, below, None if part else bar)
                sums.join()
                ready: Sums = {}
                for unit in units:
                    if segment == last and unit.kind == "tied" and self.chain.paths:
                        heads[unit.name] = sums.of[unit.name]  # its lookups are still to come
                    else:
                        ready[unit.name] = heads.get(unit.name, {}) | sums.of[unit.name]
                self.finish([unit for unit in units if unit.name in ready], ready)
                del sums, ready  # before the next are gathered
            ranks.gathered(None)  # what a rank goes on from names only statistics that all ranks have written
            states[segment] = None
            if below is not None:
                if segment == last:
                    self.back.keep_heads(heads)
                self.back.keep(segment, gradient)
            gradient = below
        bar.close()
        self.back.clear()

    def watched(self, segment: int) -> list[Unit]:
        """The missing units that are seen in a segment: a tied head after the blocks, its lookups before them."""
        return [unit for unit in self.chain.seen(segment) if unit in self.missing]

    def parts(self, units: list[Unit]) -> list[list[Unit]]:
        """Units whose second moments fit in `moments` bytes together."""
        parts: list[list[Unit]] = []
        size = self.moments + 1
        for unit in units:
            need = 4 * unit.experts * unit.columns**2 if unit.kind != "embedding" else 0
            if size + need > self.moments:
                parts.append([])
                size = 0
            parts[-1].append(unit)
            size += need
        return parts

    def resume(self, last: int, lowest: int) -> Finished | None:
        """Where to go on, unless something after that is missing."""
        found = self.back.finished(self.ids, self.chain.device)
        if found is None or found.segment <= lowest:
            return None
        tied = [unit for unit in self.watched(last) if unit.kind == "tied"]
        above = [unit for part in range(found.segment, last + 1) for unit in self.watched(part) if unit not in tied]
        return None if above or any(unit.name not in found.heads for unit in tied) else found

    def refuse_not_finite(self, hidden: Tensor) -> None:
        if not hidden.isfinite().all():
            raise RoundingFailed(self.culprit())

    def culprit(self) -> str:
        for name, parameter in self.chain.model.named_parameters():
            if not parameter.isfinite().all():
                return f"{name} holds NaN or infinity: fetch or train the model again"
        return "the model's outputs hold NaN or infinity on the calibration text, though its weights do not"

    def backward(
        self,
        segment: int,
        units: list[Unit],
        states: States | None,
        above: States | None,
        below: States | None,
        bar: tqdm | None = None,
    ) -> SegmentSums:
        """Sums over the text for `units`, from a segment's inputs and the gradient at its outputs, with the gradient
        at its inputs written to `below`."""
        module = self.chain.module(segment, own=True)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        watched: dict[str, Tensor] = {
            unit.parameter: parameters[self.chain.local(segment, unit.parameter)] for unit in units
        }
        sums = SegmentSums(self.chain, segment, units, self.graph)
        handles = []
        if self.chain.looks_up(segment):  # lookups ask for gradients, also where their unit is not watched
            embeddings = self.chain.outer.get_input_embeddings()
            handles.append(
                embeddings.register_forward_hook(lambda m, a, o: o if o.requires_grad else o.requires_grad_())
            )
        try:
            for i, row in enumerate(self.ids.to(self.device).split(1)):
                x = torch.zeros(0, device=self.device) if states is None else states[i].unsqueeze(0).to(self.device)
                x.requires_grad_()
                gradient = None if above is None else above[i].unsqueeze(0)
                trace, number = Trace(watched, sums.add), self.numbers[i]
                backward(
                    self.chain, segment, module, x, row, gradient, self.seed, number, trace, self.refuse_not_finite
                )
                if below is not None:
                    assert x.grad is not None
                    below[i] = x.grad[0]
                if bar is not None:
                    bar.update()
        finally:
            for handle in handles:
                handle.remove()
        return sums

    def finish(self, units: list[Unit], sums: Sums) -> None:
        """Write the units' statistics. The ranks share them out, those of one moment together."""
        for unit in units:
            for kind, tensor in sums[unit.name].items():
                if not tensor.isfinite().all():
                    raise RoundingFailed(
                        f"{unit.name}: its {kind} hold NaN or infinity on the calibration text{self.hint(kind)}"
                    )
        together: dict[int, list[Unit]] = {}
        for unit in units:
            own = sums[unit.name]
            together.setdefault(id(own.get("moment", own)), []).append(unit)
        for first, *_ in together.values():
            if "moment" in sums[first.name]:
                sums[first.name]["moment"] /= self.tokens  # in place: it can be the largest tensor there is
        for readers in ranks.share(list(together.values())):
            costs: Tensor | None = None
            for unit in readers:
                found = statistics(sums[unit.name], self.tokens, costs, unit in self.whole)
                if found.frequencies is None:
                    costs = found.pivots
                self.store.write(unit, found)

    def hint(self, kind: str) -> str:
        """What to try where only the pass back is not finite, as it is for some kernels of attention."""
        attention = self.chain.model.config._attn_implementation
        if "gradients" not in kind or attention in (None, "eager"):
            return ""
        return (
            ', though the forward pass is finite: try "attn_implementation": "eager" in its config.json (it ran with'
            f" {attention!r})"
        )


def _report_unreached(routed: Mapping[Unit, Tensor | None]) -> None:
    missed = {u.name: (int((n == 0).sum()), u.experts) for u, n in routed.items() if u.routed and n is not None}
    names = [f"{name} ({n} of {experts})" if experts > 1 else name for name, (n, experts) in missed.items() if n]
    if names:
        print(
            "no calibration token reaches these experts, so their predicted loss is 0 and their inputs count equally"
            f" in rounding; more text (--tokens) may reach them: {', '.join(names)}",
            file=sys.stderr,
        )
