"""Figures and tables that show a profile, on the page of an audit and on that of a plan.

May import: formats, search, sensitivity, planner.report.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

from scipy.stats import spearmanr

from bitplan.formats.sizes import format_bytes
from bitplan.planner.report.figures.curves import depth_curves
from bitplan.planner.report.figures.heat import COLOURS, HeatMap, heat_map
from bitplan.planner.report.figures.scatter import Dot, agreement_plot, frontier_plot
from bitplan.planner.report.losses import Losses
from bitplan.planner.report.page.facts import number
from bitplan.planner.report.page.render import PageFigure, PageTable
from bitplan.search.frontier import Point, frontier, knee
from bitplan.search.problem import Problem
from bitplan.sensitivity.profile import Profile

SHOWN = 200
"""Points of the frontier that are drawn: it has one for each step of each group."""


def heat_figure(losses: Losses, heat: HeatMap) -> PageFigure:
    return PageFigure(
        "Loss by layer and kind",
        heat.svg,
        "Nats per token above full precision with one unit alone in the format, by powers of ten from the least to the"
        " greatest on this map. Input at the top; a unit outside of the layers fills a row.",
        by_format=True,
        ends=[tuple(map(number, heat.ends[f])) if f in heat.ends else ("0", "0") for f in losses.formats],  # type: ignore[misc]
        gradient=", ".join(COLOURS[::4]),
    )


def depth_figure(losses: Losses) -> list[PageFigure]:
    curves = depth_curves(losses.place, losses.costs, losses.formats)
    caption = "A line for each format, all on one scale; the chosen one is drawn strong."
    return [PageFigure("Loss over depth", curves, caption, by_format=True)] if curves else []


@dataclass(frozen=True)
class SensitivityParts:
    """What the pages of an audit and of a plan both show of a profile."""

    figures: list[PageFigure]
    tables: list[PageTable]
    choice: dict[str, Any]
    """Fields of a Page by which a format is chosen on it."""


@dataclass(frozen=True)
class Sizes:
    """The frontier of a profile, whose bytes are without the `kept` ones of unquantized tensors."""

    points: list[Point]
    knee: Point
    kept: int
    parameters: int

    def bits(self, nbytes: int) -> float:
        """Bits per weight of so many bytes in all."""
        return nbytes * 8 / self.parameters

    def best(self, nbytes: int) -> Point | None:
        """The frontier's point for at most so many bytes in all, or None where there is none."""
        return max(
            (point for point in self.points if point.nbytes + self.kept <= nbytes),
            key=lambda point: point.nbytes,
            default=None,
        )


def sizes_of(problem: Problem) -> Sizes:
    points = frontier(problem.options)
    return Sizes(points, knee(points), problem.profile.unquantized_bytes, problem.profile.provenance.model.parameters)


def frontier_figure(losses: Losses, sizes: Sizes, plans: Sequence[Dot] = ()) -> PageFigure:
    every = max(1, len(sizes.points) // SHOWN)
    line = [(sizes.bits(p.nbytes + sizes.kept), p.loss) for p in [*sizes.points[::every], sizes.points[-1]]]
    dots = [
        Dot(format, sizes.bits(nbytes), loss, _note(f"uniform {format}", nbytes, sizes.bits(nbytes), loss))
        for format in losses.formats
        if (found := losses.total(format)) and (nbytes := found[0]) and (loss := found[1])
    ]
    at, total = sizes.knee, sizes.knee.nbytes + sizes.kept
    mark = Dot("knee", sizes.bits(total), at.loss, _note("knee", total, sizes.bits(total), at.loss), own=True)
    return PageFigure(
        "Loss against size",
        frontier_plot([*dots, *plans], line, mark, ylabel="predicted nats per token"),
        f"The line is the least summed loss that any allocation reaches. Its knee is at"
        f" {sizes.bits(total):.2f} bits per weight, {format_bytes(total)}, {number(at.loss)} nats per token: before it"
        " bytes gain much, after it little (Kneedle, on linear axes). Dots are uniform formats, predicted, and plans.",
    )


def _note(name: str, nbytes: int, bits: float, loss: float) -> str:
    return f"{name}\n{nbytes:,} bytes ({format_bytes(nbytes)})\n{bits:.3f} bits per weight\n{loss:.5g} nats per token"


def sensitivity_parts(losses: Losses, sizes: Sizes, plans: Sequence[Dot] = ()) -> SensitivityParts:
    """The parts of a profile that can take formats; `plans` are dots beside its frontier."""
    heat = heat_map(losses.place, losses.costs, losses.formats)
    figures, tables = agreement(losses)
    return SensitivityParts(
        figures=[
            heat_figure(losses, heat),
            frontier_figure(losses, sizes, plans),
            *depth_figure(losses),
            *figures,
        ],
        tables=[ranking_table(losses), uniform_table(losses, sizes), *tables],
        choice={
            "formats": losses.formats,
            "chosen": losses.usual,
            "colours": heat.colours,
            "data": ranking_data(losses),
        },
    )


def uniform_table(losses: Losses, sizes: Sizes) -> PageTable:
    """Each format for all units, and what the frontier has for the same bytes."""
    rows = []
    for format in losses.formats:
        found = losses.total(format)
        if found is None:
            few = sum(format in row for row in losses.rows.values())
            rows.append((format, "–", "–", f"only {few} of {len(losses.rows)} units", "–"))
            continue
        nbytes, loss = found
        best = sizes.best(nbytes)
        rows.append(
            (format, f"{nbytes:,}", f"{sizes.bits(nbytes):.3f}", number(loss), number(best.loss) if best else "–")
        )
    head = ("format", "bytes", "bits per weight", "summed loss", "mixed, same bytes")
    return PageTable("One format for all units", head, rows, note="Predicted, in nats per token.")


def ranking_table(losses: Losses) -> PageTable:
    """Units in the format shown first, those that lose most for each byte saved on top."""
    format = losses.usual
    units = [unit for unit, row in losses.rows.items() if format in row]
    total = sum(losses.cost(unit, format) for unit in units) or 1.0
    rows = []
    for unit in sorted(units, key=lambda unit: -losses.per_mib(unit, format)):
        loss, saved, price = losses.cost(unit, format), losses.saved(unit, format), losses.per_mib(unit, format)
        rows.append(
            (unit, number(loss), f"{saved:,}", number(price) if saved > 0 else "–", f"{100 * loss / total:.1f} %")
        )
    head = ("unit", "loss", "bytes saved", "loss per MiB saved", "of all loss")
    note = (
        f"Made for {format}; with scripts it follows the format chosen above. First are the units that lose most"
        " for each byte saved."
    )
    return PageTable("Units by loss for each byte saved", head, rows, note=note, name="ranking")


def ranking_data(losses: Losses) -> dict[str, list]:
    """What the page's script needs to rank the units for another format."""
    formats = losses.formats
    return {
        "units": list(losses.rows),
        "formats": formats,
        "losses": [[float(number(r[f].cost)) if f in r else None for f in formats] for r in losses.rows.values()],
        "saved": [[losses.saved(u, f) if f in r else None for f in formats] for u, r in losses.rows.items()],
    }


def agreement(losses: Losses) -> tuple[list[PageFigure], list[PageTable]]:
    """Predicted against measured, where units were measured one at a time."""
    check = losses.profile.check
    measured = check.rows if check else [row for rows in losses.rows.values() for row in rows.values()]
    found = [
        (f"{row.unit} in {row.format}", row.predicted_nll, row.measured_kl, row.format)
        for row in measured
        if row.measured_kl is not None
    ]
    if len([1 for _, a, b, _ in found if a > 0 and b > 0]) < 3:
        return [], []
    rows = []
    for format in ("all", *dict.fromkeys(format for *_, format in found)):
        pairs = [(a, b) for _, a, b, own in found if format in ("all", own)]
        ratios = sorted(b / a for a, b in pairs if a > 0)
        rank = spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic if len(pairs) > 2 else nan
        middle = f"{ratios[len(ratios) // 2]:.2f}" if ratios else "–"
        rows.append((format, str(len(pairs)), "–" if isnan(rank) else f"{rank:.3f}", middle))
    overall = rows[0][2]
    figure = PageFigure(
        "Predicted against measured",
        agreement_plot([(name, a, b) for name, a, b, _ in found]),
        f"Each point is one unit alone in one format: {len(found)} of them, rank correlation {overall} (Spearman).",
    )
    head = ("format", "measured units", "Spearman", "measured / predicted, median")
    return [figure], [PageTable("Agreement of predicted and measured losses", head, rows)]


def cache_table(profile: Profile) -> list[PageTable]:
    rows = [
        (row.format, number(row.kl), "–" if row.kl_se is None else number(row.kl_se), number(row.delta_nll))
        for row in profile.kv_cache
    ]
    head = ("format", "KL", "± standard error", "loss above full precision")
    note = "With full-precision weights, nats per token on the search text."
    return [PageTable("KV cache", head, rows, note=note)] if rows else []
