"""Integer codes on an affine grid, one scale per group of a row: value = (code - zero) * scale.

May import: formats.base, formats.packed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitplan.formats.base import Format, Specs, Tensors, as_bits, as_floats
from bitplan.formats.packed import TRITS, pack, pack_trits, unpack, unpack_at, unpack_trits, words_per_row

SHRINK = [1 - 0.025 * i for i in range(21)]
RUN = 1 << 18
"""Weights whose grids are fitted at once: what a CPU's cache holds."""
SIGN_FACTORS = [0.6 + 0.05 * i for i in range(17)]
"""The factors that `fitted_grid` tries on the scale of `grid`; SIGN_FACTORS for mid-rise grids."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of each group: both float32 [rows, groups]; scales are exact in fp16."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class IntegerFormat(Format):
    """Codes of 1 to 8 bits with an fp16 scale per group of `group` columns (0: the whole row is one group).

    `zero_point` is one of
    - "asymmetric": a code per group is stored, so that the grid covers the group's range and 0;
    - "float_zero": an fp16 value per group is stored, which need not be a code (as in torch's tinygemm and HQQ);
    - "symmetric": fixed at 2^(b-1), nothing is stored;
    - "mid_rise": fixed at (2^b - 1) / 2, between two codes, nothing is stored; with one bit, sign times scale.

    `ternary`: codes are 0, 1 and 2, twenty to an int32 word. If the group size does not divide the columns, the last
    group is shorter.

    The smallest scale above 0 is fp16's, 2^-24; below 2^-14 all are multiples of it. So a group whose steps are
    finer than about 2^-24 loses precision, is clipped or becomes zeros; no weight is off by more than about the group's
    largest.
    """

    group: int
    zero_point: str = "asymmetric"
    ternary: bool = False
    default_rounding: str = "gptq"

    @property
    def code_bits(self) -> int:
        return int(self.bits)

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 if self.ternary else (1 << self.code_bits) - 1

    @property
    def floats(self) -> dict[str, torch.dtype]:
        zeros = {"_zero": torch.float16} if self.zero_point == "float_zero" else {}
        return {"_scale": torch.float16, **zeros}

    def groups(self, columns: int) -> int:
        return -(-columns // self.group) if self.group else 1

    def specs(self, rows: int, columns: int) -> Specs:
        groups = self.groups(columns)
        specs: Specs = {
            "": ((rows, -(-columns // TRITS) if self.ternary else words_per_row(columns, self.code_bits)), torch.int32),
            "_scale": ((rows, groups), torch.int16),
        }
        if self.zero_point == "asymmetric":
            specs["_zero"] = ((words_per_row(rows * groups, self.code_bits),), torch.int32)
        if self.zero_point == "float_zero":
            specs["_zero"] = ((rows, groups), torch.int16)
        return specs

    def padding(self, columns: int) -> str | None:
        if self.group and columns % self.group:
            return f"last group has {columns % self.group} of {self.group} columns"
        return None

    def grid(self, weight: Tensor) -> Grid:
        """The grid that spans each row of float32 weight [rows, columns of one group]: scale and zero [rows, 1].

        Fixed mid-rise grids follow the mean magnitude instead."""
        if self.zero_point == "float_zero":
            low, high = weight.aminmax(dim=-1, keepdim=True)
            if self.top == 1:  # two levels: the mean plus or minus the mean absolute deviation
                middle = weight.mean(-1, keepdim=True)
                spread = (weight - middle).abs().mean(-1, keepdim=True)
                low, high = middle - spread, middle + spread
            # All weights of the group are equal: their value becomes the scale.
            scale = torch.where(high > low, (high - low) / self.top, low.abs()).half().float()
            return Grid(scale, self.at_zero(low, scale))
        if self.zero_point == "asymmetric":
            low = weight.amin(-1, keepdim=True).clamp(max=0)
            high = weight.amax(-1, keepdim=True).clamp(min=0)
            scale = ((high - low) / self.top).half().float()
            zero = (-low / scale.clamp(min=1e-12)).round().clamp(0, self.top)
            return Grid(scale, zero)
        if self.zero_point == "symmetric":
            scale = (weight.abs().amax(-1, keepdim=True) / (self.top // 2)).half().float()
            return Grid(scale, torch.full_like(scale, self.top // 2 + 1))
        # The mean magnitude is the least-squares scale of a sign (Rastegari et al. 2016, XNOR-Net); with three values,
        # that of the weights over 0.7 of it, the others becoming 0 (Li et al. 2016, Ternary Weight Networks).
        size = weight.abs()
        mean = size.mean(-1, keepdim=True)
        if self.ternary:
            large = (size >= 0.7 * mean).float()
            mean = (size * large).sum(-1, keepdim=True) / large.sum(-1, keepdim=True).clamp(min=1)
        scale = (2 / self.top * mean).half().float()
        return Grid(scale, torch.full_like(scale, self.top / 2))

    def fitted_grid(self, weight: Tensor, importance: Tensor) -> Grid:
        """The grid of least squared error among shrunken ones; `importance` float32 [columns of one group] weights the
        squared errors. Clipping a few large weights leaves finer steps for the others."""
        whole = self.grid(weight)
        factors = SIGN_FACTORS if self.zero_point == "mid_rise" else SHRINK
        best, least = whole, torch.full_like(whole.scale, torch.inf)
        low_end = -whole.zero * whole.scale
        high_end = low_end + self.top * whole.scale
        for factor in factors:
            scale = (whole.scale * factor).half().float()
            zero = whole.zero
            if self.zero_point == "asymmetric":
                low = weight.amin(-1, keepdim=True).clamp(max=0)
                zero = (-low * factor / scale.clamp(min=1e-12)).round().clamp(0, self.top)
            elif self.zero_point == "float_zero":  # shrunken about the middle of the range
                zero = self.at_zero((1 + factor) / 2 * low_end + (1 - factor) / 2 * high_end, scale)
            grid = Grid(scale, zero)
            # In place: this loop is bound by memory. The values are those of decode(encode(weight)).
            off = self.encode(weight, grid).sub_(grid.zero).mul_(grid.scale).sub_(weight)
            error = off.square_().mul_(importance).sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = Grid(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero))
        return best

    def fitted_grids(self, weight: Tensor, importance: Tensor) -> Grid:
        """`fitted_grid` of every group of float32 weight [rows, columns]; importance float32 [columns]. Scale and zero
        are [rows, groups]."""
        rows, columns = weight.shape
        step = self.group or columns
        whole = columns // step
        grids = []
        run = max(1, RUN // (rows * step))
        for first in range(0, whole, run):  # several groups at once, as [rows, groups, columns of one group]
            at = slice(first * step, min(first + run, whole) * step)
            parts = weight[:, at].unflatten(1, (-1, step)).contiguous()
            grid = self.fitted_grid(parts, importance[at].unflatten(0, (-1, step)))
            grids.append(Grid(grid.scale.squeeze(-1), grid.zero.squeeze(-1)))
        if columns % step:
            grids.append(self.fitted_grid(weight[:, whole * step :], importance[whole * step :]))
        return Grid(torch.cat([grid.scale for grid in grids], -1), torch.cat([grid.zero for grid in grids], -1))

    @property
    def zeros_range(self) -> tuple[int, int]:
        """The least and the largest code that a zero point of kind "asymmetric" can be."""
        return 0, self.top

    def storable_scale(self, scale: Tensor) -> Tensor:
        """The scales nearest to float32 `scale` [rows, groups] that can be stored together; those of a `Grid` can."""
        return scale.half().float()

    def scales_beside(self, grid: Grid) -> Callable[[Tensor], Tensor]:
        """A function that rounds new scales [rows] of one of `grid`'s groups to the nearest that can be stored beside
        the others' [rows, groups]."""
        return self.storable_scale

    def with_fp16_scales(self, tensors: Tensors, columns: int) -> Tensors:
        """The stored tensors of a weight as a format with an fp16 scale per group has them: for other tools."""
        return tensors

    def over_columns(self, values: Tensor, columns: int) -> Tensor:
        """Repeat a value per group [rows, groups] for each column: [rows, columns]."""
        return values.repeat_interleave(self.group or columns, -1)[..., :columns]

    @staticmethod
    def at_zero(low: Tensor, scale: Tensor) -> Tensor:
        """The fp16 zero point that gives code 0 the value `low`."""
        return (-low / scale.clamp(min=1e-12)).clamp(-6e4, 6e4).half().float()

    @staticmethod
    def decode(codes: Tensor, grid: Grid) -> Tensor:
        """The float values of codes, on a grid that broadcasts to them."""
        return (codes - grid.zero) * grid.scale

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Nearest codes, as floats, of weight [rows, n] on a grid [rows, 1 or n]."""
        return (weight / grid.scale.clamp(min=1e-12)).add_(grid.zero).round_().clamp_(0, self.top)

    def quantize(self, weight: Tensor) -> Tensors:
        step = self.group or weight.shape[1]
        codes, scales, zeros = [], [], []
        for part in weight.float().split(step, -1):
            grid = self.grid(part)
            codes.append(self.encode(part, grid))
            scales.append(grid.scale)
            zeros.append(grid.zero)
        return self.store(torch.cat(codes, -1), Grid(torch.cat(scales, -1), torch.cat(zeros, -1)))

    def store(self, codes: Tensor, grid: Grid) -> Tensors:
        """Pack codes (any dtype) [rows, columns] and their grid [rows, groups] into the stored tensors."""
        whole = codes.to(torch.uint8)
        packed = pack_trits(whole) if self.ternary else pack(whole, self.code_bits)
        tensors = {"": packed, "_scale": as_bits(grid.scale.half())}
        if self.zero_point == "float_zero":
            tensors["_zero"] = as_bits(grid.zero.half())
        if self.zero_point == "asymmetric":
            tensors["_zero"] = pack(grid.zero.to(torch.uint8).flatten(), self.code_bits)
        return tensors

    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        codes = self._unpack(tensors[""], columns)
        scale = as_floats(tensors["_scale"], torch.float16)
        zero = as_floats(tensors["_zero"], torch.float16) if self.zero_point == "float_zero" else None
        if self.zero_point == "asymmetric":
            zero = unpack(tensors["_zero"], scale.numel(), self.code_bits).view(scale.shape)
        return self._values(codes, scale, zero, columns, dtype)

    def rows_of(self, tensors: Tensors, start: int, stop: int, columns: int) -> Tensors:
        parts = {suffix: tensor[start:stop] for suffix, tensor in tensors.items() if tensor.ndim == 2}
        if self.zero_point == "asymmetric":  # one stream of all rows' codes, whole words to every 32 rows
            zeros = self.groups(columns) * self.code_bits
            parts["_zero"] = tensors["_zero"][start * zeros // 32 : words_per_row(stop * zeros, 1)]
        return parts

    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        codes = self._unpack(tensors[""][ids], columns)
        scale = as_floats(tensors["_scale"][ids], torch.float16)
        zero = as_floats(tensors["_zero"][ids], torch.float16) if self.zero_point == "float_zero" else None
        if self.zero_point == "asymmetric":
            groups = self.groups(columns)
            positions = ids.unsqueeze(-1) * groups + torch.arange(groups, device=ids.device)
            zero = unpack_at(tensors["_zero"], positions, self.code_bits)
        return self._values(codes, scale, zero, columns, dtype)

    def _unpack(self, words: Tensor, columns: int) -> Tensor:
        return unpack_trits(words, columns) if self.ternary else unpack(words, columns, self.code_bits)

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
        """(code - zero) * scale over [..., columns], computed in float32 and rounded once to `dtype`."""
        groups = self.groups(columns)
        step = self.group or columns
        fill = groups * step - columns
        values = torch.nn.functional.pad(codes, (0, fill)).unflatten(-1, (groups, step)).float()
        if zero is not None:
            zero = zero.float().unsqueeze(-1)
            values = values - zero if zero.requires_grad else values.sub_(zero)
        else:
            values -= self.top / 2 if self.zero_point == "mid_rise" else self.top // 2 + 1
        scale = scale.float().unsqueeze(-1)
        values = values * scale if scale.requires_grad else values.mul_(scale)
        return values.flatten(-2)[..., :columns].to(dtype)
