"""Measure units one at a time: exchange a unit's weight, run the search text from its block on, compare.

What comes before a unit's block is the same for all of its formats: the hidden states at each block's input are
computed once, and a candidate starts from them. Each result is a line of a file as soon as it is known, so that an
interrupted measurement goes on where it was. May import: formats.scheme, sensitivity.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bitplan.formats.scheme import QuantScheme
from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.forward import after_blocks, inputs
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.loss import Evaluation, Reference
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.store import IN_MEMORY, append_row, unchecked_json
from bitplan.sensitivity.swapper import WeightSwapper
from bitplan.sensitivity.weight_cache import WeightCache

Measured = dict[tuple[str, QuantScheme], Evaluation]


class Prefixes:
    """The chain's hidden states at each segment's input on the text of a `reference`, those of more than `memory` bytes
    in files. `others` gives a segment's weights by its number, as `Chain.run` has them: what all units are while one is
    measured."""

    def __init__(
        self,
        chain: Chain,
        reference: Reference,
        memory: int = IN_MEMORY,
        others: Callable[[int], dict[str, Tensor]] = lambda segment: {},
    ):
        self.chain, self.reference, self.others = chain, reference, others
        self.ids = reference.blocks.ids.to(chain.device)
        self.rows = self.ids.split(1)
        self.states = inputs(chain, self.ids, len(chain) - 1, memory, weights=others)
        self.at = {unit.parameter: i for i, units in enumerate(chain.units) for unit in units}

    @torch.no_grad()
    def evaluate(self, parameter: str | None, weight: Tensor | None) -> Evaluation:
        """The model with one parameter exchanged for `weight`, of the parameter's own shape; with none, as it is."""
        chain, last = self.chain, len(self.chain) - 1
        first = last if parameter is None else self.at[parameter] if chain.paths else last
        exchanged = {} if parameter is None or weight is None else {parameter: weight.to(chain.device, torch.float32)}
        below = self.states[first]
        hidden = list(self.rows) if below is None else [below[i].unsqueeze(0) for i in range(len(self.rows))]
        for segment in range(first, last):
            module, weights = chain.module(segment, own=True), self.others(segment)
            if segment == first:
                weights = weights | exchanged
            hidden = [
                chain.run(segment, module, x.to(chain.device), row, weights)
                for x, row in zip(hidden, self.rows, strict=True)
            ]
        # A tied embedding is the head too.
        weights = self.others(last) | (exchanged if first in (0, last) else {})
        return self.reference.compare(after_blocks(chain, hidden.__getitem__, self.ids, weights))


def known(journals: Iterable[Path]) -> Measured:
    """What journals of measurements hold; a line that an interruption cut, or that is damaged, is left out."""
    results: Measured = {}
    for line in [line for path in journals for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]:
        if (entry := unchecked_json(line)) is None:
            continue
        results[entry["unit"], QuantScheme(entry["format"], entry["rounding"])] = Evaluation(**entry["evaluation"])
    return results


def measure(
    swapper: WeightSwapper,
    weight_cache: WeightCache,
    prefixes: Prefixes,
    wanted: Sequence[tuple[Unit, QuantScheme]],
    journal: Path,
    done: Measured,
) -> Measured:
    """Evaluate the model with one unit in one scheme, for each wanted pair that is not among those `done`, and append
    it to `journal`."""
    results = dict(done)
    for unit, scheme in progress(wanted, desc="measuring", unit="format"):
        if (unit.name, scheme) in results:
            continue
        weight = swapper.shaped(unit, weight_cache.dequantized(unit, scheme))
        results[unit.name, scheme] = evaluation = prefixes.evaluate(unit.parameter, weight)
        entry = {"unit": unit.name, "format": scheme.format, "rounding": scheme.rounding}
        append_row(journal, entry | {"evaluation": asdict(evaluation)})
    return {pair: results[pair] for pair in ((unit.name, scheme) for unit, scheme in wanted)}
