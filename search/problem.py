"""The allocation problem: groups, the schemes that each can take, their bytes and predicted losses.

May import: formats, search.corrections/knapsack/latency/overrides, sensitivity.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf, log10

from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.sizes import format_bytes
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.search import knapsack, latency
from bitplan.search.corrections import Allocation
from bitplan.search.knapsack import GAP, Option, Options, Solution
from bitplan.search.latency import Latency
from bitplan.search.overrides import Override, overridden
from bitplan.sensitivity.graph import ON_REQUEST
from bitplan.sensitivity.profile import Profile, ProfileRow, UnitEntry


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
    latency: Latency | None = None
    """A limit beside the bytes."""

    def nbytes(self, allocation: Allocation) -> int:
        """Bytes of the whole model, unquantized tensors included."""
        return self.profile.unquantized_bytes + sum(self._option(g, s).nbytes for g, s in allocation.items())

    def loss(self, allocation: Allocation) -> float:
        """Predicted nats per token above full precision."""
        return sum(self._option(g, s).loss for g, s in allocation.items())

    def seconds(self, allocation: Allocation) -> float:
        """Predicted seconds that one decoded token spends in the units."""
        return sum(self._option(g, s).seconds for g, s in allocation.items())

    @property
    def unit_seconds(self) -> float:
        """What the units may take of a decoded token's step; infinite without a limit."""
        return self.latency.of_units if self.latency else inf

    def solved(self, budget: int, gap: float = GAP) -> Solution:
        """The allocation of least predicted loss within `budget` bytes, unquantized tensors included, and within the
        latency. Raises BudgetInfeasible."""
        return latency.solve(self.options, budget - self.profile.unquantized_bytes, gap, self.unit_seconds)

    def fits(self, allocation: Allocation, budget: int) -> bool:
        """Whether it keeps to `budget` bytes and to the latency."""
        return self.nbytes(allocation) <= budget and self.seconds(allocation) <= self.unit_seconds

    def _option(self, group: str, scheme: QuantScheme) -> Option:
        return next(option for option in self.options[group] if option.scheme == scheme)

    def uniform(self, budget: int) -> list[tuple[QuantScheme, Allocation]]:
        """Allocations of one scheme for all groups within `budget` bytes and the latency, by rising predicted loss. A
        group that an override keeps from the scheme has its smallest option."""
        made = [(scheme, self._filled(dict.fromkeys(self.options, scheme))) for scheme in self._common()]
        fitting = [(scheme, each) for scheme, each in made if each is not None and self.fits(each, budget)]
        return sorted(fitting, key=lambda pair: self.loss(pair[1]))

    def ends_high(self, budget: int) -> Allocation | None:
        """The allocation of least predicted loss within `budget` bytes and the latency that gives one scheme to the
        first and the last layer and to what belongs to no layer, and a smaller one to all others. None where there is
        none."""
        layers = {group: int(found[0]) for group in self.options if (found := re.findall(r"(?<=\.)\d+(?=\.)", group))}
        inner = [group for group, at in layers.items() if at not in (min(layers.values()), max(layers.values()))]
        pairs = [(high, low) for high in self._common() for low in self._common() if high != low] if inner else []
        made = [self._filled(dict.fromkeys(self.options, high) | dict.fromkeys(inner, low)) for high, low in pairs]
        fitting = [each for each in made if each is not None and self.fits(each, budget)]
        rising = [
            each for each in fitting if self._bits(each, inner) < self._bits(each, set(self.options) - set(inner))
        ]
        return min(rising, key=self.loss, default=None)

    def _common(self) -> list[QuantScheme]:
        return sorted(set.intersection(*({o.scheme for o in options} for options in self.offered.values())))

    def _filled(self, wanted: Allocation) -> Allocation | None:
        """What is wanted, and the smallest option of groups that cannot take it; None where no group can."""
        taking = [group for group, scheme in wanted.items() if any(o.scheme == scheme for o in self.options[group])]
        smallest = {group: min(options, key=lambda o: (o.nbytes, o.loss)) for group, options in self.options.items()}
        filled = {g: scheme if g in taking else smallest[g].scheme for g, scheme in wanted.items()}
        return filled if taking else None

    def _bits(self, allocation: Allocation, groups: Iterable[str]) -> float:
        """Bytes in relation to those of the largest options."""
        groups = list(groups)
        largest = sum(max(option.nbytes for option in self.options[group]) for group in groups)
        return sum(self._option(group, allocation[group]).nbytes for group in groups) / max(1, largest)


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


def limited(problem: Problem, seconds: Callable[[UnitEntry, str], float], limit: Latency) -> Problem:
    """The problem with a limit on its latency too: `seconds(unit, format)` of one decoded token in a unit."""
    units = {unit.name: unit for unit in problem.profile.units}

    def timed(group: str, option: Option) -> Option:
        return replace(option, seconds=sum(seconds(units[n], option.scheme.format) for n in problem.members[group]))

    options = {group: [timed(group, option) for option in each] for group, each in problem.options.items()}
    return replace(problem, options=options, latency=limit)


def _refuse_too_slow(problem: Problem, budget: int) -> None:
    """Raises BudgetInfeasible where no allocation of at most `budget` bytes keeps to the latency: the sentence names
    the fewest milliseconds there are, at how many bytes, and what to change."""
    if problem.latency is None:
        return
    most = problem.latency
    unquantized = problem.profile.unquantized_bytes
    found = latency.fastest(problem.options, budget - unquantized)
    if found.loss <= most.of_units:
        return
    anywhere = latency.fastest(problem.options, knapsack.ceiling(problem.options))
    slower = most.limit / most.aim

    def told(seconds: float) -> float:
        return 1e3 * slower * (seconds + most.rest)

    nbytes = found.nbytes + unquantized
    names = sorted({option.scheme.format for options in problem.options.values() for option in options})
    ways = [f"raise it to at least --max-latency {rounded_up(told(found.loss)):g}ms"]
    if anywhere.loss <= most.of_units:
        larger = anywhere.nbytes + unquantized
        ways += [f"raise the budget (--budget {larger}B can reach {told(anywhere.loss):.4g} ms)"]
    ways += ["add a faster format to --formats"]
    ways += ["drop an override"] if problem.overrides else []
    raise BudgetInfeasible(
        f"{most.requested}: the least that the formats {', '.join(names)} reach within {budget:,} bytes is"
        f" {told(found.loss):.4g} ms per token, at {nbytes:,} bytes ({format_bytes(nbytes)}), of which"
        f" {1e3 * slower * most.rest:.4g} ms are outside of the units"
        f"{f' (by the speed table, times {slower:.3g}, as finished plans were measured)' if slower > 1 else ''}:"
        f" {', or '.join(ways)}"
    )


def rounded_up(number: float) -> float:
    """Three digits."""
    step = 10 ** (floor(log10(number)) - 2)
    return round(ceil(number / step) * step, 9)


def refuse_infeasible(problem: Problem, budget: int, requested: str) -> None:
    """Raises BudgetInfeasible where no allocation has at most `budget` bytes, or none of those keeps to the latency:
    the sentence names the budget as it was `requested`, the least bytes there are, and what to change."""
    unquantized = problem.profile.unquantized_bytes
    least = knapsack.floor(problem.options) + unquantized
    if budget >= least:
        _refuse_too_slow(problem, budget)
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
