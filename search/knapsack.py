"""Which format each group gets: a multiple-choice knapsack, solved to a proven gap.

Minimise the summed loss with one option per group and the summed bytes within the budget (Kellerer, Pferschy &
Pisinger 2004, ch. 11). At a price p per byte each group takes its option of least loss + p · bytes; the sum of those
minima less p · budget is a lower bound of every allocation's loss (the Lagrangian; at the break step's price it is the
linear relaxation's). The steps before the break step make an allocation within the budget, which exchanges between two
groups improve. Where the two are still further apart than `GAP`, options whose reduced cost exceeds the difference
cannot be in a better allocation and are dropped, and HiGHS' branch and bound solves what is left. A second limit, on
seconds, is `search.latency`'s.

May import: formats.errors, formats.scheme.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd, inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.scheme import QuantScheme

GAP = 1e-4
"""The solver stops where the proven distance to the optimum is below this fraction of the loss."""
SECONDS = 4
"""Branch and bound also stops here; the solution then has the gap that is left."""
EXCHANGES, TRIED = 50, 20
"""Improvements of the relaxation's rounding before branch and bound, and moves looked at for each."""


@dataclass(frozen=True)
class Option:
    """One way for a group, all of its units together."""

    scheme: QuantScheme
    nbytes: int
    loss: float
    seconds: float = field(default=0.0, repr=False)
    """That one decoded token spends in the group, where a latency is limited. Studies are known by the rest's repr."""


Options = Mapping[str, Sequence[Option]]


@dataclass(frozen=True)
class Solution:
    allocation: dict[str, QuantScheme]
    """Group → scheme."""
    nbytes: int
    loss: float
    bound: float
    """No allocation within the budget has a smaller loss than this."""

    @property
    def gap(self) -> float:
        """Proven distance to the optimum, as a fraction of the loss."""
        return max(0.0, self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def floor(problem: Options) -> int:
    """Bytes of the smallest allocation there is."""
    return sum(min(option.nbytes for option in options) for options in problem.values())


def ceiling(problem: Options) -> int:
    return sum(max(option.nbytes for option in options) for options in problem.values())


def undominated(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in both bytes and loss, by rising bytes."""
    best: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bytes, by rising bytes: what some price would choose."""
    corners: list[Option] = []
    for option in undominated(options):
        while len(corners) > 1 and _slope(corners[-2], option) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(option)
    return corners


def _slope(a: Option, b: Option) -> float:
    return (b.loss - a.loss) / (b.nbytes - a.nbytes)


def solve(problem: Options, budget: int, gap: float = GAP) -> Solution:
    """The allocation of least loss within `budget` bytes, to a fraction `gap` of it. Raises BudgetInfeasible below the
    floor."""
    if floor(problem) > budget:
        raise BudgetInfeasible(f"{budget:,} bytes asked, {floor(problem):,} is the least that the formats allow")
    groups = [undominated(options) for options in problem.values()]
    chosen, price = greedy(groups, budget)
    if price == 0:  # every group has its least loss
        bound = loss_of(chosen)
    else:
        least = [min(option.loss + price * option.nbytes for option in options) for options in groups]
        bound = sum(least) - price * budget
        chosen = _exchanged(groups, chosen, bound, budget, gap)
        if loss_of(chosen) - bound > gap * loss_of(chosen):
            chosen, bound = branch_and_bound(groups, least, chosen, price, bound, budget, gap)
    loss = loss_of(chosen)
    return Solution(
        allocation={group: option.scheme for group, option in zip(problem, chosen, strict=True)},
        nbytes=_nbytes(chosen),
        loss=loss,
        bound=min(bound, loss),  # above it by rounding alone
    )


def loss_of(options: Sequence[Option]) -> float:
    return sum(option.loss for option in options)


def _nbytes(options: Sequence[Option]) -> int:
    return sum(option.nbytes for option in options)


def seconds_of(options: Iterable[Option]) -> float:
    return sum(option.seconds for option in options)


def greedy(groups: Sequence[Sequence[Option]], budget: int) -> tuple[list[Option], float]:
    """The hull's steps, most nats per byte first, up to the first that does not fit. Returns the options and that
    step's nats per byte, 0.0 if all fit."""
    corners = [hull(options) for options in groups]
    chosen = [options[0] for options in corners]
    left = budget - _nbytes(chosen)
    steps = [(_slope(a, b), row, b) for row, options in enumerate(corners) for a, b in pairwise(options)]
    steps.sort(key=lambda step: step[0])
    for slope, row, after in steps:
        left -= after.nbytes - chosen[row].nbytes
        if left < 0:
            return chosen, -slope
        chosen[row] = after
    return chosen, 0.0


def _exchanged(
    groups: Sequence[Sequence[Option]], chosen: list[Option], bound: float, budget: int, gap: float
) -> list[Option]:
    """`chosen` after exchanges, as long as they help and the gap is open: one group takes an option of less loss and,
    where the bytes that are left do not suffice, another frees some at the least loss."""
    flat = [(row, option) for row, options in enumerate(groups) for option in options]
    rows = np.array([row for row, _ in flat])
    nbytes, losses = np.array([o.nbytes for _, o in flat], dtype=np.int64), np.array([o.loss for _, o in flat])
    chosen = list(chosen)
    for _ in range(EXCHANGES):
        if loss_of(chosen) - bound <= gap * loss_of(chosen):
            break
        more = nbytes - np.array([o.nbytes for o in chosen], dtype=np.int64)[rows]
        gain = np.array([o.loss for o in chosen])[rows] - losses
        frees = np.flatnonzero(more < 0)
        frees = frees[np.argsort(-more[frees], kind="stable")]
        # The least loss that frees as many bytes or more: the minimum over the rest of the list, infinite at its end.
        paid = np.append(np.minimum.accumulate(-gain[frees][::-1])[::-1], np.inf)
        takes = np.flatnonzero(gain > 0)
        needed = more[takes] - (budget - _nbytes(chosen))
        at = np.searchsorted(-more[frees], needed)
        net = gain[takes] - np.where(needed > 0, paid[at], 0.0)
        for best in np.argsort(-net, kind="stable")[:TRIED]:
            if net[best] <= 0:
                return chosen
            take = takes[best]
            give = None if needed[best] <= 0 else frees[at[best] + np.argmin(-gain[frees[at[best] :]])]
            if give is None or rows[give] != rows[take]:
                for each in (take,) if give is None else (take, give):
                    chosen[rows[each]] = flat[each][1]
                break
        else:
            return chosen
    return chosen


@contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """HiGHS prints a note of its own to the process' stdout now and then: inside, that is stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what the C library still holds
        os.dup2(stdout, 1)
        os.close(stdout)


def branch_and_bound(
    groups: Sequence[Sequence[Option]],
    least: Sequence[float],
    chosen: list[Option],
    price: float,
    bound: float,
    budget: int,
    gap: float,
    per_second: float = 0.0,
    seconds: float = inf,
) -> tuple[list[Option], float]:
    """The best allocation that HiGHS finds, `chosen` at worst, and its bound. `least` are the groups' losses at
    `price` and, where seconds are limited too, at a price `per_second`."""

    def cost(option: Option) -> float:
        return option.loss + price * option.nbytes + per_second * option.seconds

    slack = (loss_of(chosen) - bound) * (1 + 1e-9)
    left = [[o for o in groups[row] if cost(o) - least[row] <= slack] for row in range(len(groups))]
    open_rows = [row for row, options in enumerate(left) if len(options) > 1]
    if not open_rows or any(not options for options in left):  # nothing better is possible, but for rounding
        return chosen, loss_of(chosen)
    fixed = [options[0] for options in left if len(options) == 1]
    flat = [(i, option) for i, row in enumerate(open_rows) for option in left[row]]
    nbytes = np.array([option.nbytes for _, option in flat], dtype=np.int64)
    losses = np.array([option.loss for _, option in flat])
    scale = losses.max() or 1.0
    unit = gcd(*nbytes.tolist())
    shape = (len(open_rows), len(flat))
    one_each = csr_array((np.ones(len(flat)), ([i for i, _ in flat], range(len(flat)))), shape=shape)
    room = budget - _nbytes(fixed)
    gap *= loss_of(chosen) / max(loss_of(chosen) - loss_of(fixed), gap * loss_of(chosen))  # of what is open
    limit, limited = room, seconds < inf
    times = np.array([option.seconds for _, option in flat])
    second = float(times.max()) or 1.0
    most = seconds - seconds_of(fixed)
    # HiGHS works to a tolerance: where its answer is some bytes or seconds over, ask again for that much less.
    for _ in range(8):
        within = [LinearConstraint((nbytes // unit)[None, :].astype(float), -np.inf, limit // unit)]
        within += [LinearConstraint((times / second)[None, :], -np.inf, most / second)] if limited else []
        with _stdout_kept_clean():
            result = milp(
                losses / scale,
                integrality=np.ones(len(flat), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), *within],
                options={"mip_rel_gap": min(gap, 1.0), "time_limit": SECONDS},
            )
        if result.x is None:
            return chosen, bound
        picked = {open_rows[flat[i][0]]: flat[i][1] for i in np.flatnonzero(result.x > 0.5)}
        used = sum(option.nbytes for option in picked.values())
        found = [picked.get(row, options[0]) for row, options in enumerate(left)]
        over = seconds_of(found) - seconds
        if used <= room and over <= 0:
            whole = limit == room and most == seconds - seconds_of(fixed)
            proven = loss_of(fixed) + float(result.mip_dual_bound) * scale if whole else bound
            return min(found, chosen, key=loss_of), max(bound, proven)
        limit -= max(0, used - room)
        most -= 2 * max(0.0, over)
    return chosen, bound
