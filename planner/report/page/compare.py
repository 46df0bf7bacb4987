"""The page of a comparison: the frontier of measured KL, and the table.

May import: planner.evaluate, planner.report.
"""

from collections.abc import Sequence

from bitplan.formats.sizes import format_bytes
from bitplan.planner.evaluate.compare import ComparisonRow
from bitplan.planner.report.comparison import compare_cells
from bitplan.planner.report.figures.scatter import Dot, frontier_plot
from bitplan.planner.report.page.facts import model_name, provenance
from bitplan.planner.report.page.render import Page, PageFigure, PageTable
from bitplan.planner.report.tables import with_error
from bitplan.sensitivity.profile import Provenance


def compare_page(lines: Sequence[ComparisonRow], facts: Provenance) -> Page:
    head, rows = compare_cells(lines)
    notes = [f"{line.name}: {line.note}" for line in lines if line.note]
    notes += [f"{line.name}: research stage" for line in lines if line.research]
    title = model_name(facts.model.id)
    figures = []
    if picture := frontier_svg(lines):
        caption = "KL to full precision on the held-out text; plans are joined by a line."
        figures.append(PageFigure("Loss against size", picture, caption))
    note = "Measured on the held-out text, one model in memory at a time."
    if any(line.tasks for line in lines):
        note += (
            " Tasks: the figure, and in brackets its difference from full precision on the same items, 95 % interval."
        )
    return Page(
        title=title,
        lead=f"Formats and plans side by side: {facts.model.parameters:,} parameters in {facts.model.dtype}.",
        figures=figures,
        tables=[PageTable("Formats and plans", ["format or plan", *head[1:]], rows, note=note)],
        provenance=provenance(facts),
        findings=notes,
    )


def frontier_svg(lines: Sequence[ComparisonRow]) -> str:
    """KL over bits per weight as SVG; empty where no row has both."""
    dots = [
        Dot(
            line.name.removeprefix("uniform "),
            line.bits_per_weight,
            line.evaluation.kl,
            f"{line.name}\n{line.resident_bytes:,} bytes ({format_bytes(line.resident_bytes)})\n"
            f"{line.bits_per_weight:.3f} bits per weight\n"
            f"KL {with_error(f'{line.evaluation.kl:.5f}', line.evaluation.kl_se)}",
            own=is_plan(line.name),
        )
        for line in lines
        if line.evaluation and line.bits_per_weight and line.resident_bytes and line.evaluation.kl > 0
    ]
    return frontier_plot(dots, ylabel="KL to full precision, nats per token") if dots else ""


def is_plan(name: str) -> bool:
    return name.startswith("plan") or name.endswith(".json")
