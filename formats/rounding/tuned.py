"""Learned rounding of a whole block: offsets and clip ranges optimised by gradients, starting from GPTQ's codes.

A unit's value is (clamp(round(W/s + z + V), 0, top) - z) * s, where W are the weights that GPTQ rounded to nearest, V
the learned offsets, and s, z the grid of the clip range times two learned factors per group. Gradients pass rounding by
the straight-through estimator (SignRound: Cheng et al. 2023). Two things differ from SignRound, because GPTQ's codes
are a good start that early steps easily lose: W starts half way to the centre of its codes' cells, so that a code flips
only if gradients agree over many steps; and the optimiser is Adam, whose steps shrink where the gradient's sign varies.
May import: formats.base, formats.integers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitplan.formats.base import Tensors
from bitplan.formats.integers import Grid, IntegerFormat

STEPS = 200
OFFSET_RATE, CLIP_RATE = 1e-2, 2e-3
BETAS = (0.9, 0.99)
OFFSET = 1.0
"""The largest offset, in steps of the grid."""
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
    [rows, groups] are those of `gptq_codes`."""

    def __init__(self, format: IntegerFormat, aimed: Tensor, grid: Grid):
        self.format, self.start = format, grid
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
        self.offset.clamp_(-OFFSET, OFFSET)
        self.low.clamp_(*CLIP)
        self.high.clamp_(*CLIP)


def tune(learned: list[Learned], loss: Callable[[int], Tensor], whole: Callable[[], float], steps: int) -> None:
    """Minimise `loss(step)`, of one minibatch, over `steps` steps with linear decay to 0. `learned` ends in the state,
    the initial one included, where `whole()`, the loss on all of the text, was least."""
    offsets = {"params": [one.offset for one in learned], "rate": OFFSET_RATE}
    clips = {"params": [parameter for one in learned for parameter in (one.low, one.high)], "rate": CLIP_RATE}
    optimizer = torch.optim.Adam([offsets, clips], lr=0.0, betas=BETAS, eps=1e-12)
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
