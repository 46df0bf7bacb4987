"""An Optuna study drawn by Optuna: the losses of its trials, which corrections mattered, loss against bytes.

Optuna draws for a white screen; its figures get the page's colours here. May import: matplotlib, optuna,
planner.report.figures.svg.
"""

import warnings
from collections.abc import Callable
from functools import partial

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances, plot_pareto_front

from bitplan.planner.report.figures.svg import FIRST, GRID, INK, MUTED, SECOND, STYLE, Plot, svg

TRIAL, BYTES, LOSS = "trial", "bytes of all tensors", "loss, nats"


def history(study: optuna.Study) -> str:
    """Losses of finished trials by their numbers, and the least so far."""
    axes = partial(plot_optimization_history, study)
    return _drawn("history", "Losses of the trials", axes, TRIAL, LOSS)


def importances(study: optuna.Study) -> str:
    """Of the parameters, by PED-ANOVA (Watanabe et al. 2023), whose evaluator needs nothing beside Optuna."""

    def axes() -> Axes:
        return plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator())

    return _drawn("importances", "Importance of the corrections", axes, "importance", "correction")


def pareto_front(study: optuna.Study) -> str:
    """Of a study with two objectives, bytes and loss."""
    axes = partial(plot_pareto_front, study, target_names=[BYTES, LOSS])
    return _drawn("pareto", "Loss against bytes", axes, BYTES, LOSS)


def _drawn(name: str, title: str, draw: Callable[[], Axes], xlabel: str, ylabel: str) -> str:
    with mpl.rc_context(), warnings.catch_warnings():  # Optuna changes the style of all figures
        warnings.simplefilter("ignore", ExperimentalWarning)
        axes = draw()
        figure = axes.figure
        assert isinstance(figure, Figure)
        plt.close(figure)
    with mpl.rc_context(STYLE):
        figure.set(size_inches=(4.4, 3.4), layout_engine="constrained", facecolor="none")
        _style(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if xlabel in (TRIAL, BYTES):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        return svg(Plot(name, title, figure))


def _style(axes: Axes) -> None:
    axes.set(title="", facecolor="none", axisbelow=True)
    axes.set_title("", loc="left")
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=MUTED, linewidth=0.6)
    for text in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
        text.set(color=INK, fontsize=9)
    dots = [each for each in axes.collections if np.size(each.get_offsets())]
    for place, each in enumerate(dots):
        each.set(color=SECOND if place and place == len(dots) - 1 else FIRST)
    for line in axes.lines:
        line.set_color(SECOND)
    for bar in axes.patches:
        bar.set_color(FIRST)
    if axes.get_legend() and len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    elif legend := axes.get_legend():
        legend.remove()
