"""The fewest bytes within a loss that is measured, not predicted.

The knapsack gives an allocation for any bytes, and what it loses is measured. Measured and predicted loss differ by a
factor that changes slowly with the bytes: it is interpolated between the closest sizes that were measured, and the next
size is the one whose predicted loss, times that factor, is the limit. May import: search.corrections/frontier/knapsack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitplan.search.corrections import Allocation
from bitplan.search.frontier import frontier
from bitplan.search.knapsack import Options, solve

CLOSE = 1.002
"""Sizes within and beyond the limit that are this close end the search for one between them."""
SIZES = 8
"""Allocations that one call measures, at most."""
GRID = 1025
"""Sizes that are looked at to find the next one."""
TINY = 1e-12
"""Nats that stand for none, whose logarithm is taken."""


@dataclass(frozen=True)
class Tried:
    """An allocation, its bytes by the problem, and its measured loss."""

    allocation: Allocation
    nbytes: int
    loss: float


def smallest(tried: Sequence[Tried], limit: float) -> Tried | None:
    """Of the allocations within the limit the one of fewest bytes."""
    return min((each for each in tried if each.loss <= limit), key=lambda each: (each.nbytes, each.loss), default=None)


def narrow(
    problem: Options, limit: float, measure: Callable[[Allocation], float], tried: Sequence[Tried] = ()
) -> list[Tried]:
    """`tried`, and up to `SIZES` more allocations that close in on the fewest bytes of a loss of at most `limit`.

    Where none is within the limit, the problem's allocation of least predicted loss is among them.
    """
    points = frontier(problem)
    sizes = np.array([point.nbytes for point in points], dtype=float)
    logs = np.log(np.maximum([point.loss for point in points], TINY))
    options = {group: {option.scheme: option for option in options} for group, options in problem.items()}
    least, most = int(sizes[0]), int(sizes[-1])
    tried = list(tried)

    def add(allocation: Allocation) -> None:
        nbytes = sum(options[group][scheme].nbytes for group, scheme in allocation.items())
        tried.append(Tried(allocation, nbytes, measure(allocation)))

    def predicted(low: int, high: int) -> int:
        """The least size above `low` whose predicted loss, with the factor of what was measured, is within the limit;
        `high` where there is none."""
        known: list[tuple[float, float]] = []
        for each in sorted(tried, key=lambda each: each.nbytes):
            loss = sum(options[group][scheme].loss for group, scheme in each.allocation.items())
            if np.isfinite(each.loss):
                known.append((float(each.nbytes), float(np.log(max(each.loss, TINY) / max(loss, TINY)))))
        grid = np.linspace(low, high, GRID)
        factors = np.interp(grid, *np.array(known).T) if known else 0.0
        within = np.flatnonzero(np.interp(grid, sizes, logs) + factors <= np.log(limit))
        return int(grid[within[0]]) if len(within) else high

    for _ in range(SIZES):
        within = smallest(tried, limit)
        high = most if within is None else within.nbytes - 1
        low = max((each.nbytes for each in tried if each.loss > limit and each.nbytes <= high), default=least - 1) + 1
        if high < low * CLOSE and (within is not None or high < low):
            break
        places = (predicted(low, high), (low + high) // 2, high)
        made = (solve(problem, max(size, least)).allocation for size in places if size >= least)
        new = next((each for each in made if all(each != other.allocation for other in tried)), None)
        if new is None:
            break
        add(new)
    last = solve(problem, most).allocation
    if smallest(tried, limit) is None and all(last != each.allocation for each in tried):
        add(last)
    return tried
