"""One format for every unit, as a plan. May import: formats, sensitivity, planner.audit/plan/session."""

from collections.abc import Sequence

from bitplan.formats.errors import FormatUnavailable, UsageError
from bitplan.formats.floats import FloatFormat
from bitplan.formats.rounding import refuse_misfit, rounding_for
from bitplan.formats.table import FORMATS, format_named
from bitplan.planner.plan import Budget, Plan, PlannedUnit
from bitplan.sensitivity.audit import kept_entry, unit_entry
from bitplan.sensitivity.bank import Choice, unit_bytes
from bitplan.sensitivity.session import Session

COMPARED = ("fp32", "bf16", "fp16", "fp8", "int8", "int4-g64", "nf4", "binary-g64")
"""What `compare` shows unless told otherwise."""


def uniform_plan(session: Session, format: str, rounding: str | None = None, healed: bool = False) -> Plan:
    """The plan that gives every unit one format. Raises UnknownFormat, FormatUnavailable, UsageError."""
    row = format_named(format)
    if reason := row.unavailable():
        raise FormatUnavailable(f"{row.name} cannot run here: {reason}")
    refuse_misfit(rounding, [row])
    choice = Choice(row.name, rounding_for(row, rounding))
    units = []
    for unit in session.graph.units:
        own = Choice(row.name, "nearest") if row.name == unit.native else choice
        facts = dict(unit_entry(unit))
        units.append(PlannedUnit(**facts, format=own.format, rounding=own.rounding, bytes=unit_bytes(unit, own.format)))
    kept = tuple(kept_entry(tensor) for tensor in session.graph.kept)
    total = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in kept)
    return Plan(
        budget=Budget(asked=f"uniform {choice}{', healed' if healed else ''}", weights=total),
        bytes=total,
        bits_per_weight=total * 8 / session.provenance.model.parameters,
        shipped="uniform",
        units=tuple(units),
        kept=kept,
        healed=healed and any(not unit.is_native for unit in units),
        provenance=session.provenance,
    )


def parse_formats(text: str | None, default: Sequence[str]) -> tuple[str, ...]:
    """Full names from a list with commas. Raises UnknownFormat."""
    names = [name.strip() for name in text.split(",") if name.strip()] if text else default
    if not names:
        raise UsageError(f"--formats {text!r} names none; `bitplan formats` lists them")
    return tuple(dict.fromkeys(format_named(name).name for name in names))


def is_float(format: str) -> bool:
    return isinstance(FORMATS[format], FloatFormat)
