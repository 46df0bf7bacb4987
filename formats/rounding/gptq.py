"""GPTQ (Frantar et al. 2022): round column by column, spreading each column's error over those not yet rounded.

With H = E[x x^T] and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), rounding column j with error e adds
-e * U[j, k] / U[j, j] to every later column k. May import: formats.base, formats.integers, formats.errors.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from formats.base import Format, Tensors
from formats.errors import RoundingFailed
from formats.integers import Grid, IntegerFormat

DAMPING = (0.01, 0.1, 1.0)
BLOCK = 128


class Hessian:
    """A unit's input second moment [columns, columns], float32, and its factor, computed once for all formats."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    @cached_property
    def dead(self) -> Tensor:
        """Columns that no input ever reached: bool [columns]."""
        return self.matrix.diagonal() <= 0

    @cached_property
    def factor(self) -> Tensor:
        """U of the damped H, float32 [columns, columns]. Raises RoundingFailed where no damping makes H definite."""
        matrix = self.matrix.double()
        if not matrix.isfinite().all():
            raise RoundingFailed("the inputs' second moment holds NaN or infinity")
        dead = self.dead
        matrix = matrix + torch.diag(dead.double())
        mean = matrix.diagonal()[~dead].mean() if not dead.all() else matrix.diagonal().mean()
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        for damping in DAMPING:
            lower, failed = torch.linalg.cholesky_ex(matrix + damping * mean * eye)
            if failed:
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        raise RoundingFailed(f"the inputs' second moment is not positive definite at any damping in {DAMPING}")


def gptq(weight: Tensor, format: Format, hessians: Sequence[Hessian]) -> Tensors:
    """Round float weight [experts * rows, columns] on `format`'s grid, each expert with its own Hessian.

    Raises RoundingFailed.
    """
    assert isinstance(format, IntegerFormat) and hessians
    parts = [_round(part, format, hessian) for part, hessian in zip(weight.chunk(len(hessians)), hessians, strict=True)]
    codes, grids = zip(*parts, strict=True)
    return format.store(torch.cat(codes), Grid(torch.cat([g.scale for g in grids]), torch.cat([g.zero for g in grids])))


def _round(weight: Tensor, format: IntegerFormat, hessian: Hessian) -> tuple[Tensor, Grid]:
    """Codes [rows, columns] and their grid; a group's grid is set when its first column is reached.

    Columns that no input reached are rounded as zeros.
    """
    upper = hessian.factor.to(weight.device)
    columns = weight.shape[1]
    left = weight.float().clone()
    left[:, hessian.dead.to(weight.device)] = 0
    step = format.group or columns
    codes = torch.empty_like(left)
    grids: list[Grid] = []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, factor = left[:, start:stop].T.contiguous(), upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = start + j
            if column % step == 0:
                # Columns of this group that lie in later blocks have not felt this block's errors yet.
                here = block[j : j + step].T
                rest = left[:, stop : column + step]
                if rest.shape[1] and j:
                    rest = rest - errors[:j].T @ upper[start:column, stop : column + step]
                grids.append(format.grid(torch.cat((here, rest), -1)))
            grid = grids[-1]
            code = format.encode(block[j].unsqueeze(-1), grid)
            value = ((code - grid.zero) * grid.scale).squeeze(-1)
            codes[:, column] = code.squeeze(-1)
            error = (block[j] - value) / factor[j, j]
            errors[j] = error
            block[j + 1 :] -= factor[j, j + 1 :].unsqueeze(-1) * error
        left[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return codes, Grid(torch.cat([grid.scale for grid in grids], -1), torch.cat([grid.zero for grid in grids], -1))
