"""GPTQ (Frantar et al. 2022): round column by column, spreading each column's error over those not yet rounded.

With H = E[x x^T] and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), rounding column j with error e adds
-e * U[j, k] / U[j, j] to every later column k. Columns are rounded by decreasing diagonal of H ("act order"). Each
group's grid is set beforehand from its own weights (static groups), clipped where that reduces the error, so codes and
grids keep the weight's own column order. May import: formats.base, formats.errors, formats.integers.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from bitplan.formats.base import Format, Tensors
from bitplan.formats.errors import RoundingFailed
from bitplan.formats.integers import Grid, IntegerFormat

DAMPING = (0.01, 0.1, 1.0)
AIM_DAMPING = 0.05
BLOCK = 128
PANEL = 512
"""Rows of U that are solved for at once."""
SLICE = 1 << 25
"""Bytes of float32 weights that are rounded at a time, at about five times that in memory: rows are independent."""


class Hessian:
    """The second moment H = E[x x^T] of a unit's inputs, float32 [columns, columns], with its Cholesky factor, which is
    computed once for all formats. `cross`, of the same shape, is E[x0 x^T], x0 being the unit's inputs in the
    full-precision model and x those in the model quantized so far."""

    def __init__(self, matrix: Tensor, cross: Tensor | None = None):
        # An expert that no token reached: all columns get the same weight, or all would be rounded as zeros.
        self.matrix = torch.eye(len(matrix)).to(matrix) if bool((matrix.diagonal() <= 0).all()) else matrix
        self.cross = cross

    @cached_property
    def dead(self) -> Tensor:
        """Columns whose inputs were always zero: bool [columns]."""
        return self.matrix.diagonal() <= 0

    @cached_property
    def order(self) -> Tensor:
        """Column indices by decreasing diagonal, int64 [columns]."""
        return self.matrix.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def damped(self) -> tuple[Tensor, Tensor]:
        """U of the damped H, rows and columns in `order`: float32 [columns, columns]; and what damping added to H's
        diagonal, in `order`: float64 [columns]. Raises RoundingFailed if H is not positive definite at any damping."""
        for damping in DAMPING:
            added = (self.dead.double() + damping * self._ridge())[self.order]
            # With the order reversed, H = L Lᵀ gives U as the inverse of L, reversed again.
            backwards = self.order.flip(0)
            matrix = self._whole(self.matrix[backwards][:, backwards])
            matrix.diagonal().add_(added.flip(0))
            lower, failed = torch.linalg.cholesky_ex(matrix)
            del matrix
            if not failed:
                return _inverse(lower).flip(0, 1), added
        raise RoundingFailed(f"the inputs' second moment is not positive definite at any damping in {DAMPING}")

    @property
    def factor(self) -> Tensor:
        """U of `damped`."""
        return self.damped[0]

    @property
    def objective(self) -> Tensor:
        """H with that damping, in the columns' own order: float32 [columns, columns]."""
        matrix = self.matrix.float().clone()
        matrix.diagonal().add_((self.damped[1][self.order.argsort()] - self.dead.double()).float())
        return matrix

    @cached_property
    def aim(self) -> Tensor | None:
        """M such that (W + W M) x approximates W x0 by ridge regression: M = (cross - H) (H + ridge)^-1, float32
        [columns, columns] (GPTAQ: Li et al. 2025); None without `cross`."""
        if self.cross is None:
            return None
        matrix = self._whole(self.matrix)
        matrix.diagonal().add_(self.dead.double()).add_(AIM_DAMPING * self._ridge())
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            return None
        change = self.cross.double() - self.matrix.double()
        return torch.cholesky_solve(change.T, lower).T.float()

    @staticmethod
    def _whole(matrix: Tensor) -> Tensor:
        if not matrix.isfinite().all():
            raise RoundingFailed("the inputs' second moment holds NaN or infinity")
        return matrix.to(torch.float64, copy=True)

    def _ridge(self) -> Tensor:
        """The mean of the diagonal over columns that are not dead: float64."""
        diagonal = self.matrix.diagonal().double()
        return diagonal[~self.dead].mean() if not self.dead.all() else torch.ones_like(diagonal).mean()


def _inverse(lower: Tensor) -> Tensor:
    """The inverse, float32, of a lower triangular float64 matrix, which is overwritten: a second one is not needed."""
    for at in range(0, len(lower), PANEL):
        here = slice(at, at + PANEL)
        block = lower[here, here]
        own = torch.linalg.solve_triangular(block, torch.eye(len(block)).to(lower), upper=False)
        lower[here, :at] = -own @ (lower[here, :at] @ lower[:at, :at])
        lower[here, here] = own
    return lower.float()


def gptq(weight: Tensor, format: Format, hessians: Sequence[Hessian]) -> Tensors:
    """Round float weight [experts * rows, columns] on `format`'s grid, each expert with its own Hessian. Returns the
    format's stored tensors. Raises RoundingFailed."""
    assert isinstance(format, IntegerFormat)
    codes, grids = [], []
    for expert, hessian in zip(weight.chunk(len(hessians)), hessians, strict=True):
        for rows in expert.split(max(SLICE // (4 * weight.shape[1]), 1)):
            part, grid, _ = _round(rows, format, hessian)
            codes.append(part.to(torch.uint8))
            grids.append(grid)
    return format.store(torch.cat(codes), _joined(grids))


def gptq_codes(weight: Tensor, format: IntegerFormat, hessians: Sequence[Hessian]) -> tuple[Tensor, Grid, Tensor]:
    """Codes float32 [experts * rows, columns], their grid, and the weights that were rounded to them: the originals
    plus the errors spread from earlier columns (float32, the same shape). Raises RoundingFailed."""
    parts = [_round(part, format, hessian) for part, hessian in zip(weight.chunk(len(hessians)), hessians, strict=True)]
    codes, grids, aimed = zip(*parts, strict=True)
    return torch.cat(codes), _joined(grids), torch.cat(aimed)


def _joined(grids: Sequence[Grid]) -> Grid:
    return Grid(torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids]))


def _round(weight: Tensor, format: IntegerFormat, hessian: Hessian) -> tuple[Tensor, Grid, Tensor]:
    """`gptq_codes` of one expert."""
    return spread(aimed(weight, hessian), format, hessian)


def aimed(weight: Tensor, hessian: Hessian) -> Tensor:
    """What a float weight [rows, columns] should become, float32: corrected by the Hessian's `aim`, and zero in columns
    whose inputs were always zero."""
    target = weight.float().clone()
    if hessian.aim is not None:
        target += target @ hessian.aim.to(target)
    target[:, hessian.dead.to(target.device)] = 0
    return target


def spread(left: Tensor, format: IntegerFormat, hessian: Hessian) -> tuple[Tensor, Grid, Tensor]:
    """`gptq_codes` of float32 [rows, columns]."""
    columns = left.shape[1]
    grid = format.fitted_grids(left, hessian.matrix.diagonal().to(left))
    upper, order = hessian.factor.to(left.device), hessian.order.to(left.device)
    # Transposed, so that a column's weights are contiguous.
    left = left.T[order].contiguous()
    scale = format.over_columns(grid.scale, columns).T[order]
    zero = format.over_columns(grid.zero, columns).T[order]
    codes = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        factor = upper[start:stop, start:stop]
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            here, at = Grid(scale[j], zero[j]), j - start
            codes[j] = format.encode(left[j], here)
            errors[at] = (left[j] - format.decode(codes[j], here)) / factor[at, at]
            left[j + 1 : stop] -= factor[at, at + 1 :].unsqueeze(-1) * errors[at]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    back = order.argsort()
    return codes[back].T.contiguous(), grid, left[back].T.contiguous()
