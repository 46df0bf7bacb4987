"""Integer codes whose groups' scales and zero points are codes too, under one fp16 scale per row.

QLoRA (Dettmers et al. 2023) calls it double quantization, and llama.cpp's K-quants store scales likewise. Groups of 32
then take fewer bytes than groups of 64 with an fp16 scale each. May import: formats.base, formats.integers,
formats.packed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitplan.formats.base import Format, Specs, Tensors, as_bits, as_floats
from bitplan.formats.integers import RUN, Grid, IntegerFormat
from bitplan.formats.packed import pack, unpack, unpack_at, words_per_row

LEVELS = 16
"""Scales of a group: 1 to 16 sixteenths of its row's."""
ZEROS = 4
"""Zero points of a group, around the middle of the codes."""
GROUP_BITS = 6
"""Bits that a group takes: its scale's level in the low four, its zero point in the high two."""
LEAST_STEP = 2.0**-20


@dataclass(frozen=True)
class DoubleQuantFormat(IntegerFormat):
    """Codes of b = 2 to 4 bits in groups of a row, with

        scale = row scale * (level + 1) / 16        zero = 2^(b-1) - 2 + z

    where level (4 bits) and z (2 bits) are stored per group, and the row scale is an fp16. Zero points near the middle
    suffice for groups this small, whose weights lie on both sides of 0 (at 2 bits they are all of them).

    Row scales that rounding makes have at most 7 significant bits and are multiples of 2^-20, so that a group's scale
    is exact in fp16: `with_fp16_scales` gives the same weights to the bit. Distillation may train others.
    """

    @property
    def zeros_range(self) -> tuple[int, int]:
        lowest = (1 << (self.code_bits - 1)) - ZEROS // 2
        return lowest, lowest + ZEROS - 1

    def specs(self, rows: int, columns: int) -> Specs:
        return {
            "": ((rows, words_per_row(columns, self.code_bits)), torch.int32),
            "_scale": ((rows, 1), torch.int16),
            "_group": ((words_per_row(rows * self.groups(columns), GROUP_BITS),), torch.int32),
        }

    # Grids ----------------------------------------------------------------------------------------------------------

    def _spans(self, parts: Tensor) -> Tensor:
        """The scale of each zero point at which no weight of a group is clipped: parts float32 [rows, groups, n] →
        [4, rows, groups]. It is huge where a zero point leaves no code for a side that has weights."""
        low, high = -parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        first, last = self.zeros_range
        return torch.stack(
            [torch.maximum(low / max(z, 1e-30), high / max(self.top - z, 1e-30)) for z in range(first, last + 1)]
        )

    def _parts(self, weight: Tensor) -> Tensor:
        """Weight [rows, columns] as [rows, groups, columns of a group]; the last group is filled with zeros."""
        fill = self.groups(weight.shape[-1]) * self.group - weight.shape[-1]
        return pad(weight, (0, fill)).unflatten(-1, (-1, self.group))

    def spanning_grids(self, weight: Tensor) -> Grid:
        """The grids that clip no weight of float32 weight [rows, columns]: scale and zero [rows, groups]."""
        least, which = self._spans(self._parts(weight)).min(0)
        row = round_up(least.amax(-1, keepdim=True))
        return Grid(row * _level(least, row) / LEVELS, (which + self.zeros_range[0]).float())

    def fitted_grids(self, weight: Tensor, importance: Tensor) -> Grid:
        """The grids of least squared error, weighted by `importance` float32 [columns], among all zero points and the
        eight levels up to the one that clips nothing. Scale and zero are [rows, groups]."""
        parts, counted = self._parts(weight), self._parts(importance[None])[0]
        step = max(1, RUN // max(weight.shape[1], 1))
        grids = [self._fitted(some, counted) for some in parts.split(step)]
        return Grid(torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids]))

    def _fitted(self, parts: Tensor, importance: Tensor) -> Grid:
        spans = self._spans(parts)
        row = round_up(spans.amin(0).amax(-1, keepdim=True))
        best, zeros = row.expand(spans.shape[1:]), torch.full_like(spans[0], self.zeros_range[1])
        least = torch.full_like(best, torch.inf)
        for zero, span in enumerate(spans, self.zeros_range[0]):
            level = _level(span, row)
            for down in range(LEVELS // 2):
                scale = row * (level - down).clamp(min=1) / LEVELS
                grid = Grid(scale.unsqueeze(-1), torch.tensor(float(zero)))
                off = self.encode(parts, grid).sub_(zero).mul_(grid.scale).sub_(parts)
                error = off.square_().mul_(importance).sum(-1)
                better = error < least
                least = torch.where(better, error, least)
                best = torch.where(better, scale, best)
                zeros = zeros.masked_fill(better, zero)
        return Grid(best, zeros)

    def storable_scale(self, scale: Tensor) -> Tensor:
        row, level = self._row_and_level(scale)
        return row * level / LEVELS

    def scales_beside(self, grid: Grid) -> Callable[[Tensor], Tensor]:
        row = self._row_and_level(grid.scale)[0].squeeze(-1)
        return lambda scale: row * (scale / row.clamp(min=1e-30) * LEVELS).round().clamp(1, LEVELS) / LEVELS

    def _row_and_level(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The row scales [rows, 1] and levels 1 to 16 [rows, groups] nearest to `scale` [rows, groups]: those which
        have the row's largest scale at some level. Exact for scales that can be stored."""
        largest = scale.amax(-1, keepdim=True)
        best, levels, least = largest, torch.ones_like(scale), torch.full_like(largest, torch.inf)
        for top in range(LEVELS, 0, -1):
            row = round_up(largest * LEVELS / top)
            level = (scale / row.clamp(min=1e-30) * LEVELS).round().clamp(1, LEVELS)
            error = (row * level / LEVELS - scale).square().sum(-1, keepdim=True)
            better = error < least
            best, levels = torch.where(better, row, best), torch.where(better, level, levels)
            least = torch.where(better, error, least)
        return best, levels

    # Tensors --------------------------------------------------------------------------------------------------------

    def quantize(self, weight: Tensor) -> Tensors:
        weight = weight.float()
        grid = self.spanning_grids(weight)
        columns = weight.shape[1]
        wide = Grid(self.over_columns(grid.scale, columns), self.over_columns(grid.zero, columns))
        return self.store(self.encode(weight, wide), grid)

    def store(self, codes: Tensor, grid: Grid) -> Tensors:
        row, level = self._row_and_level(grid.scale)
        zero = grid.zero.to(torch.uint8) - self.zeros_range[0]
        group = (level.to(torch.uint8) - 1) | (zero << 4)
        return {
            "": pack(codes.to(torch.uint8), self.code_bits),
            "_scale": as_bits(row.half()),
            "_group": pack(group.flatten(), GROUP_BITS),
        }

    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        shape = len(tensors[""]), self.groups(columns)
        group = unpack(tensors["_group"], shape[0] * shape[1], GROUP_BITS).view(shape)
        return self._values(
            unpack(tensors[""], columns, self.code_bits), *self._grid(tensors["_scale"], group), columns, dtype
        )

    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        groups = self.groups(columns)
        positions = ids.unsqueeze(-1) * groups + torch.arange(groups, device=ids.device)
        group = unpack_at(tensors["_group"], positions, GROUP_BITS)
        codes = unpack(tensors[""][ids], columns, self.code_bits)
        return self._values(codes, *self._grid(tensors["_scale"][ids], group), columns, dtype)

    def rows_of(self, tensors: Tensors, start: int, stop: int, columns: int) -> Tensors:
        bits = self.groups(columns) * GROUP_BITS  # of a row; 32 rows are whole words
        return {
            "": tensors[""][start:stop],
            "_scale": tensors["_scale"][start:stop],
            "_group": tensors["_group"][start * bits // 32 : words_per_row(stop * bits, 1)],
        }

    def _grid(self, row: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points, float32 and uint8 [..., groups], from row scales [..., 1] and groups' codes."""
        scale = as_floats(row, torch.float16).float() * ((group & 15).float() + 1) / LEVELS
        return scale, (group >> 4) + self.zeros_range[0]

    def with_fp16_scales(self, tensors: Tensors, columns: int) -> Tensors:
        shape = len(tensors[""]), self.groups(columns)
        group = unpack(tensors["_group"], shape[0] * shape[1], GROUP_BITS).view(shape)
        scale, zero = self._grid(tensors["_scale"], group)
        return {"": tensors[""], "_scale": as_bits(scale.half()), "_zero": pack(zero.flatten(), self.code_bits)}


def nbytes_added(format: Format, rows: int, columns: int) -> int:
    """Bytes of a weight by which its format with an fp16 scale per group is larger; 0 for other formats."""
    if not isinstance(format, DoubleQuantFormat):
        return 0
    return IntegerFormat("", format.bits, format.group).nbytes(rows, columns) - format.nbytes(rows, columns)


def round_up(scale: Tensor) -> Tensor:
    """The next float32 at or above `scale` ≥ 0 of 7 significant bits that is a multiple of 2^-20; infinity above
    fp16's largest."""
    exponent = torch.frexp(scale).exponent
    step = torch.ldexp(torch.ones_like(scale), exponent - 7).clamp(min=LEAST_STEP)
    return ((scale / step).ceil() * step).half().float()


def _level(span: Tensor, row: Tensor) -> Tensor:
    """The least level, 1 to 16, whose scale is `span` or more, or 16."""
    return (span / row.clamp(min=1e-30) * LEVELS).ceil().clamp(1, LEVELS)
