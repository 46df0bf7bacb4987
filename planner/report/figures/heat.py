"""What a format costs each unit, layer by kind: one map, coloured for the format that is chosen on the page.

May import: matplotlib, planner.report.places, planner.report.figures.svg.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10

import matplotlib as mpl
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bitplan.planner.report.figures.svg import GRID, STYLE, Plot, svg
from bitplan.planner.report.places import Place

LEVELS = 24
"""Colours of the map, over the decades between a format's least and greatest loss."""
COLOURS = [to_hex(mpl.colormaps["inferno"](0.06 + 0.9 * i / (LEVELS - 1))) for i in range(LEVELS)]


@dataclass(frozen=True)
class HeatMap:
    svg: str
    colours: dict[str, str]
    """Format → CSS rules that colour the cells for it."""
    ends: dict[str, tuple[float, float]]
    """Format → the least and the greatest loss on the map, nats per token."""


def heat_map(
    place: Mapping[str, Place], losses: Mapping[str, Mapping[str, float]], formats: Sequence[str], name: str = "heat"
) -> HeatMap:
    """`losses`: unit → format → nats per token above full precision. Units of one kind and layer (experts) are summed.

    Rows are layers from input to output, columns are kinds; a unit outside of the layers fills a row of its own.
    """
    found: dict[str, dict[str, float]] = {}
    with mpl.rc_context(STYLE):
        plot, cells = _grid(name, "Loss by layer and kind of unit", {unit: place[unit] for unit in losses})
        for at, units, cell in cells:
            summed = {f: sum(losses[u][f] for u in units) for f in formats if all(f in losses[u] for u in units)}
            what = units[0] if len(units) == 1 else f"{len(units)} units of {at.kind} in layer {at.layer}, summed"
            note = f"{what}\n" + "\n".join(f"{format}: {loss:.4g}" for format, loss in summed.items())
            found[plot.mark(cell, note, "cell")] = summed
    ends, colours = {}, {}
    for format in formats:
        positive = [each[format] for each in found.values() if each.get(format, 0) > 0]
        if positive:
            ends[format] = min(positive), max(positive)
            colours[format] = _rules(found, format, *ends[format])
    return HeatMap(svg(plot).replace(' style="fill: #1f77b4"', ""), colours, ends)


def format_map(place: Mapping[str, Place], bits: Mapping[str, float], notes: Mapping[str, str]) -> str:
    """The format of each unit as bits per weight, layer by kind; `notes` are what the cells say when pointed at."""
    low, high = log10(min(bits.values())), log10(max(bits.values()))
    with mpl.rc_context(STYLE):
        plot, cells = _grid(
            "formats", "Bits per weight by layer and kind of unit", {unit: place[unit] for unit in bits}
        )
        for _, units, cell in cells:
            mean = sum(bits[unit] for unit in units) / len(units)
            cell.set_facecolor(mpl.colormaps["viridis"](0.95 * (log10(mean) - low) / ((high - low) or 1.0)))
            plot.mark(cell, "\n".join(notes[unit] for unit in units), "cell")
    return svg(plot)


def _grid(name: str, title: str, place: Mapping[str, Place]) -> tuple[Plot, list[tuple[Place, list[str], Rectangle]]]:
    """Empty cells, each with the units that it stands for: a row for each layer, a column for each kind."""
    units: dict[Place, list[str]] = defaultdict(list)
    for unit, at in place.items():
        units[at].append(unit)
    layers = sorted({at.layer for at in units if at.layer is not None})
    kinds = list(dict.fromkeys(at.kind for at in units if at.layer is not None))
    outside = [at for at in units if at.layer is None]
    first = next((i for i, at in enumerate(units) if at.layer is not None), len(units))
    above = [at for i, at in enumerate(units) if at.layer is None and i < first]
    rows: list[Place | int] = [*above, *layers, *(at for at in outside if at not in above)]
    height, width = max(0.16, min(0.3, 7.5 / len(rows))), max(len(kinds), 4)
    figure = Figure(figsize=(1.0 + 0.36 * width, 1.2 + height * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    cells = []
    for at, names in units.items():
        row = rows.index(at if at.layer is None else at.layer)
        x, span = (0, width) if at.layer is None else (kinds.index(at.kind), 1)
        cell = Rectangle((x, row), span, 1, clip_on=False, linewidth=0.5, edgecolor=GRID)
        axes.add_patch(cell)
        cells.append((at, names, cell))
    axes.set(xlim=(0, width), ylim=(len(rows), 0), ylabel="layer")
    axes.set_xticks([i + 0.5 for i in range(len(kinds))], kinds, rotation=60, ha="left", rotation_mode="anchor")
    every = max(1, round(len(layers) / 20))
    shown = [row for row in rows if isinstance(row, Place) or row % every == 0]
    labels = [row.kind if isinstance(row, Place) else str(row) for row in shown]
    axes.set_yticks([rows.index(row) + 0.5 for row in shown], labels)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return Plot(name, title, figure), cells


def _rules(found: Mapping[str, Mapping[str, float]], format: str, least: float, most: float) -> str:
    levels: dict[int, list[str]] = defaultdict(list)
    decades = log10(most / least) or 1.0
    for gid, losses in found.items():
        loss = losses.get(format)
        if loss is not None:
            at = log10(loss / least) / decades if loss > 0 else 0.0
            levels[round(at * (LEVELS - 1))].append(f"#{gid}")
    return "".join(f"{','.join(gids)}{{fill:{COLOURS[level]}}}" for level, gids in sorted(levels.items()))
