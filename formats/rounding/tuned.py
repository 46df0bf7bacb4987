"""Learned rounding of a whole block: offsets and clip ranges by gradients, from GPTQ's codes.

A unit's value is (clamp(round(W/s + z + V), 0, top) - z) * s, with W the weights that GPTQ rounded to nearest, V the
learned offsets, and s, z the grid of its clip range times two learned factors a group; gradients pass rounding as if
it were not there (SignRound: Cheng et al. 2023). Two things differ from it, for GPTQ's codes are good already and
early steps easily lose them: W starts half way to the middle of its codes' cells, so that only what the gradient asks
for again and again flips a code; and steps are Adam's, whose size falls where the sign of the gradient is unsure.
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
"""How far an offset may move a weight, in steps of the grid."""
CLIP = (0.3, 1.5)
"""How far a clip range may shrink or grow."""
CHECKED = 50
"""Steps between two looks at the whole loss, of which the least is kept."""


class _Through(torch.autograd.Function):
    """A function that is not differentiated: its gradient is handed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _round(x: Tensor) -> Tensor:
    return _Through.apply(x, torch.round)  # type: ignore[no-any-return]


def _as_half(x: Tensor) -> Tensor:
    return _Through.apply(x, lambda value: value.half().float())  # type: ignore[no-any-return]


class Learned:
    """One unit's offsets and clip factors. `aimed` float32 [rows, columns], `grid` [rows, groups]: GPTQ's."""

    def __init__(self, format: IntegerFormat, aimed: Tensor, grid: Grid):
        self.format, self.start = format, grid
        wide = self._wide(grid, aimed.shape[1])
        middle = format.decode(format.encode(aimed, wide), wide)
        self.aimed = (middle + (aimed - middle).clamp(-wide.scale / 2, wide.scale / 2) / 2).contiguous()
        self.offset = torch.zeros_like(aimed, requires_grad=True)
        self.low = torch.ones_like(grid.scale, requires_grad=True)
        self.high = torch.ones_like(grid.scale, requires_grad=True)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offset, self.low, self.high

    def grid(self) -> Grid:
        scale, zero, top = self.start.scale, self.start.zero, self.format.top
        if self.format.zero_point in ("middle", "half"):
            return Grid(_as_half(scale * self.high), zero)
        low, high = zero * scale * self.low, (top - zero) * scale * self.high
        scale = _as_half((low + high) / top)
        zero = low / scale.clamp(min=1e-9)
        return Grid(scale, _as_half(zero) if self.format.zero_point == "float" else _round(zero).clamp(0, top))

    def _wide(self, grid: Grid, columns: int) -> Grid:
        return Grid(self.format.over_columns(grid.scale, columns), self.format.over_columns(grid.zero, columns))

    def codes(self) -> tuple[Tensor, Grid]:
        """Codes [rows, columns], differentiable, and the grid spread over the columns."""
        wide = self._wide(self.grid(), self.aimed.shape[1])
        place = self.aimed / wide.scale.clamp(min=1e-9) + wide.zero + self.offset
        return _round(place).clamp(0, self.format.top), wide

    def weight(self) -> Tensor:
        """Values [rows, columns], differentiable."""
        codes, grid = self.codes()
        return self.format.decode(codes, grid)

    @torch.no_grad()
    def tensors(self) -> Tensors:
        """The format's stored tensors."""
        return self.format.store(self.codes()[0], self.grid())

    @torch.no_grad()
    def limit(self) -> None:
        self.offset.clamp_(-OFFSET, OFFSET)
        self.low.clamp_(*CLIP)
        self.high.clamp_(*CLIP)


def tune(learned: list[Learned], loss: Callable[[int], Tensor], whole: Callable[[], float], steps: int) -> None:
    """Lessen `loss(step)`, a minibatch's, over `steps` steps whose size falls to 0; what is kept is where `whole()`,
    the loss on all of the text, was least, the start included."""
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
        for one, kept in zip(learned, best, strict=True):
            for parameter, value in zip(one.parameters, kept, strict=True):
                parameter.copy_(value)
