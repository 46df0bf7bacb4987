"""Lowering of a plan to a target: unsupported formats are refused by name, or changed to the nearest supported ones.

May import: formats, sensitivity, planner.plan, planner.export.gptq_layout, planner.export.target.
"""

from collections import defaultdict
from collections.abc import Iterable

from bitplan.formats.double_quant import DoubleQuantFormat
from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.rounding import ROUNDINGS, rounding_for
from bitplan.formats.table import DEFAULT_FORMATS, DTYPES, FORMATS
from bitplan.planner.export.gptq_layout import FUSED
from bitplan.planner.export.target import Target
from bitplan.planner.plan import Plan, PlannedUnit

CANDIDATES = (*(name for name in DEFAULT_FORMATS if not isinstance(FORMATS[name], DoubleQuantFormat)), "fp8")
"""The formats that `nearest` considers, in addition to each weight's own float dtype; not those that targets expand."""
NAMED = 3


def lower(plan: Plan, target: Target, nearest: bool) -> Plan:
    """A plan that the target supports: `plan` itself, or with `nearest` a changed one.

    Raises FormatUnavailable, which names the unsupported units.
    """
    reasons = _reasons(plan.units, target)
    if not reasons:
        if target.joins and (split := _split(plan)):
            if not nearest:
                raise FormatUnavailable(
                    _message(target, split, ["--keep for all units that servers fuse, or for none"])
                )
            return changed(plan, {name: _native(_unit(plan, name)) for name in split})
        return plan
    lost = [unit.name for unit in plan.units if unit.name in reasons and not _supported([unit], _native(unit), target)]
    if lost:
        raise FormatUnavailable(f"{target.name} does not support {_names(lost)}, {reasons[lost[0]]}, in any format")
    if not nearest:
        raise FormatUnavailable(_message(target, reasons, _remedies(plan, target, reasons)))
    groups: dict[str, list[PlannedUnit]] = defaultdict(list)
    for unit in plan.units:
        groups[unit.group].append(unit)
    formats: dict[str, str] = {}
    for members in groups.values():
        if any(unit.name in reasons for unit in members):
            formats |= dict.fromkeys((unit.name for unit in members), _nearest(members, target))
    return lower(changed(plan, formats), target, nearest)


def changed(plan: Plan, formats: dict[str, str]) -> Plan:
    """The plan with other formats for some units (name → format), and without its measurements and prediction."""
    units = [_in_format(unit, formats.get(unit.name, unit.format)) for unit in plan.units]
    total = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in plan.unquantized)
    packed = any(not unit.is_native for unit in units)
    parts = {
        "units": [unit.model_dump() for unit in units],
        "bytes": total,
        "bits_per_weight": total * 8 / plan.provenance.model.parameters,
        "distilled": plan.distilled and packed,
    }
    return Plan.model_validate(
        plan.model_dump() | parts | dict.fromkeys(("predicted", "search", "measured", "uniform"))
    )


def _in_format(unit: PlannedUnit, name: str) -> PlannedUnit:
    if name == unit.format:
        return unit
    format, weights = FORMATS[name], unit.experts * unit.rows * unit.columns
    if name == _native(unit):
        return unit.model_copy(update={"format": name, "rounding": "nearest", "bytes": int(weights * format.bits) // 8})
    rounding = unit.rounding if ROUNDINGS[unit.rounding].fits(format) else "nearest"
    rounding = rounding_for(format) if unit.is_native else rounding
    size = format.nbytes(unit.experts * unit.rows, unit.columns)
    return unit.model_copy(update={"format": name, "rounding": rounding, "bytes": size})


def _native(unit: PlannedUnit) -> str:
    return DTYPES[unit.dtype]


def _unit(plan: Plan, name: str) -> PlannedUnit:
    return next(unit for unit in plan.units if unit.name == name)


def _reasons(units: Iterable[PlannedUnit], target: Target) -> dict[str, str]:
    return {unit.name: reason for unit in units if (reason := target.unsupported(unit))}


def _supported(members: list[PlannedUnit], name: str, target: Target) -> bool:
    return not _reasons((_in_format(unit, name) for unit in members), target)


def _nearest(members: list[PlannedUnit], target: Target) -> str:
    """The supported format of a whole group whose bytes in the target are nearest to the planned bytes; of equal ones,
    the one with nearer, then with more bytes here."""
    planned = sum(unit.bytes for unit in members)
    distances = []
    for name in dict.fromkeys((*CANDIDATES, _native(members[0]))):
        if _supported(members, name, target):
            units = [_in_format(unit, name) for unit in members]
            there, ours = sum(map(target.nbytes, units)), sum(unit.bytes for unit in units)
            distances.append((abs(there - planned), abs(ours - planned), -ours, name))
    return min(distances)[-1]


def _split(plan: Plan) -> dict[str, str]:
    """Packed units that servers fuse with an unquantized unit or one in another format → the reason."""
    formats = {entry.name.removesuffix(".weight"): "unquantized" for entry in plan.unquantized if len(entry.shape) == 2}
    formats |= {unit.name: unit.format for unit in plan.units}
    packed = {unit.name for unit in plan.packed}
    reasons: dict[str, str] = {}
    for joined, members in FUSED.items():
        for parent in dict.fromkeys(
            name.removesuffix(members[0]) for name in formats if name.endswith(f".{members[0]}")
        ):
            found = [parent + member for member in members if parent + member in formats]
            if len({formats[name] for name in found}) > 1:
                others = [name for name in found if name not in packed] or found
                reason = f"which servers join with {others[0].rpartition('.')[2]} as {joined}, in another format"
                reasons |= {name: reason for name in found if name in packed}
    return reasons


def _names(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _remedies(plan: Plan, target: Target, reasons: dict[str, str]) -> list[str]:
    """Options of `bitplan plan` with which the target would support these units."""
    units = [unit for unit in plan.units if unit.name in reasons]
    candidates = [name for name in CANDIDATES if any(_supported([unit], name, target) for unit in units)]
    keep = [unit.name for unit in units if not any(_supported([unit], name, target) for name in candidates)]
    remedies = [f"--formats {','.join(candidates)}"] if candidates and len(keep) < len(units) else []
    if keep:
        remedies.append(" ".join(f"--keep {name}" for name in keep) if len(keep) <= NAMED else "--keep for the others")
    return remedies


def _message(target: Target, reasons: dict[str, str], remedies: list[str]) -> str:
    """One sentence: which units, why, and what to do."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        by_reason[reason].append(name)
    found = "; ".join(f"{_names(names)}, {reason}" for reason, names in by_reason.items())
    return (
        f"{target.name} does not support {found}: plan again with {' and '.join(remedies)}, or give --nearest to change"
        " their formats"
    )
