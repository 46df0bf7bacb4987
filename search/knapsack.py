"""Which format each group gets: a multiple-choice knapsack, solved exactly.

Minimise the summed loss with one option per group and the summed bytes within the budget
(Kellerer, Pferschy & Pisinger 2004, ch. 11), by HiGHS' branch and bound. May import: formats.errors, sensitivity.bank.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bitplan.formats.errors import BitplanError, BudgetInfeasible
from bitplan.formats.scheme import QuantScheme

GAP = 1e-4
"""Where the proven distance to the optimum falls below this fraction of the loss, the solver stops."""
SECONDS = 10
"""And here in any case: the solution then says the gap that is left."""


@dataclass(frozen=True)
class Option:
    """One way for a group, all of its units together."""

    scheme: QuantScheme
    nbytes: int
    loss: float


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


@contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """HiGHS prints a note of its own to the process' stdout now and then: inside, that is stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what the C library still holds
        os.dup2(kept, 1)
        os.close(kept)


def solve(problem: Options, budget: int) -> Solution:
    """The allocation of least loss within `budget` bytes. Raises BudgetInfeasible below the floor."""
    if floor(problem) > budget:
        raise BudgetInfeasible(f"{budget:,} bytes asked, {floor(problem):,} is the least that the formats allow")
    menus = {group: undominated(options) for group, options in problem.items()}
    flat = [(row, option) for row, options in enumerate(menus.values()) for option in options]
    rows = [row for row, _ in flat]
    nbytes = np.array([option.nbytes for _, option in flat], dtype=np.int64)
    losses = np.array([option.loss for _, option in flat])
    scale = losses.max() or 1.0
    unit = gcd(*nbytes.tolist())
    one_each = csr_array((np.ones(len(flat)), (rows, range(len(flat)))), shape=(len(menus), len(flat)))
    # HiGHS works to a tolerance: where its answer is some bytes over, ask again for that much less.
    limit = budget
    for _ in range(8):
        within = LinearConstraint((nbytes // unit)[None, :].astype(float), -np.inf, limit // unit)
        with _stdout_kept_clean():
            result = milp(
                losses / scale,
                integrality=np.ones(len(flat), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), within],
                options={"mip_rel_gap": GAP, "time_limit": SECONDS},
            )
        if result.x is None:
            raise BitplanError(f"the allocation of {len(menus)} groups was not solved in {SECONDS} s: {result.message}")
        chosen = np.flatnonzero(result.x > 0.5)
        used = int(nbytes[chosen].sum())
        if used <= budget:
            picked = [flat[i][1] for i in chosen]
            loss = sum(option.loss for option in picked)
            return Solution(
                allocation={group: option.scheme for group, option in zip(menus, picked, strict=True)},
                nbytes=used,
                loss=loss,
                bound=min(float(result.mip_dual_bound) * scale, loss),  # beyond it by rounding alone
            )
        limit -= used - budget
    raise BitplanError(f"the allocation stays {used - budget} bytes over {budget:,}")
