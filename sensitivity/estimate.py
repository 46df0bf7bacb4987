"""The loss that a format makes in a unit, from the unit's statistics and some of its rows: no model, no whole moment.

    nearest   nats per token = 1/2 * Σ_o G_oo Σ_j A_jj ΔW_oj²
    gptq      nats per token = κ * 1/2 * Σ_o G_oo Σ_j e_oj² d_j

with e the error of rounding W on the format's grid and d what an error costs that GPTQ makes at a column's turn and
spreads over the later ones (`statistics.pivots`); 1 / d is what is left of a column's variance when the later columns
are known. GPTQ rounds weights that earlier errors have moved, which costs some more at few bits: κ, one number a
format, is what running GPTQ on a few units loses, over what is estimated. Lookups have their own term, in which a row's
frequency stands for G and the gradients of the lookup's output for A.

Rows that stand for the others are drawn in proportion to what zeroing them would cost.
May import: formats, sensitivity.graph/statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bitplan.formats.base import Format
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.rounding import Hessian
from bitplan.formats.rounding.gptq import gptq_codes
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import format_named
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.statistics import Statistics

ROWS = 128
"""Rows of a unit that are rounded to score a format."""
RUN_ROWS = 64
"""Rows on which GPTQ itself is run."""


@dataclass(frozen=True)
class Sample:
    """Rows that stand for a unit: float32 `weight` [n, columns], each from `expert` [n], with what a squared error in
    a column counts there. The loss is half the sum over rows of `share` [n] times

        products [n] * Σ_j inputs[expert, j] * error²  +  lookups [n] * Σ_j lookup_gradients[j] * error²
    """

    weight: Tensor
    expert: Tensor
    share: Tensor
    products: Tensor | None
    lookups: Tensor | None
    statistics: Statistics

    def importance(self, expert: int) -> Tensor:
        """What a column counts where GPTQ fits its grid: [columns]."""
        found = self.statistics
        if found.inputs is None:
            assert found.lookup_gradients is not None
            counted = found.lookup_gradients
        elif found.lookup_gradients is None:
            counted = found.inputs[expert]
        else:
            assert found.frequencies is not None and found.gradients is not None
            counted = found.gradients[0].mean() * found.inputs[0] + found.frequencies.mean() * found.lookup_gradients
        return counted if bool((counted > 0).any()) else torch.ones_like(counted)

    def loss(self, errors: Tensor, pivots: bool = False) -> float:
        """Nats per token of squared errors [n, columns]; `pivots`: of those that GPTQ makes at a column's turn."""
        found, total = self.statistics, torch.zeros(len(errors), dtype=torch.float64, device=errors.device)
        if self.products is not None:
            costs = found.pivots if pivots else found.inputs
            assert costs is not None
            total += self.products.double() * (errors * costs[self.expert]).sum(-1).double()
        if self.lookups is not None:
            costs = found.lookup_pivots if pivots and found.lookup_pivots is not None else found.lookup_gradients
            assert costs is not None
            total += self.lookups.double() * (errors @ costs).double()
        return float((total * self.share.double()).sum() / 2)


def sample(unit: Unit, weight: Tensor, statistics: Statistics, rows: int = ROWS) -> Sample:
    """Rows of a unit's float32 weight [experts * rows, columns], all of them where they are no more than `rows`."""
    products = None if statistics.gradients is None else statistics.gradients.flatten()
    size = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if products is not None:
        assert statistics.inputs is not None
        squares = weight.view(unit.experts, unit.rows, -1).square()
        size += (squares @ statistics.inputs.unsqueeze(-1)).flatten().double() * products.double()
    if statistics.frequencies is not None:
        assert statistics.lookup_gradients is not None
        size += (weight.square() @ statistics.lookup_gradients).double() * statistics.frequencies.double()
    if len(weight) <= rows or not float(size.sum()) > 0:
        at, share = torch.arange(min(len(weight), rows)), torch.ones(min(len(weight), rows))
    else:
        ends = size.cumsum(0)
        points = (torch.arange(rows, device=ends.device) + 0.5) / rows * ends[-1]
        at, counts = torch.searchsorted(ends, points).clamp(max=len(weight) - 1).unique(return_counts=True)
        share = counts * ends[-1] / (rows * size[at])
        # The rows of the largest weights, where a format's scales overflow first, though they may count for nothing.
        peaks = torch.stack([weight.amax(-1).argmax(), weight.amin(-1).argmin()])
        at, share = torch.cat([at, peaks]), torch.cat([share, torch.zeros(2).to(share)])
    at, share = at.to(weight.device), share.to(weight.device, torch.float32)
    return Sample(
        weight[at],
        at // unit.rows,
        share,
        None if products is None else products[at],
        None if statistics.frequencies is None else statistics.frequencies[at],
        statistics,
    )


def estimate(drawn: Sample, scheme: QuantScheme) -> float:
    """Predicted nats per token of a unit in a scheme, GPTQ's without κ; NaN or infinity where a value overflows."""
    format = format_named(scheme.format)
    if scheme.rounding == "nearest":
        return drawn.loss(_nearest(drawn.weight, format))
    assert isinstance(format, IntegerFormat)
    errors = torch.empty_like(drawn.weight)
    for expert in drawn.expert.unique().tolist():
        at = drawn.expert == expert
        errors[at] = _on_grid(drawn.weight[at], format, drawn.importance(expert))
    return drawn.loss(errors, pivots=True)


def _nearest(weight: Tensor, format: Format) -> Tensor:
    """Squared errors of rounding weight [n, columns] as the format does by itself."""
    return (format.dequantize(format.quantize(weight), weight.shape[-1], torch.float32) - weight).square()


def _on_grid(weight: Tensor, format: IntegerFormat, importance: Tensor) -> Tensor:
    """Squared errors of rounding weight [n, columns] to the nearest on the grid that GPTQ fits."""
    columns = weight.shape[1]
    weight = weight.masked_fill(importance <= 0, 0)  # columns that no input reached
    grid = format.fitted_grids(weight, importance)
    whole = Grid(format.over_columns(grid.scale, columns), format.over_columns(grid.zero, columns))
    return (format.decode(format.encode(weight, whole), whole) - weight).square()


def relative_error(weight: Tensor, scheme: QuantScheme, rows: int = ROWS) -> float:
    """The squared error of a weight [rows, columns] in a scheme over its square, on some of its rows. Perplexity grows
    about linearly in it, by a factor of each layer's own (Malinovskii et al. 2024, the linearity theorem): without any
    text that factor is unknown, and taken as one nat per token for all."""
    drawn = weight[:: -(-len(weight) // rows)]
    format = format_named(scheme.format)
    if scheme.rounding == "nearest":
        errors = _nearest(drawn, format)
    else:
        assert isinstance(format, IntegerFormat)
        errors = _on_grid(drawn, format, torch.ones_like(drawn[0]))
    return float(errors.double().sum() / drawn.double().square().sum().clamp(min=1e-30))


def gptq_ratio(drawn: Sequence[Sample], format: IntegerFormat) -> float:
    """κ: the median over sampled units of what GPTQ loses over what is estimated, 1 where there are none."""
    ratios = []
    for one in drawn:
        assert one.statistics.moment is not None
        hessian = Hessian(one.statistics.moment[0])
        codes, grid, _ = gptq_codes(one.weight, format, [hessian])
        rounded = format.dequantize(format.store(codes, grid), one.weight.shape[1], torch.float32)
        change = rounded - one.weight
        assert one.products is not None
        squares = ((change @ one.statistics.moment[0]) * change).sum(-1).double()
        run = float((squares * one.products.double() * one.share.double()).sum() / 2)
        estimated = estimate(one, QuantScheme(format.name, "gptq"))
        if estimated > 0 and run > 0:
            ratios.append(run / estimated)
    return median(ratios) if ratios else 1.0
