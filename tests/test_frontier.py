"""The frontier against all allocations of small problems, and its price against the knapsack's own gain."""

import itertools

import pytest
from hypothesis import given

from bitplan.formats.scheme import QuantScheme
from bitplan.search.frontier import frontier, knee, price_at
from bitplan.search.knapsack import Option, floor, hull
from tests.test_knapsack import problems


@given(problems)
def test_each_point_is_the_best_for_its_bytes(problem):
    allocations = [(sum(o.nbytes for o in c), sum(o.loss for o in c)) for c in itertools.product(*problem.values())]
    points = frontier(problem)
    assert points[0].nbytes == floor(problem)
    for point in points:
        assert point.loss == pytest.approx(min(loss for size, loss in allocations if size <= point.nbytes), abs=1e-9)


@given(problems)
def test_prices_fall_and_no_allocation_beats_the_price(problem):
    """At a point's price, no allocation has less loss + price · bytes."""
    points = frontier(problem)
    allocations = [(sum(o.nbytes for o in c), sum(o.loss for o in c)) for c in itertools.product(*problem.values())]
    prices = [point.price for point in points]
    assert prices == sorted(prices, reverse=True)
    for point in points[1:]:
        least = min(loss + point.price * size for size, loss in allocations)
        assert point.loss + point.price * point.nbytes == pytest.approx(least, abs=1e-9)
    assert price_at(problem, points[-1].nbytes) == 0
    assert price_at(problem, points[0].nbytes) == (points[1].price if len(points) > 1 else 0)


def test_knee_and_hull():
    options = [Option(QuantScheme(f"f{i}", "nearest"), size, loss) for i, (size, loss) in
               enumerate([(10, 10.0), (20, 2.0), (25, 1.9), (30, 1.0), (100, 0.0)])]  # fmt: skip
    assert [o.nbytes for o in hull(options)] == [10, 20, 30, 100]
    assert knee(frontier({"g": options})).nbytes == 20
