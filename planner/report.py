"""A comparison as CSV, and as one HTML page with its frontier. May import: planner.compare."""

import csv
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from planner.compare import Line

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; color: #222 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child, th:first-child {{ text-align: left }} svg text {{ font: 12px system-ui, sans-serif }}
</style>
<h1>{title}</h1>
{picture}
<table><tr>{head}</tr>
{rows}
</table>
{notes}
</html>
"""


def flat(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A dict a line, tasks' figures in columns of their own."""
    rows = []
    for line in lines:
        row = line.as_dict()
        for task in row.pop("tasks") or ():
            name = task.pop("task")
            row |= {f"{name} {key}": value for key, value in task.items()}
        rows.append(row)
    return rows


def csv_text(lines: Sequence[Line]) -> str:
    rows = flat(lines)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def html_text(lines: Sequence[Line], head: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> str:
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


def frontier_svg(lines: Sequence[Line], width: int = 760, height: int = 420) -> str:
    """KL against bits per weight, KL by powers of ten."""
    from math import ceil, floor, log10

    points = [
        (line.bits_per_weight, log10(line.judgement.kl), line.name)
        for line in lines
        if line.judgement and line.bits_per_weight and line.judgement.kl > 0
    ]
    if not points:
        return ""
    right = max(4.0, *(x for x, _, _ in points)) * 1.05
    low, high = floor(min(y for _, y, _ in points)), ceil(max(y for _, y, _ in points) + 0.01)

    def at(x: float, y: float) -> tuple[float, float]:
        return 60 + x / right * (width - 160), 20 + (high - y) / (high - low) * (height - 70)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" xmlns="http://www.w3.org/2000/svg" role="img">']
    for power in range(low, high + 1):
        x, y = at(0, power)
        parts.append(f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{width - 100}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{10.0**power:g}</text>')
    for bits in range(0, int(right) + 1, 2 if right < 20 else 4):
        x, y = at(bits, low)
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{bits}</text>')
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 8}" text-anchor="middle">bits per weight, all bytes</text>')
    parts.append('<text x="8" y="14">KL to full precision, nats per token</text>')
    for x, y, name in points:
        px, py = at(x, y)
        color = "#c2410c" if name.startswith("plan") or name.endswith(".json") else "#1d4ed8"
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{px + 7:.1f}" y="{py + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])
