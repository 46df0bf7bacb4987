"""A comparison as CSV. May import: planner.evaluate."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from bitplan.planner.evaluate.compare import ComparisonRow


def flat(lines: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """A dict a line, tasks' figures in columns of their own."""
    rows = []
    for line in lines:
        row = line.as_dict()
        for task in row.pop("tasks") or ():
            name = task.pop("task")
            row |= {f"{name} {key}": value for key, value in task.items()}
        rows.append(row)
    return rows


def csv_text(lines: Sequence[ComparisonRow]) -> str:
    rows = flat(lines)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
