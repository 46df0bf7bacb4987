"""`bitplan formats`. May import: everything."""

from argparse import Namespace
from typing import Any

from bitplan.formats.table import DEFAULT_FORMATS, FORMATS
from bitplan.planner.commands.common import emit
from bitplan.planner.report.tables import table


def run(arguments: Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for name, row in FORMATS.items():
        size = row.nbytes(4096, 4096)
        facts = {
            "format": name,
            "bits": row.bits,
            "bits_per_weight": size * 8 / 4096**2,
            "rounding": row.default_rounding,
        }
        rows.append(
            {
                **facts,
                "planned_by_default": name in DEFAULT_FORMATS,
                "research": row.is_research,
                "unavailable": row.unavailable(),
            }
        )
    text = [
        (
            r["format"],
            f"{r['bits_per_weight']:.4f}",
            r["rounding"],
            "yes" if r["planned_by_default"] else "",
            r["unavailable"] or ("research stage" if r["research"] else ""),
        )
        for r in rows
    ]
    head = ("format", "bits per weight of 4096 × 4096", "rounding", "planned by default", "")
    emit(arguments, rows, table(head, text))
