"""YAQA (Tseng et al. 2025): errors are spread over columns and over rows, by what they cost the model's loss.

A change dW of a weight costs about 1/2 tr(G dW A dW^T) nats per token, with A = E[x x^T] over its inputs and
G = E[g g^T] over the loss's gradients at its outputs. GPTQ minimises it for G = 1: a diagonal G would only scale rows.
With all of G, errors of rows whose outputs do the same to the loss can cancel. Rows are rounded in blocks by decreasing
diagonal of G, each by GPTQ and coordinate descent (`descent`). With G^-1 = U^T U, the error E that a block B leaves is
best made up for by the rows R still to come if U_BR^T U_BB^-T E is taken from them, as GPTQ does with columns.
May import: formats.errors, formats.integers, the modules beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitplan.formats.errors import RoundingFailed
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.rounding.descent import descend
from bitplan.formats.rounding.gptq import Hessian, aimed, spread

ROWS = 8
"""The fewest rows of a block, which do not see each other's errors; fewer take longer."""
BLOCKS = 16
"""The most blocks of a weight."""


def yaqa_codes(
    weight: Tensor, format: IntegerFormat, hessians: Sequence[Hessian], outputs: Hessian | None
) -> tuple[Tensor, Grid]:
    """Codes float32 [experts * rows, columns] and their grid for a float weight. `outputs` holds G [rows, rows];
    without it, as for experts, errors are only spread over columns. Raises RoundingFailed."""
    assert outputs is None or len(hessians) == 1
    parts = [
        _rounded(part, format, own, outputs) for part, own in zip(weight.chunk(len(hessians)), hessians, strict=True)
    ]
    codes, grids = zip(*parts, strict=True)
    return torch.cat(codes), Grid(torch.cat([g.scale for g in grids]), torch.cat([g.zero for g in grids]))


def _rounded(weight: Tensor, format: IntegerFormat, hessian: Hessian, outputs: Hessian | None) -> tuple[Tensor, Grid]:
    left, matrix = aimed(weight, hessian), hessian.objective.to(weight.device)
    rows, columns = left.shape
    if outputs is None:
        return _on_columns(left, format, hessian, matrix)
    try:
        upper, order = outputs.factor.to(left.device), outputs.order.to(left.device)
    except RoundingFailed as failed:
        raise RoundingFailed(str(failed).replace("the inputs'", "the output gradients'")) from None
    left = left[order]
    codes, scales, zeros = [], [], []
    step = max(ROWS, -(-rows // BLOCKS))
    for start in range(0, rows, step):
        here, rest = slice(start, min(start + step, rows)), slice(start + step, rows)
        found, grid = _on_columns(left[here], format, hessian, matrix)
        wide = Grid(format.over_columns(grid.scale, columns), format.over_columns(grid.zero, columns))
        error = left[here] - format.decode(found, wide)
        left[rest] -= upper[here, rest].T @ torch.linalg.solve_triangular(upper[here, here].T, error, upper=False)
        codes.append(found)
        scales.append(grid.scale)
        zeros.append(grid.zero)
    back = order.argsort()
    return torch.cat(codes)[back], Grid(torch.cat(scales)[back], torch.cat(zeros)[back])


def _on_columns(target: Tensor, format: IntegerFormat, hessian: Hessian, matrix: Tensor) -> tuple[Tensor, Grid]:
    """GPTQ, then coordinate descent."""
    codes, grid, _ = spread(target, format, hessian)
    codes, grid, _ = descend(target, codes, grid, matrix, format)
    return codes, grid
