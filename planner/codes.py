"""Where the cache keeps a plan's codes, and which are missing.

May import: formats.errors, sensitivity, planner.plan.
"""

from pathlib import Path

from bitplan.formats.errors import CodesMissing
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.sensitivity.store import is_whole, sha256
from bitplan.sensitivity.weight_cache import workspace_of


def codes_folder(plan: Plan) -> Path:
    """Where the cache keeps the codes of this plan, which depend on each other."""
    allocation = repr([(unit.name, unit.format, unit.rounding) for unit in plan.units])
    text = plan.provenance.text
    own = [text.search, *([text.healing] if text.healing else [])] if plan.distilled else []
    return workspace_of(plan.provenance) / "plans" / sha256(allocation, "".join(part.sha256 for part in own))[:24]


def unit_path(folder: Path, unit: str) -> Path:
    return folder / "units" / f"{unit}.safetensors"


def unquantized_path(folder: Path, parameter: str) -> Path:
    """A kept tensor that rounding or healing has changed."""
    return folder / "unquantized" / f"{parameter}.safetensors"


def missing_codes(plan: Plan) -> list[PlannedUnit]:
    """Units whose codes follow from text and are not in the cache."""
    folder = codes_folder(plan)
    return [unit for unit in plan.packed if not is_whole(unit_path(folder, unit.name))] if plan.needs_text else []


def refuse_missing(plan: Plan) -> None:
    """Raises CodesMissing where the cache lacks codes that follow from text."""
    if units := missing_codes(plan):
        raise CodesMissing(
            f"{len(units)} units, {units[0].name} first, are to be rounded ({plan.rounding}) on the plan's calibration"
            f" text ({plan.provenance.text.source}): run `bitplan apply PLAN --text FILE …` once with it, or"
            f" bitplan.load(plan, text=[…])"
        )
