"""Loss over depth, a panel for each kind of unit and a line for each format. May import: matplotlib, planner.report."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil

import matplotlib as mpl
from matplotlib.figure import Figure

from bitplan.planner.report.figures.svg import MUTED, STYLE, Plot, svg
from bitplan.planner.report.places import Place


def depth_curves(
    place: Mapping[str, Place], losses: Mapping[str, Mapping[str, float]], formats: Sequence[str]
) -> str | None:
    """None for a model that has no more than one layer. Line i has the class f{i}."""
    sums: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    for unit, row in losses.items():
        at = place[unit]
        if at.layer is not None:
            for format in formats:
                sums[at.kind][at.layer][format] += row.get(format, float("nan"))
    if not sums or max(map(len, sums.values())) < 2:
        return None
    with mpl.rc_context(STYLE):
        rows = ceil(len(sums) / 2)
        figure = Figure(figsize=(4.2, 0.5 + 1.25 * rows), layout="constrained")
        panels = list(figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat)
        plot = Plot("depth", "Loss over depth, a panel for each kind of unit", figure)
        for panel, (kind, layers) in zip(panels, sums.items(), strict=False):
            panel.set_title(kind, loc="left")
            panel.grid(axis="y")
            for i, format in enumerate(formats):
                points = [(layer, found[format]) for layer, found in sorted(layers.items()) if found[format] > 0]
                if points:
                    [line] = panel.semilogy(*zip(*points, strict=True), color=MUTED)
                    worst = max(points, key=lambda point: point[1])
                    mean = sum(loss for _, loss in points) / len(points)
                    note = f"{kind} in {format}: mean {mean:.4g}, most {worst[1]:.4g} in layer {worst[0]}"
                    plot.mark(line, note, f"curve f{i}")
        for panel in panels[len(sums) :]:
            panel.set_axis_off()
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("nats per token above full precision", fontsize=9)
    return svg(plot)
