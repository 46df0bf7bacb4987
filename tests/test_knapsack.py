import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.scheme import QuantScheme
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
