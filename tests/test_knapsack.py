import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.scheme import QuantScheme
from bitplan.search import knapsack
from bitplan.search.knapsack import GAP, Option, ceiling, floor, solve, undominated

options = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4).map(
    lambda pairs: [Option(QuantScheme(f"f{i}", "nearest"), nbytes, loss) for i, (nbytes, loss) in enumerate(pairs)]
)
problems = st.lists(options, min_size=1, max_size=5).map(lambda groups: {f"g{i}": g for i, g in enumerate(groups)})


@given(problems, st.floats(0, 1))
def test_equals_brute_force(problem, share):
    budget = floor(problem) + round(share * (ceiling(problem) - floor(problem)))
    fitting = [c for c in itertools.product(*problem.values()) if sum(o.nbytes for o in c) <= budget]
    best = min(sum(o.loss for o in c) for c in fitting)
    solution = solve(problem, budget)
    assert solution.nbytes <= budget
    largest = max(o.loss for group in problem.values() for o in group)
    assert solution.loss == pytest.approx(best, rel=2 * GAP, abs=1e-6 * largest)  # HiGHS' absolute gap
    assert solution.bound <= best * (1 + 1e-9) + 1e-9
    picked = [next(o for o in problem[g] if o.scheme == c) for g, c in solution.allocation.items()]
    assert solution.nbytes == sum(o.nbytes for o in picked)
    assert solution.loss == pytest.approx(sum(o.loss for o in picked))


@given(problems)
def test_below_the_floor_is_infeasible_and_at_it_is_not(problem):
    assert solve(problem, floor(problem)).nbytes == floor(problem)
    with pytest.raises(BudgetInfeasible):
        solve(problem, floor(problem) - 1)


@given(options)
def test_undominated_options_rise_in_bytes_and_fall_in_loss(group):
    kept = undominated(group)
    assert all(a.nbytes < b.nbytes and a.loss > b.loss for a, b in itertools.pairwise(kept))
    assert all(any(k.nbytes <= o.nbytes and k.loss <= o.loss for k in kept) for o in group)


def test_a_real_size_with_bytes_beyond_32_bits():
    sizes = [2_000_000_000, 1_100_000_000, 600_000_004, 300_000_000]
    problem = {
        f"g{i}": [
            Option(QuantScheme(f"f{j}", "gptq"), size + 4 * i, (i % 7 + 1) * 10.0 ** (j - 6))
            for j, size in enumerate(sizes)
        ]
        for i in range(160)
    }
    budget = 160 * 650_000_000
    solution = solve(problem, budget)
    assert solution.nbytes <= budget
    assert solution.gap <= GAP


def random_problem(groups, each, seed):
    """Options whose loss falls fourfold with each bit, groups of very different sizes and weights."""
    draw = random.Random(seed)

    def options():
        size, weight = draw.choice((576 * 576, 576 * 1536, 4096 * 4096)), draw.lognormvariate(0, 2)
        bits = [draw.uniform(1, 16) for _ in range(each)]
        return [
            Option(QuantScheme(f"f{j}", "gptq"), int(size * b / 8), weight * 4.0**-b * draw.uniform(0.5, 2))
            for j, b in enumerate(bits)
        ]

    return {f"g{i}": options() for i in range(groups)}


def highs(problem, budget):
    """The least loss by HiGHS on the whole problem: nothing dropped, no start."""
    flat = [(row, option) for row, options in enumerate(problem.values()) for option in options]
    rows = np.array([[row == i for row, _ in flat] for i in range(len(problem))], dtype=float)
    losses, nbytes = np.array([o.loss for _, o in flat]), np.array([[float(o.nbytes) for _, o in flat]])
    constraints = [LinearConstraint(rows, 1, 1), LinearConstraint(nbytes / budget, -np.inf, 1)]
    scale = losses.max()
    with knapsack._stdout_kept_clean():
        found = milp(losses / scale, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=constraints)
    return float(found.fun) * scale


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_equals_highs_on_the_whole_problem(share):
    problem = random_problem(12, 6, seed=round(100 * share))
    budget = floor(problem) + round(share * (ceiling(problem) - floor(problem)))
    solution, best = solve(problem, budget), highs(problem, budget)
    assert solution.nbytes <= budget
    assert solution.loss <= best * (1 + GAP)  # HiGHS' absolute gap leaves its own answer above the optimum
    assert solution.bound <= best * (1 + 1e-6)


def test_thousands_of_groups_need_no_branch_and_bound(monkeypatch):
    """At this size the linear relaxation's own rounding is within the gap, where budgets are not at the very edge."""
    monkeypatch.setattr(knapsack, "milp", lambda *_, **__: pytest.fail("branch and bound"))
    problem = random_problem(3000, 8, 1)
    for share in (0.1, 0.4):
        budget = floor(problem) + round(share * (ceiling(problem) - floor(problem)))
        solution = solve(problem, budget)
        assert solution.nbytes <= budget
        assert solution.gap <= GAP
