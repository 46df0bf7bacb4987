"""The frontier of loss against size, and predicted against measured losses. May import: matplotlib, planner.report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bitplan.planner.report.figures.svg import FIRST, INK, MUTED, SECOND, STYLE, Plot, svg

MANY = 600
"""Points above which a cloud is drawn as one picture: each would be some hundred bytes."""


@dataclass(frozen=True)
class Dot:
    """A named point: bits per weight over all bytes, and loss in nats per token."""

    name: str
    bits: float
    loss: float
    note: str
    own: bool = False
    """A plan of ours, not a uniform format."""


def frontier_plot(
    dots: Sequence[Dot],
    line: Sequence[tuple[float, float]] = (),
    knee: Dot | None = None,
    ylabel: str = "nats per token above full precision",
    alone: bool = False,
) -> str:
    """Loss over bits per weight, the loss by powers of ten. `line` is the frontier; without one, plans are joined."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.2) if alone else (4.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        plot = Plot("frontier", "Loss against size", figure)
        path = list(line) or sorted((dot.bits, dot.loss) for dot in dots if dot.own)
        least = min((dot.loss for dot in dots if dot.loss > 0), default=1.0) / 30  # further down is full precision
        shown = [(bits, loss) for bits, loss in path if loss > least]
        if len(shown) > 1:
            axes.plot(*zip(*shown, strict=True), color=SECOND, linewidth=1.4, alpha=0.6, zorder=1)
        placed: list[tuple[float, float, float]] = []
        for dot in sorted((dot for dot in dots if dot.loss > 0), key=lambda dot: dot.loss):
            colour = SECOND if dot.own else FIRST
            [mark] = axes.plot(dot.bits, dot.loss, "o", color=colour, markersize=5, zorder=3)
            plot.mark(mark, dot.note)
        if knee and knee.loss > 0:
            [mark] = axes.plot(knee.bits, knee.loss, "D", color=SECOND, markersize=6, zorder=4)
            plot.mark(mark, knee.note)
        axes.set(xlabel="bits per weight, all bytes counted", ylabel=ylabel)
        _log(axes)
        figure.draw_without_rendering()
        for x, y in (_points(axes, dot) for dot in dots if dot.loss > 0):
            placed.append((x - 3, x + 3, y - 3))
        for dot in [*([knee] if knee else []), *dots]:
            if dot.loss > 0:
                _label(axes, dot, placed)
        axes.grid(visible=True)
    return svg(plot, alone)


def _log(axes: Axes) -> None:
    """Both axes by powers; bits are labelled by their number, at steps that people know."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(0.08, 0.16)
    low, high = axes.get_xlim()
    ticks = [bits for bits in (1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 32) if low <= bits <= high]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _points(axes: Axes, dot: Dot) -> tuple[float, float]:
    """Where a dot is, in typographic points from the figure's lower left corner."""
    x, y = axes.transData.transform((dot.bits, dot.loss))
    return x * 72 / axes.figure.dpi, y * 72 / axes.figure.dpi


def _label(axes: Axes, dot: Dot, placed: list[tuple[float, float, float]]) -> None:
    """A name where it is in the figure and clear of the others: beside its point, else above or below, else not at
    all."""
    x, y = _points(axes, dot)
    wide, most = 5.0 * len(dot.name), 72 * axes.figure.bbox.width / axes.figure.dpi
    right = [(7, -3), (5, 7), (5, 17), (5, 27)]
    ways = [*((-dx, dy) for dx, dy in right), *right] if dot.own else [*right, (-7, -3), (-7, -10), (-7, -20), (-5, 7)]
    for dx, dy in ways:
        left, level = (x + dx if dx > 0 else x + dx - wide), y + dy
        if left < 0 or left + wide > most:
            continue
        if all(abs(level - other) >= 10 or left > end or left + wide < start for start, end, other in placed):
            placed.append((left, left + wide, level))
            side: Literal["left", "right"] = "left" if dx > 0 else "right"
            colour = SECOND if dot.own else FIRST
            at = axes.annotate(dot.name, (dot.bits, dot.loss), (dx, dy), textcoords="offset points", ha=side)
            at.set(color=colour, fontsize=8, in_layout=False)
            return


def agreement_plot(points: Sequence[tuple[str, float, float]]) -> str:
    """Predicted against measured loss of single units; `points` are name, predicted, measured."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        plot = Plot("agreement", "Predicted against measured loss", figure)
        clear = [(name, a, b) for name, a, b in points if a > 0 and b > 0]
        if len(clear) > MANY:
            x, y = [a for _, a, _ in clear], [b for _, _, b in clear]
            axes.plot(x, y, "o", color="#4f7bd9", markersize=3, alpha=0.6, rasterized=True)
        else:
            for name, predicted, measured in clear:
                [mark] = axes.plot(predicted, measured, "o", color=FIRST, markersize=3.5, alpha=0.7)
                plot.mark(mark, f"{name}: predicted {predicted:.4g}, measured {measured:.4g}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        low = min(min(a, b) for _, a, b in clear)
        high = max(max(a, b) for _, a, b in clear)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate("equal", (high, high), color=INK, fontsize=8, ha="right", va="bottom")
        axes.set(xlabel="predicted, nats per token", ylabel="measured KL, nats per token")
        axes.grid(visible=True)
    return svg(plot)
