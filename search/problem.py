"""The allocation problem: groups, the schemes that each can take, their bytes and predicted losses.

May import: formats, search.knapsack/overrides/study, sensitivity.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.sizes import format_bytes
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.search import knapsack
from bitplan.search.knapsack import Option, Options
from bitplan.search.overrides import Override, overridden
from bitplan.search.study import Allocation
from bitplan.sensitivity.graph import ON_REQUEST
from bitplan.sensitivity.profile import Profile, ProfileRow


@dataclass(frozen=True)
class Problem:
    """A profile's rows by group. An allocation is a dict from each group to the scheme that all of its units get."""

    profile: Profile
    options: Options
    """Group → its schemes with their bytes and predicted losses, summed over the group's units."""
    rows: dict[tuple[str, QuantScheme], ProfileRow]
    members: dict[str, list[str]]
    """Group → its units."""
    formats: tuple[str, ...] | None = None
    """What was offered; None: all that the profile has."""
    overrides: tuple[Override, ...] = ()
    """What cut down the options; `offered` are those before."""
    offered: Options = field(default_factory=dict)

    def nbytes(self, allocation: Allocation) -> int:
        """Bytes of the whole model, unquantized tensors included."""
        return self.profile.unquantized_bytes + sum(self._option(g, s).nbytes for g, s in allocation.items())

    def loss(self, allocation: Allocation) -> float:
        """Predicted nats per token above full precision."""
        return sum(self._option(g, s).loss for g, s in allocation.items())

    def _option(self, group: str, scheme: QuantScheme) -> Option:
        return next(option for option in self.options[group] if option.scheme == scheme)

    def uniform(self, budget: int) -> list[tuple[QuantScheme, Allocation]]:
        """Allocations of one scheme for all groups within `budget` bytes, by rising predicted loss. A group that an
        override keeps from the scheme has its smallest option."""
        common = set.intersection(*({option.scheme for option in options} for options in self.offered.values()))
        uniform = []
        for scheme in sorted(common):
            taking = {group for group, options in self.options.items() if scheme in {o.scheme for o in options}}
            if taking:
                smallest = {group: min(self.options[group], key=lambda o: (o.nbytes, o.loss)) for group in self.options}
                uniform.append((scheme, {g: scheme if g in taking else smallest[g].scheme for g in self.options}))
        fitting = [(scheme, allocation) for scheme, allocation in uniform if self.nbytes(allocation) <= budget]
        return sorted(fitting, key=lambda pair: self.loss(pair[1]))


def problem_of(profile: Profile, formats: Sequence[str] | None = None, overrides: Sequence[Override] = ()) -> Problem:
    """Group the profile's rows; with `formats`, only those and the checkpoint's own types. Overrides bind whole groups.

    Raises UsageError for an override that matches nothing, or leaves a group without a format.
    """
    made = _grouped(profile, formats)
    if not overrides:
        return made
    every = _grouped(profile, None).options
    options = overridden(profile, made.options, every, made.members, overrides)
    return replace(made, options=options, overrides=tuple(overrides))


def _grouped(profile: Profile, formats: Sequence[str] | None) -> Problem:
    rows = {(row.unit, QuantScheme(row.format, row.rounding)): row for row in profile.rows}
    native = {unit.name: DTYPES[unit.dtype] for unit in profile.units}
    schemes: dict[str, list[QuantScheme]] = defaultdict(list)
    for name, scheme in rows:
        if formats is None or scheme.format in formats or scheme.format == native[name]:
            schemes[name].append(scheme)
    members: dict[str, list[str]] = defaultdict(list)
    for unit in profile.units:
        members[unit.group].append(unit.name)
    options = {}
    for group, names in members.items():
        shared = [scheme for scheme in schemes[names[0]] if all(scheme in schemes[name] for name in names)]
        options[group] = [
            Option(scheme, sum(rows[n, scheme].bytes for n in names), sum(rows[n, scheme].cost for n in names))
            for scheme in shared
        ]
    offered = None if formats is None else tuple(formats)
    return Problem(profile, options, rows, dict(members), offered, offered=options)


def refuse_infeasible(problem: Problem, budget: int, requested: str) -> None:
    """Raises BudgetInfeasible where no allocation has at most `budget` bytes: the sentence names the budget as it was
    `requested`, the least bytes there are, and what to change."""
    unquantized = problem.profile.unquantized_bytes
    least = knapsack.floor(problem.options) + unquantized
    if budget >= least:
        return
    if knapsack.floor(problem.offered) + unquantized <= budget:
        raise BudgetInfeasible(_overrides_too_big(problem, least, budget, requested))
    parameters = problem.profile.provenance.model.parameters
    names = {option.scheme.format for options in problem.options.values() for option in options}
    in_large = {name: format.nbytes(4096, 4096) for name, format in FORMATS.items()}
    smaller = [name for name, size in in_large.items() if size < min(in_large[known] for known in names)]
    ways = [f"raise the budget to at least --budget {least}B"]
    ways += [f"add a smaller format to --formats ({', '.join(smaller)})"] if smaller else []
    ways += ["drop --keep"] if any(entry.reason == ON_REQUEST for entry in problem.profile.unquantized) else []
    raise BudgetInfeasible(
        f"{requested} is {budget:,} bytes, and the least that the formats {', '.join(sorted(names))} allow is"
        f" {least:,} bytes ({format_bytes(least)}, {least * 8 / parameters:.3f} bits per weight), of which"
        f" {unquantized:,} bytes are {len(problem.profile.unquantized)} unquantized tensors: {', or '.join(ways)}"
    )


def _overrides_too_big(problem: Problem, least: int, budget: int, requested: str) -> str:
    """Which overrides a budget cannot hold, and by how much."""
    extra = {}
    for override in problem.overrides:
        others = [each for each in problem.overrides if each != override]
        without = problem_of(problem.profile, problem.formats, others)
        extra[override] = knapsack.floor(problem.options) - knapsack.floor(without.options)
    worst = sorted(problem.overrides, key=lambda override: -extra[override])
    takes = ", ".join(f"{override} takes {extra[override]:,} bytes more than without it" for override in worst)
    return (
        f"{requested} is {budget:,} bytes, and the overrides need at least {least:,}, {least - budget:,} more: {takes};"
        f" drop one, or raise the budget to at least --budget {least}B"
    )
