"""How good and how fast is the search? `make bench-search`; `--knapsack` for the solver alone (a minute).

May import: everything.
"""

import argparse
import random
import time

from benchmarks.machine import described
from bitplan.formats.scheme import QuantScheme
from bitplan.planner.report.tables import table
from bitplan.search.frontier import frontier
from bitplan.search.knapsack import Option, Options, ceiling, floor, solve

SIZES = ((43, 12), (200, 12), (1000, 30), (10_000, 30))
"""Groups and options each."""
SHARES = (0.05, 0.2, 0.5)
"""Budgets, from the smallest allocation to the largest."""


def random_problem(groups: int, each: int) -> Options:
    """Options whose loss falls fourfold with each bit, in groups of very different sizes and weights."""
    draw = random.Random(0)

    def options() -> list[Option]:
        size, weight = draw.choice((576 * 576, 576 * 1536, 4096 * 4096, 4096 * 11008)), draw.lognormvariate(0, 2)
        bits = [draw.uniform(1, 16) for _ in range(each)]
        return [
            Option(QuantScheme(f"f{j}", "gptq"), int(size * b / 8), weight * 4.0**-b * draw.uniform(0.5, 2))
            for j, b in enumerate(bits)
        ]

    return {f"g{i}": options() for i in range(groups)}


def knapsack_table() -> str:
    rows = []
    for groups, each in SIZES:
        problem = random_problem(groups, each)
        least, most = floor(problem), ceiling(problem)
        for share in SHARES:
            began = time.perf_counter()
            solution = solve(problem, int(least + share * (most - least)))
            seconds = time.perf_counter() - began
            rows.append((f"{groups:,} × {each}", f"{share:g}", f"{solution.gap:.1e}", f"{seconds:.2f}"))
        began = time.perf_counter()
        points = frontier(problem)
        rows.append((f"{groups:,} × {each}", f"all {len(points):,} points", "", f"{time.perf_counter() - began:.2f}"))
    return table(("groups × options", "budget", "proven gap", "seconds"), rows, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--knapsack", action="store_true", help="the solver on random problems")
    arguments = parser.parse_args()
    if arguments.knapsack:
        print(knapsack_table())
    print(described())


if __name__ == "__main__":
    main()
