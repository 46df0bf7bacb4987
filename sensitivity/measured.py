"""Measure units one at a time: exchange, run, restore. May import: sensitivity.bank/graph/loss.

Each result is a line of a file as soon as it is known, so that an interrupted measurement goes on where it was.
"""

import json
from dataclasses import asdict
from pathlib import Path

from bitplan.sensitivity.bank import Bank, Choice, Workbench
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.loss import Judgement, Reference
from bitplan.sensitivity.progress import progress

Measured = dict[tuple[str, Choice], Judgement]


def measure(
    bench: Workbench, bank: Bank, reference: Reference, wanted: list[tuple[Unit, Choice]], journal: Path
) -> Measured:
    """Judge the model with one unit in one choice, for each wanted pair. `journal` holds what is known already."""
    results: Measured = {}
    if journal.exists():
        for line in journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that an interruption cut
            results[entry["unit"], Choice(entry["format"], entry["rounding"])] = Judgement(**entry["judgement"])
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a") as file:
        for unit, choice in progress(wanted, desc="measuring", unit="format"):
            if (unit.name, choice) in results:
                continue
            bench.exchange(unit, bank.dequantized(unit, choice))
            judgement = reference.judge(bench.model)
            bench.restore(unit)
            results[unit.name, choice] = judgement
            entry = {
                "unit": unit.name,
                "format": choice.format,
                "rounding": choice.rounding,
                "judgement": asdict(judgement),
            }
            file.write("\n" + json.dumps(entry))
            file.flush()
    return results
