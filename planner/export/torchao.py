"""torchao's TorchAoConfig(FqnToConfig(…)), as the JSON that transformers reads.

May import: formats, planner.plan, planner.export.target.
"""

import json
from typing import Any

from bitplan.formats.floats import Float8Format
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.table import FORMATS
from bitplan.planner.export.target import KINDS, Target, uneven
from bitplan.planner.plan import Plan, PlannedUnit

ROWS = {"granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}}
TILE = (8, 1024)
"""Rows and columns that torchao's 4-bit packing rounds up to."""


class TorchAo(Target):
    """int8 and fp8 with a scale per row, and 4 bits in groups, which torchao packs.

    Its IntxWeightOnlyConfig supports other widths, but stores each code in a byte, which saves nothing.
    """

    name = "torchao"
    readers = "torchao in transformers"

    def unsupported(self, unit: PlannedUnit) -> str | None:
        if unit.is_native:
            return None
        if unit.kind != "linear":
            return KINDS.get(unit.kind, "a Conv1D, which torchao ignores")
        return uneven(unit) if entry(unit) else f"in {unit.format}"

    def word(self, unit: PlannedUnit) -> str:
        made = entry(unit)
        if made is None:
            return "not quantized"
        group = f", group_size {made['_data']['group_size']}" if "group_size" in made["_data"] else ""
        return made["_type"].removesuffix("Config") + group

    def nbytes(self, unit: PlannedUnit) -> int:
        """Codes with float32 scales (and, for int8, a byte of zero point) per row; 4 bits padded to whole tiles, with
        scale and zero in bfloat16."""
        if unit.is_native:
            return unit.bytes
        format = FORMATS[unit.format]
        if isinstance(format, IntegerFormat) and format.bits == 4:
            rows, columns = (
                -(-side // tile) * tile for side, tile in zip((unit.rows, unit.columns), TILE, strict=True)
            )
            return rows * columns // 2 + 4 * rows * (columns // format.group)
        return unit.rows * (unit.columns + (4 if isinstance(format, Float8Format) else 5))

    def text(self, plan: Plan) -> str:
        return json.dumps(config(plan), indent=2) + "\n"

    def notes(self, plan: Plan) -> list[str]:
        notes = ["torchao rounds to nearest while it loads: the plan's codes are not used, its allocation is"]
        if any(FORMATS[unit.format].bits == 4 for unit in plan.packed):
            notes.append("4 bits need a CUDA GPU of compute capability 8.0, and loading with dtype=torch.bfloat16")
        return notes


def entry(unit: PlannedUnit) -> dict[str, Any] | None:
    """The dict that torchao's config_to_dict makes of a unit's config; None for a unit without one."""
    format = FORMATS[unit.format]
    if unit.is_native:
        return None
    if format.name == "int8":
        return _config("Int8WeightOnlyConfig", ROWS)
    if isinstance(format, Float8Format):
        return _config(
            "Float8WeightOnlyConfig", {"weight_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}} | ROWS
        )
    if isinstance(format, IntegerFormat) and format.bits == 4 and format.group and unit.columns >= format.group:
        packing = {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"}
        return _config("Int4WeightOnlyConfig", {"group_size": format.group, "int4_packing_format": packing})
    return None


def _config(name: str, data: dict[str, Any], version: int = 2) -> dict[str, Any]:
    return {"_type": name, "_version": version, "_data": data}


def config(plan: Plan) -> dict[str, Any]:
    """The quantization_config. Modules with the config None are not quantized."""
    linears = [unit for unit in plan.units if unit.kind == "linear"]
    # Given a module's name, transformers 5.23 quantizes its bias too, and fails: with a bias, the weight is named.
    biases = {entry.name for entry in plan.unquantized}
    named = {unit.parameter if f"{unit.name}.bias" in biases else unit.name: entry(unit) for unit in linears}
    head = any("." not in unit.name and not unit.is_native for unit in linears)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": _config("FqnToConfig", {"fqn_to_config": named}, version=1)},
        # Otherwise transformers skips the head, regardless of its entry.
        "include_input_output_embeddings": head,
        "modules_to_not_convert": None,
        "untie_embedding_weights": False,
    }
