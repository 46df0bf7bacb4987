"""Aligned columns, and names with their layers folded. May import: planner.plan."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import isfinite

from bitplan.planner.plan import Plan, PlannedUnit

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns aligned with spaces: the first `left` to the left, the others to the right."""
    lines = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def folded(plan: Plan) -> list[tuple[str, str, str, int]]:
    """Units with layer numbers starred: name, which layers, format and rounding, bytes."""
    groups: dict[str, dict[str, list[PlannedUnit]]] = defaultdict(lambda: defaultdict(list))
    for unit in plan.units:
        groups[NUMBER.sub("*", unit.name)][str(unit.scheme)].append(unit)
    return [
        (name, layers([unit.name for unit in units]), scheme, sum(unit.bytes for unit in units))
        for name, schemes in groups.items()
        for scheme, units in schemes.items()
    ]


def layers(names: Sequence[str]) -> str:
    """The first number of each name, runs of them joined: 0-3, 7; and how many names, where that is another number."""
    numbers = sorted({int(found.group()) for name in names if (found := NUMBER.search(name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return listed if len(names) == max(1, len(numbers)) else f"{listed} (×{len(names)})"


def with_error(value: str, error: float | None, digits: int = 5) -> str:
    """A figure and its standard error, where it has one: one block of text gives none."""
    return value if error is None or not isfinite(error) else f"{value} ± {error:.{digits}f}"


def with_interval(accuracy: bool, value: float, difference: float, low: float, high: float) -> str:
    """A figure, and in brackets its difference from full precision with the interval."""
    if accuracy:
        return f"{value:.1%} ({100 * difference:+.1f}, {100 * low:+.1f} … {100 * high:+.1f})"
    return f"{value:.4f} ({difference:+.4f}, {low:+.4f} … {high:+.4f})"
