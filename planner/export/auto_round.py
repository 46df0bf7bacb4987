"""auto-round's layer_config, bits and group size per layer.

May import: formats, planner.plan, planner.export.target."""

import json
from typing import Any

from bitplan.planner.export.target import KINDS, Target, group_size, integer, uneven
from bitplan.planner.plan import Plan, PlannedUnit

SIDE = 32
"""auto-round leaves a layer in 16 bits, regardless of its config, unless both sides are multiples of this."""
UNTOUCHED = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}


class AutoRound(Target):
    """Integer formats for Linears and Conv1Ds: 2 to 7 bits, and symmetric 8 bits."""

    name = "auto-round"
    readers = "auto-round"
    joins = False

    def unsupported(self, unit: PlannedUnit) -> str | None:
        if unit.is_native:
            return None
        if unit.kind in KINDS:
            return KINDS[unit.kind]
        format = integer(unit)
        if format is None or (format.bits == 8 and format.zero_point == "asymmetric"):
            return f"in {unit.format}"
        if unit.rows % SIDE or unit.columns % SIDE:
            return f"of {unit.rows} × {unit.columns} weights, not multiples of {SIDE}"
        return uneven(unit)

    def word(self, unit: PlannedUnit) -> str:
        made = entry(unit)
        return "16 bits" if unit.is_native else f"{made['bits']} bits, group_size {made['group_size']}"

    def text(self, plan: Plan) -> str:
        return json.dumps(config(plan), indent=2) + "\n"

    def notes(self, plan: Plan) -> list[str]:
        return [
            "auto-round chooses the codes itself: AutoRound(model, tokenizer, layer_config=json.load(open(FILE)), …)",
            "bytes are those of bitplan's packing: the size of auto-round's files depends on its format=",
        ]


def entry(unit: PlannedUnit) -> dict[str, Any]:
    """The layer_config of a supported unit."""
    format = integer(unit)
    if format is None:
        return UNTOUCHED
    symmetric = format.zero_point == "symmetric"
    sizes = {"bits": format.code_bits, "group_size": group_size(unit), "sym": symmetric}
    return sizes | {"data_type": "int", "act_bits": 16}


def config(plan: Plan) -> dict[str, Any]:
    """Every layer by its exact name, unquantized ones included: auto-round would quantize those by its default."""
    named = {unit.name: entry(unit) for unit in plan.units if unit.kind not in KINDS}
    unquantized = [entry.name.removesuffix(".weight") for entry in plan.unquantized if len(entry.shape) == 2]
    return named | dict.fromkeys(unquantized, UNTOUCHED)
