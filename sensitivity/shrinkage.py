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
    full-precision inputs, of one expert. It takes no more memory than the moments themselves."""

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

    def add(self, x: Tensor, expert: int = 0, true: Tensor | None = None) -> None:
        """Inputs float32 [tokens, columns], and the full-precision model's of the same tokens."""
        if not len(x):
            return
        parts = x.chunk(-(-len(x) // SAMPLE))
        if not self.samples[expert]:
            size = x[:SAMPLE].square().mean(0)
            self.weights[expert] = 1 / (size + EVEN * size.mean() + 1e-12)
        weights = self.weights[expert]
        self.tokens[expert] += len(x)
        self.samples[expert] += len(parts)
        add_products(self.total[expert], x)
        changes: tuple[Tensor, ...] = ()
        if self.change is not None and true is not None:
            change = true - x
            self.change.addmm_(change.T, x)
            changes = change.chunk(len(parts))
        for i, part in enumerate(parts):
            # |D^-½ Xᵀ X D^-½|² = |X D^-1 Xᵀ|², which is of tokens and not of columns.
            products = (part * weights) @ part.T
            self.squares[expert] += products.square().sum() - (part.square().sum(0) * weights).square().sum()
            if changes:
                self.change_squares += (products * ((changes[i] * weights) @ changes[i].T)).sum()

    def means(self, tokens: int | None = None) -> tuple[Tensor, Tensor | None]:
        """E[x xᵀ] float32 [experts, columns, columns] and E[x0 xᵀ] [columns, columns], shrunk, as means over `tokens`,
        by default each expert's own. The sums are used up."""
        mirror(self.total)
        for expert, (total, weights, samples) in enumerate(zip(self.total, self.weights, self.samples, strict=True)):
            diagonal = total.diagonal().clone()
            within = _squares(total, weights) - (diagonal * weights).square().sum()
            total *= 1 - _shrinkage(self.squares[expert], within, samples)
            total.diagonal().copy_(diagonal)
        counts = self.tokens.clamp(min=1) if tokens is None else torch.full_like(self.tokens, tokens)
        self.total /= counts.view(-1, 1, 1)  # in place: it can be the largest tensor there is
        if self.change is not None:
            within = _squares(self.change, self.weights[0])
            self.change *= (1 - _shrinkage(self.change_squares, within, self.samples[0])) / counts[0]
            self.change += self.total[0]
        return self.total, self.change


def _squares(matrix: Tensor, weights: Tensor) -> Tensor:
    """Σ_ij w_i w_j m_ij²."""
    parts = zip(matrix.split(ROWS), weights.split(ROWS), strict=True)
    return sum(((rows.square() @ weights) @ own for rows, own in parts), start=weights.new_zeros(()))


def _shrinkage(squares: Tensor, within: Tensor, samples: int) -> Tensor:
    """ρ: `squares` are the samples' sums', `within` those of the sum of them all."""
    if samples < 2:
        return torch.zeros_like(within)
    variance = (squares - within / samples) * (samples / (samples - 1))
    return (variance / within.clamp(min=torch.finfo(within.dtype).tiny)).clamp(0, 1)
