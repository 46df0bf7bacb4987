"""The knapsack under two limits: bytes, and the seconds that one decoded token spends in the groups.

A price per second joins the loss, and what is left is the knapsack under bytes. Its linear relaxation, less price ·
limit, is a lower bound of every allocation within both limits; it is concave in the price, and a bisection finds where
it is highest (Kellerer, Pferschy & Pisinger 2004, ch. 11 and 12.2). Allocations on the way that keep to both limits are
candidates; where the best is further from the bound than the gap, branch and bound decides among the options that the
two prices leave. May import: formats.errors, search.knapsack.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from bitplan.formats.errors import BudgetInfeasible
from bitplan.search import knapsack
from bitplan.search.knapsack import GAP, Option, Options, Solution, branch_and_bound, greedy, loss_of, seconds_of

HALVINGS = 40
"""Prices that are tried, at most."""


@dataclass(frozen=True)
class Latency:
    """A limit on the seconds of one decoded token, as it was `requested`."""

    requested: str
    limit: float
    """Seconds, of the whole step."""
    device: str
    """What it holds for: the processor and its threads, or the GPU."""
    rest: float
    """Predicted seconds of a step outside of the units."""
    aim: float
    """What the search keeps to: the limit, or less where a finished plan was measured above it."""

    @property
    def of_units(self) -> float:
        """What the search leaves the units."""
        return self.aim - self.rest


def fastest(problem: Options, budget: int) -> Solution:
    """The allocation of fewest seconds within `budget` bytes; its `loss` and `bound` are seconds. Raises
    BudgetInfeasible below the floor."""
    timed = {g: [replace(option, loss=option.seconds) for option in options] for g, options in problem.items()}
    return knapsack.solve(timed, budget)


def solve(problem: Options, budget: int, gap: float = GAP, seconds: float = inf) -> Solution:
    """The allocation of least loss within `budget` bytes and `seconds`, to a fraction `gap` of it. Raises
    BudgetInfeasible where there is none."""
    free = knapsack.solve(problem, budget, gap)
    if seconds == inf or seconds_of(_taken(problem, free)) <= seconds:
        return free
    chosen = _taken(problem, fastest(problem, budget))
    if seconds_of(chosen) > seconds:
        raise BudgetInfeasible(
            f"{seconds:g} seconds asked, {seconds_of(chosen):g} is the least within {budget:,} bytes"
        )
    groups = list(problem.values())
    prices, bound = (0.0, 0.0), free.bound
    low, high = 0.0, inf
    per_second = max(loss_of(chosen), 1e-12) / seconds_of(chosen) if seconds_of(chosen) else 1.0
    for _ in range(HALVINGS):
        if loss_of(chosen) - bound <= gap * loss_of(chosen) or high - low <= 1e-6 * low:
            break
        made, per_byte = greedy([_priced(options, per_second) for options in groups], budget)
        made = [_same(options, option) for options, option in zip(groups, made, strict=True)]
        proven = sum(_least(groups, per_byte, per_second)) - per_byte * budget - per_second * seconds
        if proven > bound:
            bound, prices = proven, (per_byte, per_second)
        if seconds_of(made) <= seconds:
            chosen, high = min(chosen, made, key=loss_of), per_second
        else:
            low = per_second
        per_second = (low + high) / 2 if high < inf else 2 * low
    if loss_of(chosen) - bound > gap * loss_of(chosen):
        least = _least(groups, *prices)
        lagrangian = sum(least) - prices[0] * budget - prices[1] * seconds
        chosen, proven = branch_and_bound(groups, least, chosen, prices[0], lagrangian, budget, gap, prices[1], seconds)
        bound = max(bound, proven)
    loss = loss_of(chosen)
    return Solution(
        allocation={group: option.scheme for group, option in zip(problem, chosen, strict=True)},
        nbytes=sum(option.nbytes for option in chosen),
        loss=loss,
        bound=min(bound, loss),  # above it by rounding alone
    )


def _taken(problem: Options, solution: Solution) -> list[Option]:
    return [next(o for o in problem[group] if o.scheme == scheme) for group, scheme in solution.allocation.items()]


def _priced(options: Sequence[Option], per_second: float) -> list[Option]:
    return [Option(o.scheme, o.nbytes, o.loss + per_second * o.seconds) for o in options]


def _same(options: Sequence[Option], priced: Option) -> Option:
    return next(option for option in options if option.scheme == priced.scheme)


def _least(groups: Sequence[Sequence[Option]], per_byte: float, per_second: float) -> list[float]:
    """Of each group, the least loss with bytes and seconds at their prices."""
    return [min(o.loss + per_byte * o.nbytes + per_second * o.seconds for o in options) for options in groups]
