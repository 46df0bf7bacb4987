"""A profile as the knapsack's problem. May import: formats, search.knapsack, sensitivity, planner.budget/plan."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.sizes import format_bytes
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.search import knapsack
from bitplan.search.knapsack import Option, Problem
from bitplan.search.study import Allocation
from bitplan.sensitivity.bank import Choice
from bitplan.sensitivity.profile import Profile, Row


@dataclass(frozen=True)
class Menu:
    """A profile as the knapsack's problem."""

    profile: Profile
    problem: Problem
    rows: dict[tuple[str, Choice], Row]
    members: dict[str, list[str]]
    """Group → its units."""

    def nbytes(self, allocation: Allocation) -> int:
        return self.profile.kept_bytes + sum(self._option(g, c).nbytes for g, c in allocation.items())

    def loss(self, allocation: Allocation) -> float:
        return sum(self._option(g, c).loss for g, c in allocation.items())

    def _option(self, group: str, choice: Choice) -> Option:
        return next(option for option in self.problem[group] if option.choice == choice)

    def uniform(self, budget: int) -> list[tuple[Choice, Allocation]]:
        """Allocations of one choice for all that fit the budget, by rising predicted loss."""
        common = set.intersection(*({option.choice for option in options} for options in self.problem.values()))
        all_alike = [(choice, dict.fromkeys(self.problem, choice)) for choice in sorted(common)]
        fitting = [(choice, alike) for choice, alike in all_alike if self.nbytes(alike) <= budget]
        return sorted(fitting, key=lambda pair: self.loss(pair[1]))


def menu_of(profile: Profile, formats: Sequence[str] | None = None) -> Menu:
    """Group the profile's rows; with `formats`, only those and the checkpoint's own types."""
    rows = {(row.unit, Choice(row.format, row.rounding)): row for row in profile.rows}
    native = {unit.name: DTYPES[unit.dtype] for unit in profile.units}
    choices: dict[str, list[Choice]] = defaultdict(list)
    for name, choice in rows:
        if formats is None or choice.format in formats or choice.format == native[name]:
            choices[name].append(choice)
    members: dict[str, list[str]] = defaultdict(list)
    for unit in profile.units:
        members[unit.group].append(unit.name)
    problem = {}
    for group, names in members.items():
        shared = [choice for choice in choices[names[0]] if all(choice in choices[name] for name in names)]
        problem[group] = [
            Option(choice, sum(rows[n, choice].bytes for n in names), sum(rows[n, choice].cost for n in names))
            for choice in shared
        ]
    return Menu(profile, problem, rows, dict(members))


def refuse_infeasible(menu: Menu, budget: int, requested: str) -> None:
    """Raises BudgetInfeasible where no allocation has at most `budget` bytes: names the budget as it was `requested`, the
    least bytes, and what to change."""
    kept = menu.profile.kept_bytes
    least = knapsack.floor(menu.problem) + kept
    if budget >= least:
        return
    parameters = menu.profile.provenance.model.parameters
    names = {option.choice.format for options in menu.problem.values() for option in options}
    in_large = {name: format.nbytes(4096, 4096) for name, format in FORMATS.items()}
    smaller = [name for name, size in in_large.items() if size < min(size for name in names)]
    ways = [f"raise the budget to at least --budget {least}B"]
    ways += [f"add a smaller format to --formats ({', '.join(smaller)})"] if smaller else []
    ways += ["drop --keep"] if any(entry.reason == "kept on request" for entry in menu.profile.kept) else []
    raise BudgetInfeasible(
        f"{requested} is {budget:,} bytes, and the least that the"
        f" formats {', '.join(sorted(names))} allow is"
        f" {least:,} bytes ({format_bytes(least)}, {least * 8 / parameters:.3f} bits per weight), of which {kept:,} bytes are"
        f" {len(menu.profile.kept)} tensors kept as they are: {', or '.join(ways)}"
    )
