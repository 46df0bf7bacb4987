"""AWQ (Lin et al. 2024): scale up the input columns that matter before rounding, and take the scale out elsewhere.

For inputs x with root mean square a_j in column j, the columns of W are multiplied by s_j = a_j^p, whoever writes x is
divided by s, and p is searched. The error of a try is exact for the unit's own output: tr(dW A dW^T), A = E[x x^T].
May import: formats.base, formats.integers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitplan.formats.integers import Grid, IntegerFormat

EXPONENTS = [i / 10 for i in range(11)]


def clipped_codes(weight: Tensor, format: IntegerFormat, importance: Tensor) -> tuple[Tensor, Grid]:
    """Nearest codes [rows, columns] on grids clipped where that loses less, and the grid."""
    grid = format.fitted_grids(weight, importance)
    columns = weight.shape[1]
    wide = Grid(format.over_columns(grid.scale, columns), format.over_columns(grid.zero, columns))
    return format.encode(weight, wide), grid


def rounded(weight: Tensor, format: IntegerFormat, importance: Tensor) -> Tensor:
    codes, grid = clipped_codes(weight, format, importance)
    columns = weight.shape[1]
    wide = Grid(format.over_columns(grid.scale, columns), format.over_columns(grid.zero, columns))
    return format.decode(codes, wide)


def search_scale(weights: Sequence[Tensor], formats: Sequence[IntegerFormat], moment: Tensor) -> Tensor:
    """The scale float32 [columns] of least error for weights [rows, columns] that read the same input, whose second
    moment is `moment` [columns, columns]; ones where no exponent beats none."""
    size = moment.diagonal().clamp(min=1e-12).sqrt()
    best, least = torch.ones_like(size), torch.inf
    for exponent in EXPONENTS:
        scale = size**exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-3, 1e3)
        error = 0.0
        for weight, format in zip(weights, formats, strict=True):
            change = rounded(weight * scale, format, moment.diagonal() / scale**2) / scale - weight
            error += float(((change @ moment) * change).sum())
        if error < least:
            best, least = scale, error
    return best
