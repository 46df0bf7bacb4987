"""A comparison as CSV, and as one HTML page with its frontier. May import: planner.compare."""

import csv
import io
from collections.abc import Sequence
from html import escape
from math import ceil, floor, log2, log10
from typing import Any

from bitplan.planner.evaluate.compare import ComparisonRow

PLANS, FORMATS = "#c2410c", "#1d4ed8"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; color: #222; background: #fff }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child, th:first-child {{ text-align: left }}
</style>
<h1>{title}</h1>
{picture}
<table><tr>{head}</tr>
{rows}
</table>
{notes}
</html>
"""


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


def html_text(lines: Sequence[ComparisonRow], head: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> str:
    """One page without scripts. `cells` are the rows as the table for the terminal has them."""
    notes = "".join(f"<p>{escape(line.name)}: {escape(line.note)}</p>" for line in lines if line.note)
    notes += "".join(f"<p>{escape(line.name)}: research stage</p>" for line in lines if line.research)
    return PAGE.format(
        title=escape(title),
        picture=frontier_svg(lines),
        head="".join(f"<th>{escape(name)}</th>" for name in head),
        rows="\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells),
        notes=notes,
    )


def frontier_svg(lines: Sequence[ComparisonRow], width: int = 760, height: int = 420) -> str:
    """KL against bits per weight, both by powers; plans are joined by a line."""
    points = sorted(
        (log2(line.bits_per_weight), log10(line.evaluation.kl), line.name)
        for line in lines
        if line.evaluation and line.bits_per_weight and line.evaluation.kl > 0
    )
    if not points:
        return ""
    least = floor(points[0][0])
    most = max(least + 1, ceil(points[-1][0]))
    low = floor(min(y for _, y, _ in points))
    high = max(low + 1, ceil(max(y for _, y, _ in points)))

    def at(x: float, y: float) -> tuple[float, float]:
        return 60 + (x - least) / (most - least) * (width - 130), 30 + (high - y) / (high - low) * (height - 80)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" xmlns="http://www.w3.org/2000/svg" role="img"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for power in range(low, high + 1):
        x, y = at(least, power)
        parts.append(f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{at(most, 0)[0]:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{10.0**power:g}</text>')
    for bits in (1, 2, 3, 4, 6, 8, 16, 32):
        if least <= log2(bits) <= most:
            x, y = at(log2(bits), low)
            parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{bits}</text>')
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 8}" text-anchor="middle">bits per weight, all bytes</text>')
    parts.append('<text x="8" y="16">KL to full precision, nats per token</text>')
    path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y, name in points if _is_plan(name))
    parts.append(f'<polyline points="{path}" fill="none" stroke="{PLANS}" stroke-opacity="0.4"/>')
    told: list[tuple[float, float]] = []
    for weight, level, name in points:
        (x, y), planned = at(weight, level), _is_plan(name)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{PLANS if planned else FORMATS}"/>')
        label = y + 4
        while not planned and any(abs(label - other) < 13 and x - left < 110 for left, other in told):
            label -= 13
        told += [] if planned else [(x, label)]
        where = f'x="{x - 7:.1f}" text-anchor="end"' if planned else f'x="{x + 7:.1f}"'
        color = PLANS if planned else FORMATS
        parts.append(f'<text {where} y="{label:.1f}" fill="{color}">{escape(name.removeprefix("uniform "))}</text>')
    return "\n".join([*parts, "</svg>"])


def _is_plan(name: str) -> bool:
    return name.startswith("plan") or name.endswith(".json")
