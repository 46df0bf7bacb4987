"""An export as a text table. May import: planner.export.target, planner.report.tables."""

from collections import defaultdict

from bitplan.planner.export.target import Exported, ExportedUnit
from bitplan.planner.report.tables import NUMBER, table


def export_text(exported: Exported) -> str:
    """The output of `bitplan export`: formats and bytes of every unit in plan and target, with layers folded; changes
    are marked by →."""
    folded: dict[tuple[str, str, str], list[ExportedUnit]] = defaultdict(list)
    for line in exported.lines:
        ours = line.format if line.format == line.planned else f"{line.planned} → {line.format}"
        folded[NUMBER.sub("*", line.unit), ours, line.word].append(line)
    rows = [
        (
            name,
            f"×{len(lines)}" if len(lines) > 1 else "",
            ours,
            word,
            f"{sum(line.planned_bytes for line in lines):,}",
            f"{sum(line.bytes for line in lines):,}",
            _nats(lines),
        )
        for (name, ours, word), lines in folded.items()
    ]
    there = exported.bytes - sum(line.bytes for line in exported.lines)
    here = sum(entry.bytes for entry in exported.plan.unquantized)
    rows.append(("unquantized", "", "", "", f"{here:,}", f"{there:,}", ""))
    rows.append(("all", "", "", "", f"{exported.planned_bytes:,}", f"{exported.bytes:,}", _nats(exported.lines)))
    target = exported.target
    head = ("unit", "", "plan", target.name, "bytes planned", "bytes exported", "Δ predicted nats")
    return "\n".join([f"for {target.readers}", "", table(head, rows, left=4), "", *exported.notes])


def _nats(lines: list[ExportedUnit] | tuple[ExportedUnit, ...]) -> str:
    if any(line.nats is None for line in lines):
        return "unknown"
    total = sum(line.nats or 0.0 for line in lines)
    return f"{total:+.5f}" if total else "0"
