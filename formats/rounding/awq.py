"""AWQ (Lin et al. 2024): scale salient input columns up before rounding, and divide the layer before by the scale.

For inputs x with root mean square a_j in column j, column j of W is multiplied by s_j = a_j^p, the outputs of the layer
that produces x are divided by s, and p is searched. The error of a candidate is exact for the unit's own output:
tr(dW A dW^T), A = E[x x^T].
May import: formats.base, formats.integers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitplan.formats.integers import Grid, IntegerFormat

EXPONENTS = [i / 10 for i in range(11)]


def clipped_codes(weight: Tensor, format: IntegerFormat, importance: Tensor) -> tuple[Tensor, Grid]:
    """Nearest codes [rows, columns] of float32 `weight` [rows, columns] on grids clipped where that reduces the error
    weighted by `importance` [columns], and those grids [rows, groups]."""
    grid = format.fitted_grids(weight, importance)
    columns = weight.shape[1]
    wide = Grid(format.over_columns(grid.scale, columns), format.over_columns(grid.zero, columns))
    return format.encode(weight, wide), grid


def rounded(weight: Tensor, format: IntegerFormat, importance: Tensor) -> Tensor:
    """The values float32 [rows, columns] of `clipped_codes`."""
    codes, grid = clipped_codes(weight, format, importance)
    columns = weight.shape[1]
    wide = Grid(format.over_columns(grid.scale, columns), format.over_columns(grid.zero, columns))
    return format.decode(codes, wide)


def search_scale(weights: Sequence[Tensor], formats: Sequence[IntegerFormat], moment: Tensor) -> Tensor:
    """The scale float32 [columns] of least error for weights [rows, columns] that read the same input, whose second
    moment is `moment` float32 [columns, columns]. All ones if scaling does not help."""
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
