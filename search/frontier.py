"""The frontier of loss against bytes, and the price of a byte at a budget.

At a price p, in nats per token and byte, each group takes the option of least loss + p · bytes. Letting p fall from
infinity to zero walks through allocations that are each optimal for their own bytes: the lower convex hull of all
allocations (Everett 1963, generalized Lagrange multipliers). No solver is needed, so a whole sweep of budgets takes
milliseconds; between two of its points the integer optimum of `search.knapsack.solve` lies on the hull or above.

May import: search.knapsack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bitplan.search.knapsack import Option, Options, hull


@dataclass(frozen=True)
class Step:
    """A group that changes from one option to a larger one."""

    group: str
    before: Option
    after: Option

    @property
    def price(self) -> float:
        """Nats per token that are gained for each byte."""
        return (self.before.loss - self.after.loss) / (self.after.nbytes - self.before.nbytes)


@dataclass(frozen=True)
class Point:
    """One allocation of the frontier: its bytes, its summed loss, and the price of the step that led to it."""

    nbytes: int
    loss: float
    price: float


def steps(problem: Options) -> list[Step]:
    """All steps from the smallest allocation to the one of least loss, the most nats per byte first."""
    found = []
    for group, options in problem.items():
        corners = hull(options)
        found += [Step(group, a, b) for a, b in pairwise(corners)]
    return sorted(found, key=lambda step: -step.price)


def frontier(problem: Options) -> list[Point]:
    """The points of the hull by rising bytes. The first is the smallest allocation, whose price is infinite."""
    corners = [hull(options)[0] for options in problem.values()]
    points = [Point(sum(o.nbytes for o in corners), sum(o.loss for o in corners), float("inf"))]
    for step in steps(problem):
        last = points[-1]
        nbytes = last.nbytes + step.after.nbytes - step.before.nbytes
        points.append(Point(nbytes, last.loss - step.before.loss + step.after.loss, step.price))
    return points


def price_at(problem: Options, budget: int) -> float:
    """What one more byte would gain at a budget, in nats per token: the Lagrange multiplier of the knapsack's linear
    relaxation, which is the price of the first step that no longer fits; 0.0 where all of them do."""
    return next((point.price for point in frontier(problem) if point.nbytes > budget), 0.0)


def knee(points: Sequence[Point]) -> Point:
    """The point farthest below the straight line between the frontier's ends, both axes scaled to their range
    (Kneedle: Satopää et al. 2011): before it bytes gain much, after it little."""
    first, last = points[0], points[-1]
    width, height = last.nbytes - first.nbytes, first.loss - last.loss
    if not width or not height:
        return first
    return max(points, key=lambda p: (first.loss - p.loss) / height - (p.nbytes - first.nbytes) / width)
