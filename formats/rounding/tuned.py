"""Learned rounding of a whole block: offsets and clip ranges optimised by gradients.

A unit's value is (clamp(round(W/s + z + V), 0, top) - z) * s, where V are the learned offsets, and s, z the grid of the
clip range times two learned factors per group. Gradients pass rounding by the straight-through estimator (SignRound:
Cheng et al. 2023). There are two starts:

- From GPTQ's codes, W being the weights that GPTQ rounded to nearest. They are a good start that early steps easily
  lose: W starts half way to the centre of its codes' cells, so that a code flips only if gradients agree over many
  steps; and the optimiser is Adam, whose steps shrink where the gradient's sign varies.
- From the weights. V stays within half a step, so that each code is one of the two next to its weight, and steps are
  the gradient's sign, as SignRound has it. With few tokens for a block's weights, what fits them closest is not what
  loses least on other text, and this start is tried too.

May import: formats.base, formats.integers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitplan.formats.base import Tensors
from bitplan.formats.integers import Grid, IntegerFormat

STEPS = 200


@dataclass(frozen=True)
class Way:
    """How offsets and clip factors move: their step sizes, Adam's betas (with zeros, steps are the gradient's sign),
    and the largest offset in steps of the grid."""

    offset_rate: float
    clip_rate: float
    betas: tuple[float, float]
    offset: float


FROM_CODES = Way(1e-2, 2e-3, (0.9, 0.99), 1.0)
FROM_WEIGHTS = Way(1 / STEPS, 1 / STEPS, (0.0, 0.0), 0.5)
FEW = 8.0
"""Outputs of the block on the text, tokens times width, for each of its weights: with fewer, learning starts from the
weights too (measured: docs/method.md)."""
CLIP = (0.3, 1.5)
"""The smallest and largest factor of a clip range."""
CHECKED = 50
"""Steps between two evaluations of the whole loss; the best state is returned."""


class _Through(torch.autograd.Function):
    """The straight-through estimator: applies a function, and passes gradients on unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _round(x: Tensor) -> Tensor:
    return _Through.apply(x, torch.round)  # type: ignore[no-any-return]


def _stored(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    return _Through.apply(x, rounded)  # type: ignore[no-any-return]


def _half(x: Tensor) -> Tensor:
    return x.half().float()


class Learned:
    """One unit's offsets [rows, columns] and clip factors [rows, groups], float32. `aimed` [rows, columns] and `grid`
    [rows, groups] are those of `gptq_codes`, or the weight and a grid of its own for the other `way`."""

    def __init__(self, format: IntegerFormat, aimed: Tensor, grid: Grid, way: Way = FROM_CODES):
        self.format, self.start, self.way = format, grid, way
        self.aimed = aimed
        if way is FROM_CODES:
            wide = self._wide(grid, aimed.shape[1])
            center = format.decode(format.encode(aimed, wide), wide)
            self.aimed = (center + (aimed - center).clamp(-wide.scale / 2, wide.scale / 2) / 2).contiguous()
        self.offset = torch.zeros_like(aimed, requires_grad=True)
        self.low = torch.ones_like(grid.scale, requires_grad=True)
        self.high = torch.ones_like(grid.scale, requires_grad=True)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offset, self.low, self.high

    def grid(self) -> Grid:
        scale, zero, top = self.start.scale, self.start.zero, self.format.top
        if self.format.zero_point in ("symmetric", "mid_rise"):
            return Grid(_stored(scale * self.high, self.format.storable_scale), zero)
        low, high = zero * scale * self.low, (top - zero) * scale * self.high
        scale = _stored((low + high) / top, self.format.storable_scale)
        zero = low / scale.clamp(min=1e-9)
        if self.format.zero_point == "float_zero":
            return Grid(scale, _stored(zero, _half))
        return Grid(scale, _round(zero).clamp(*self.format.zeros_range))

    def _wide(self, grid: Grid, columns: int) -> Grid:
        return Grid(self.format.over_columns(grid.scale, columns), self.format.over_columns(grid.zero, columns))

    def codes(self) -> tuple[Tensor, Grid]:
        """Codes [rows, columns], differentiable, and the grid repeated for each column."""
        wide = self._wide(self.grid(), self.aimed.shape[1])
        place = self.aimed / wide.scale.clamp(min=1e-9) + wide.zero + self.offset
        return _round(place).clamp(0, self.format.top), wide

    def weight(self) -> Tensor:
        """The dequantized weight [rows, columns], differentiable."""
        codes, grid = self.codes()
        return self.format.decode(codes, grid)

    @torch.no_grad()
    def tensors(self) -> Tensors:
        """The format's stored tensors."""
        return self.format.store(self.codes()[0], self.grid())

    @torch.no_grad()
    def limit(self) -> None:
        """Clamp all parameters to their ranges, in place."""
        self.offset.clamp_(-self.way.offset, self.way.offset)
        self.low.clamp_(*CLIP)
        self.high.clamp_(*CLIP)


def tune(learned: list[Learned], loss: Callable[[int], Tensor], whole: Callable[[], float], steps: int) -> None:
    """Minimise `loss(step)`, of one minibatch, over `steps` steps with linear decay to 0; all of `learned` go the same
    way. They end in the state, the initial one included, where `whole()`, the loss on all of the text, was least."""
    way = learned[0].way
    offsets = {"params": [one.offset for one in learned], "rate": way.offset_rate}
    clips = {"params": [parameter for one in learned for parameter in (one.low, one.high)], "rate": way.clip_rate}
    optimizer = torch.optim.Adam([offsets, clips], lr=0.0, betas=way.betas, eps=1e-12)
    best, least = [[p.detach().clone() for p in one.parameters] for one in learned], whole()
    for step in range(steps):
        loss(step).backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        for one in learned:
            one.limit()
        if (step + 1) % CHECKED == 0 or step + 1 == steps:
            found = whole()
            if found < least:
                best, least = [[p.detach().clone() for p in one.parameters] for one in learned], found
    with torch.no_grad():
        for one, values in zip(learned, best, strict=True):
            for parameter, value in zip(one.parameters, values, strict=True):
                parameter.copy_(value)
