"""Second moments estimated from a text, shrunk by what they vary within it.

Of the columns² entries of E[x xᵀ], a text of a few thousand tokens shows many that other text would not: GPTQ spreads
errors by them. The estimate of least expected squared error keeps the diagonal and multiplies what lies off it by
1 - ρ, with (Ledoit and Wolf 2004; for correlations Schäfer and Strimmer 2005)

    ρ = Σ_{i≠j} Var(r_ij) / Σ_{i≠j} r_ij²,    r = E[x xᵀ], scaled to columns of about equal size

Variances are those of means over samples: runs of SAMPLE tokens, since neighbours depend on each other. E[(x0 - x) xᵀ],
against the inputs x0 of the full-precision model, is shrunk to 0 likewise, its diagonal too.
May import: sensitivity.products.
"""

from functools import partial

import torch
from torch import Tensor

from bitplan.sensitivity.products import add_products, mirror

SAMPLE = 256
"""Tokens."""
ROWS = 512
"""Of a moment, squared at once."""
EVEN = 1e-3
"""Of the mean size of columns: added to each before it is scaled by, since they come from the first sample alone."""


class SecondMoments:
    """Sums over a text, of `experts` moments float32 [columns, columns]. `crossed`: with those against the
    full-precision inputs, of one expert. Beside the moments it holds the inputs of one sample. Into which pieces the
    text is cut where it is added makes no difference."""

    def __init__(self, experts: int, columns: int, device: str | torch.device = "cpu", crossed: bool = False):
        zeros = partial(torch.zeros, device=device)
        self.total = zeros(experts, columns, columns)
        self.change = zeros(columns, columns) if crossed else None
        self.tokens = zeros(experts)
        self.samples = [0] * experts
        self.weights = zeros(experts, columns)
        """1 / the columns' mean squares in the first sample."""
        self.squares = zeros(experts)
        """Σ over samples of Σ_{i≠j} of their scaled sums' squares."""
        self.change_squares = zeros(())
        self.pending = [zeros(0, columns + columns * crossed)] * experts
        """Inputs of the sample that is not whole yet, and beside them by how much the full-precision ones differ."""

    def add(self, x: Tensor, expert: int = 0, true: Tensor | None = None) -> None:
        """Inputs float32 [tokens, columns], and the full-precision model's of the same tokens."""
        self.tokens[expert] += len(x)
        add_products(self.total[expert], x)
        if self.change is not None:
            assert true is not None
            change = true - x
            self.change.addmm_(change.T, x)
            x = torch.cat([x, change], -1)
        x = torch.cat([self.pending[expert], x])
        whole = len(x) - len(x) % SAMPLE
        for start in range(0, whole, SAMPLE):
            self._sample(expert, x[start : start + SAMPLE])
        self.pending[expert] = x[whole:].clone()

    def _sample(self, expert: int, sample: Tensor) -> None:
        """Of `pending`'s columns."""
        x, change = sample.tensor_split([self.total.shape[-1]], -1)
        if not self.samples[expert]:
            size = x.square().mean(0)
            self.weights[expert] = 1 / (size + EVEN * size.mean() + 1e-12)
        weights = self.weights[expert]
        self.samples[expert] += 1
        # |D^-½ Xᵀ X D^-½|² = |X D^-1 Xᵀ|², which is of tokens and not of columns.
        products = (x * weights) @ x.T
        self.squares[expert] += products.square().sum() - (x.square().sum(0) * weights).square().sum()
        if self.change is not None:
            self.change_squares += (products * ((change * weights) @ change.T)).sum()

    def means(self, tokens: int | None = None) -> tuple[Tensor, Tensor | None]:
        """E[x xᵀ] float32 [experts, columns, columns] and E[x0 xᵀ] [columns, columns], shrunk, as means over `tokens`,
        by default each expert's own. The sums are used up."""
        self.shrink(self.shrinkage(self.variance()))
        counts = self.tokens.clamp(min=1) if tokens is None else torch.full_like(self.tokens, tokens)
        self.total /= counts.view(-1, 1, 1)  # in place: it can be the largest tensor there is
        if self.change is not None:
            within = _squares(self.change, self.weights[0])
            variance = _variance(self.change_squares, within, self.samples[0])
            self.change *= (1 - _ratio(variance, within)) / counts[0]
            self.change += self.total[0]
        return self.total, self.change

    def variance(self) -> Tensor:
        """Σ_{i≠j} of the scaled sums' variances: float32 [experts]. Nothing can be added after it."""
        for expert, rest in enumerate(self.pending):
            if len(rest):
                self._sample(expert, rest)
        mirror(self.total)
        each = zip(self.squares, self._within(), self.samples, strict=True)
        return torch.stack([_variance(*of_expert) for of_expert in each])

    def shrinkage(self, variance: Tensor) -> Tensor:
        """The ρ that follows, of `total` as it now is: of several ranks' sums, each adds its share."""
        return _ratio(variance, self._within())

    def shrink(self, rho: Tensor) -> None:
        """Multiply what lies off the diagonals by 1 - ρ, in place."""
        for total, own in zip(self.total, rho.clamp(max=1), strict=True):
            diagonal = total.diagonal().clone()
            total *= 1 - own
            total.diagonal().copy_(diagonal)

    def _within(self) -> Tensor:
        """Σ_{i≠j} of the scaled sums' squares: [experts]."""
        each = zip(self.total, self.weights, strict=True)
        return torch.stack([_squares(t, w) - (t.diagonal() * w).square().sum() for t, w in each])


def _squares(matrix: Tensor, weights: Tensor) -> Tensor:
    """Σ_ij w_i w_j m_ij²."""
    parts = zip(matrix.split(ROWS), weights.split(ROWS), strict=True)
    return sum(((rows.square() @ weights) @ own for rows, own in parts), start=weights.new_zeros(()))


def _variance(squares: Tensor, within: Tensor, samples: int) -> Tensor:
    """Of a sum of samples, of which `squares` are the sum of the samples' squares, and `within` its own square."""
    return (squares - within / samples) * (samples / (samples - 1)) if samples > 1 else torch.zeros_like(within)


def _ratio(variance: Tensor, within: Tensor) -> Tensor:
    return (variance / within.clamp(min=torch.finfo(within.dtype).tiny)).clamp(0, 1)
