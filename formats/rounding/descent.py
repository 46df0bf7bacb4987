"""Coordinate descent after GPTQ: the grid of a group, then the codes of its columns, each the best given all others.

For weights W, values V = (codes - zero) * scale and the damped second moment H, the objective is
tr((V - W) H (V - W)^T), and P = (V - W) H half its gradient. With h = H of a group's columns and R = v h - P there, a
row's values s c, c = codes - zero, in the group make it s^2 c h c^T - 2 s c R^T plus what does not depend on s, so that
the best scale is c R^T / (c h c^T) (COMQ: Zhang et al. 2024). The best code of column j is the one nearest to
v_j - P_j / H_jj (QuantEase: Behdin et al. 2023). A grid is exchanged only where that lowers the objective, so neither
step raises it.
May import: formats.integers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitplan.formats.integers import Grid, IntegerFormat

SWEEPS = 1
"""Passes over all groups."""
BLOCK = 128


def descend(
    target: Tensor, codes: Tensor, grid: Grid, matrix: Tensor, format: IntegerFormat, sweeps: int = SWEEPS
) -> tuple[Tensor, Grid, Tensor]:
    """Better codes and grids for float32 `target` [rows, columns] than `codes` [rows, columns] on `grid` [rows,
    groups], under `matrix` float32 [columns, columns], symmetric with a positive diagonal. Returns them with the
    weights whose nearest codes they are (float32 [rows, columns])."""
    columns = target.shape[1]
    step = format.group or columns
    # Transposed, so that a column's weights are contiguous.
    target, codes = target.T.contiguous(), codes.T.contiguous()
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    value = (codes - zero.repeat_interleave(step, 0)[:columns]) * scale.repeat_interleave(step, 0)[:columns]
    slope = matrix @ (value - target)
    aimed, stored = value.clone(), format.scales_beside(grid)
    for _ in range(sweeps):
        for group, first in enumerate(range(0, columns, step)):
            at = slice(first, min(first + step, columns))
            here = Grid(scale[group], zero[group])
            here = fitted(codes[at], value[at], slope[at], matrix[at, at], here, format, stored)
            scale[group], zero[group] = here.scale, here.zero
            moved = format.decode(codes[at], here) - value[at]
            slope += matrix[:, at] @ moved
            value[at] += moved
            for start in range(at.start, at.stop, BLOCK):
                block = slice(start, min(start + BLOCK, at.stop))
                part, local = matrix[block, block], slope[block].clone()
                moved = torch.empty_like(local)
                for j in range(block.stop - start):
                    aimed[start + j] = value[start + j] - local[j] / part[j, j]
                    codes[start + j] = format.encode(aimed[start + j], here)
                    moved[j] = format.decode(codes[start + j], here) - value[start + j]
                    local[j + 1 :] += part[j, j + 1 :].unsqueeze(-1) * moved[j]
                slope += matrix[:, block] @ moved
                value[block] += moved
    return codes.T.contiguous(), Grid(scale.T.contiguous(), zero.T.contiguous()), aimed.T.contiguous()


def fitted(
    codes: Tensor,
    value: Tensor,
    slope: Tensor,
    matrix: Tensor,
    grid: Grid,
    format: IntegerFormat,
    stored: Callable[[Tensor], Tensor],
) -> Grid:
    """The best grid [rows] of a group for its codes [columns, rows], its values and half the objective's gradient (both
    [columns, rows]) and `matrix` [columns, columns]; `grid` where no other is better. `stored` gives the scale that is
    stored for one [rows]."""
    rest = matrix @ value - slope
    best, least = grid, _objective(value, rest, matrix)
    for zero in _zeros(codes, rest, matrix, grid, format):
        centred = codes - zero
        length = (centred * (matrix @ centred)).sum(0)
        scale = stored((centred * rest).sum(0) / length.clamp(min=1e-30))
        found = Grid(scale, zero)
        objective = _objective(format.decode(codes, found), rest, matrix)
        better = (objective < least) & (scale > 0) & scale.isfinite()
        least = torch.where(better, objective, least)
        best = Grid(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero))
    return best


def _objective(value: Tensor, rest: Tensor, matrix: Tensor) -> Tensor:
    """What of a row's objective depends on the group's values [columns, rows]: [rows]."""
    return (value * (matrix @ value - 2 * rest)).sum(0)


def _zeros(codes: Tensor, rest: Tensor, matrix: Tensor, grid: Grid, format: IntegerFormat) -> list[Tensor]:
    """Zero points [rows] to try."""
    if format.zero_point == "asymmetric":
        least, most = format.zeros_range
        return [grid.zero, (grid.zero - 1).clamp(min=least), (grid.zero + 1).clamp(max=most)]
    if format.zero_point != "float_zero":
        return [grid.zero]
    # value = scale * code + offset, by least squares.
    products = matrix @ codes
    a, b, c = (codes * products).sum(0), products.sum(0), matrix.sum()
    x, y = (codes * rest).sum(0), rest.sum(0)
    determinant = (a * c - b * b).clamp(min=1e-30)
    scale, offset = (x * c - y * b) / determinant, (y * a - x * b) / determinant
    zero = (-offset / scale.clamp(min=1e-12)).clamp(-6e4, 6e4).half().float()
    return [grid.zero, zero]


__all__ = ["SWEEPS", "descend", "fitted"]
