"""Measure units one at a time: exchange, run, restore. May import: sensitivity.bank/graph/loss.

Each result is a line of a file as soon as it is known, so that an interrupted measurement goes on where it was.
"""

import json
from dataclasses import asdict
from pathlib import Path

from bitplan.formats.scheme import QuantScheme
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.loss import Evaluation, Reference
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.swapper import WeightSwapper
from bitplan.sensitivity.weight_cache import WeightCache

Measured = dict[tuple[str, QuantScheme], Evaluation]


def measure(
    swapper: WeightSwapper,
    weight_cache: WeightCache,
    reference: Reference,
    wanted: list[tuple[Unit, QuantScheme]],
    journal: Path,
) -> Measured:
    """Judge the model with one unit in one choice, for each wanted pair. `journal` holds what is known already."""
    results: Measured = {}
    if journal.exists():
        for line in journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that an interruption cut
            results[entry["unit"], QuantScheme(entry["format"], entry["rounding"])] = Evaluation(**entry["evaluation"])
    journal.parent.mkdir(parents=True, exist_ok=True)
    weight_cache.prepare([pair for pair in wanted if (pair[0].name, pair[1]) not in results])
    with journal.open("a") as file:
        for unit, choice in progress(wanted, desc="measuring", unit="format"):
            if (unit.name, choice) in results:
                continue
            swapper.exchange(unit, weight_cache.dequantized(unit, choice))
            evaluation = reference.evaluate(swapper.model)
            swapper.restore(unit)
            results[unit.name, choice] = evaluation
            entry = {
                "unit": unit.name,
                "format": choice.format,
                "rounding": choice.rounding,
                "evaluation": asdict(evaluation),
            }
            file.write("\n" + json.dumps(entry))
            file.flush()
    return results
