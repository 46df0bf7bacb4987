"""Sums of x xᵀ, which are symmetric: only about half of each product is computed. May import: torch only."""

from collections.abc import Iterator

from torch import Tensor

PANELS = 8
LEAST = 128
"""The least width of a panel: narrower products are slower."""


def _panels(columns: int) -> Iterator[slice]:
    width = max(LEAST, -(-columns // PANELS))
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def add_products(total: Tensor, x: Tensor) -> None:
    """Add Σ x xᵀ over the rows of float32 x [n, columns] to `total` [columns, columns], but for blocks below the
    diagonal, which `mirror` fills."""
    for panel in _panels(len(total)):
        total[panel, panel.start :].addmm_(x[:, panel].T, x[:, panel.start :])


def mirror(total: Tensor) -> None:
    """Make what `add_products` summed symmetric, in place: float32 [..., columns, columns]."""
    for panel in _panels(total.shape[-1]):
        total[..., panel.stop :, panel] = total[..., panel, panel.stop :].mT
