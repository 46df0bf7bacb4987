"""Why each unit has its format: the alternatives, what they would cost, the price of a byte, what pins it.

May import: formats, search, sensitivity.profile, planner.plan, planner.report.tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from bitplan.formats.errors import PlanMismatch
from bitplan.formats.sizes import MIB
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.planner.report.tables import table
from bitplan.search.frontier import price_at
from bitplan.search.knapsack import Option
from bitplan.search.overrides import Override
from bitplan.search.problem import Problem, problem_of
from bitplan.sensitivity.profile import Profile

CLOSEST = 12
"""Groups whose decision was the closest, which are printed unless all are wanted."""


@dataclass(frozen=True)
class Alternative:
    """Another format for a group, against the one that it has. Losses in nats per token by the profile."""

    scheme: str
    nbytes: int
    loss: float
    more_bytes: int
    more_loss: float
    better: bool
    """At the plan's price of a byte it would be the better choice."""
    allowed: bool
    """No override rules it out."""

    @property
    def per_mib(self) -> float:
        """What its bytes cost or bring: nats per token for each MiB between it and the plan's format."""
        return abs(self.more_loss / self.more_bytes) * MIB if self.more_bytes else inf

    @property
    def verdict(self) -> str:
        if not self.allowed:
            return "ruled out by an override"
        if self.more_bytes >= 0 and self.more_loss >= 0:
            return "no smaller and no better"
        if self.more_bytes <= 0 and self.more_loss <= 0:
            return "smaller, and better by the profile"
        if self.more_bytes > 0:
            return "worth its bytes by the profile" if self.better else "gains less than its bytes are worth"
        return "saves more than it loses by the profile" if self.better else "loses more than its bytes are worth"


@dataclass(frozen=True)
class GroupReasons:
    units: tuple[PlannedUnit, ...]
    """All units of the group."""
    nbytes: int
    loss: float | None
    alternatives: tuple[Alternative, ...]
    """By rising bytes."""
    pins: tuple[str, ...]
    """The overrides on any unit of the group, as they were typed."""

    @property
    def name(self) -> str:
        return self.units[0].name

    @property
    def scheme(self) -> str:
        return str(self.units[0].scheme)

    def closest(self, smaller: bool) -> Alternative | None:
        """The alternative whose exchange is the nearest to be worth it: of the smaller ones that which loses least for
        each byte, of the larger that which gains most."""
        found = [
            a
            for a in self.alternatives
            if a.allowed and (a.more_bytes < 0 < a.more_loss if smaller else a.more_loss < 0 < a.more_bytes)
        ]
        return (min if smaller else max)(found, key=lambda a: a.per_mib, default=None)


@dataclass(frozen=True)
class Reasons:
    plan: Plan
    problem: Problem | None
    """None without a profile: then there are no alternatives and no price."""
    price: float | None
    """Nats per token that one more byte would gain at the plan's budget."""
    groups: tuple[GroupReasons, ...]


def reasons(plan: Plan, profile: Profile | None) -> Reasons:
    """Raises PlanMismatch where the profile is of another model, or lacks a format of the plan."""
    problem = price = None
    if profile is not None:
        if profile.provenance.model.weights_sha256 != plan.provenance.model.weights_sha256:
            raise PlanMismatch(f"the profile was made for {profile.provenance.model.id}, the plan for other weights")
        known = {(row.unit, row.format) for row in profile.rows}
        for unit in plan.units:
            if (unit.name, unit.format) not in known:
                raise PlanMismatch(f"the profile has no row for {unit.name} in {unit.format}: audit with that format")
        overrides = [Override(each.option, each.glob, each.format) for each in plan.overrides]
        problem = problem_of(profile, None, overrides)
        price = price_at(problem.options, plan.budget.weights - profile.unquantized_bytes)
    members: dict[str, list[PlannedUnit]] = {}
    for unit in plan.units:
        members.setdefault(unit.group, []).append(unit)
    groups = (_of_group(plan, group, units, problem, price) for group, units in members.items())
    return Reasons(plan, problem, price, tuple(groups))


def _of_group(
    plan: Plan, group: str, units: Sequence[PlannedUnit], problem: Problem | None, price: float | None
) -> GroupReasons:
    names = {unit.name for unit in units}
    pins = tuple(str(each) for each in plan.overrides if names.intersection(each.units))
    nbytes = sum(unit.bytes for unit in units)
    if problem is None or price is None or group not in problem.options:
        return GroupReasons(tuple(units), nbytes, None, (), pins)
    offered, allowed = problem.offered[group], problem.options[group]
    own = min((option for option in offered if option.scheme.format == units[0].format), key=lambda o: o.loss)
    others = sorted((o for o in offered if o.scheme.format != own.scheme.format), key=lambda o: (o.nbytes, o.loss))
    alternatives = tuple(_against(own, option, price, option in allowed) for option in others)
    return GroupReasons(tuple(units), nbytes, own.loss, alternatives, pins)


def _against(own: Option, other: Option, price: float, allowed: bool) -> Alternative:
    more_bytes, more_loss = other.nbytes - own.nbytes, other.loss - own.loss
    better = more_loss + price * more_bytes < -1e-9 * (own.loss + price * own.nbytes)
    return Alternative(str(other.scheme), other.nbytes, other.loss, more_bytes, more_loss, better, allowed)


def why(reasons: Reasons, group: GroupReasons) -> str:
    """In a sentence, what settled a group's format."""
    plan = reasons.plan
    if group.pins:
        left = sum(each.allowed for each in group.alternatives)
        return f"pinned by {' and '.join(group.pins)}, which leaves {left or 'no'} other formats"
    if reasons.price is None:
        return "no profile: the alternatives are not known"
    better = [each.scheme for each in group.alternatives if each.better and each.allowed]
    if not better:
        return "of all formats the least loss at the plan's price of a byte"
    named = f"by the profile alone {', '.join(better)} would be better at the plan's price"
    named += ", which is of bytes alone, not of seconds" if plan.latency else ""
    if plan.shipped == "uniform":
        return f"{named}; the uniform plan measured better and ships"
    if plan.search:
        return f"{named}; the search evaluated whole plans and chose otherwise"
    limits = "bytes or the seconds" if plan.latency else "bytes"
    return f"{named}, but it does not fit the {limits} that are left, or is needed to use them up"


def price_text(price: float | None) -> str:
    if price is None:
        return "no profile was found, so alternatives and the price of a byte are not known: give --profile FILE"
    if price == 0:
        return "the budget holds the least loss that the profile has: a byte more gains nothing"
    return f"Price: at this budget one more MiB gains {price * MIB:.4g} nats per token (the Lagrange multiplier)"


def unit_text(reasons: Reasons, unit: str) -> str:
    """One unit, with all its alternatives."""
    group = next(group for group in reasons.groups if unit in {each.name for each in group.units})
    others = [each.name for each in group.units if each.name != unit]
    lines = [f"{unit}: {group.scheme}", why(reasons, group)]
    if others:
        lines.append(f"shares one format with {', '.join(others)}; bytes and losses are of all {len(group.units)}")
    lines.append(f"{group.nbytes:,} bytes" + ("" if group.loss is None else f", predicted loss {group.loss:.4g}"))
    rows = [
        (a.scheme, f"{a.nbytes:,}", f"{a.loss:.4g}", f"{a.more_bytes:+,}", f"{a.more_loss:+.4g}", _mib(a), a.verdict)
        for a in group.alternatives
    ]
    if rows:
        widest = max(len(row[-1]) for row in rows)
        head = (
            "instead",
            "bytes",
            "loss",
            "more bytes",
            "more loss",
            "nats per MiB",
            "at the plan's price".ljust(widest),
        )
        lines += ["", table(head, [(*row[:-1], row[-1].ljust(widest)) for row in rows])]
    return "\n".join(lines)


def explain_text(reasons: Reasons, every: bool = False) -> str:
    """The price, what is pinned, and the closest decisions; with `every`, all groups in the model's order."""
    plan, price = reasons.plan, reasons.price
    lines = [f"budget {plan.budget.requested} = {plan.budget.weights:,} bytes, plan {plan.bytes:,}", price_text(price)]
    if plan.latency:
        lines.append(f"the plan also keeps to {plan.latency.requested}: prices are of bytes alone")
    lines += [f"override {each}: {len(each.units)} unit{'s' * (len(each.units) != 1)}" for each in plan.overrides]
    groups = list(reasons.groups)
    if not every and price is not None:
        groups = sorted(groups, key=lambda group: closeness(group, price))[:CLOSEST]
        lines.append(
            f"the {len(groups)} closest decisions of {len(reasons.groups)}; --all for all, --unit NAME for one"
        )
    rows = [(*_names(g), g.scheme, f"{g.nbytes:,}", _loss(g), _next(g, True), _next(g, False), _pin(g)) for g in groups]
    head = (
        "unit",
        "",
        "format",
        "bytes",
        "loss",
        "smaller: nats lost per MiB",
        "larger: nats gained per MiB",
        "pinned by",
    )
    return "\n".join([*lines, "", table(head, rows, left=3)])


def closeness(group: GroupReasons, price: float) -> float:
    """How far the nearest exchange is from being worth it, as a factor."""
    found = [a.per_mib / MIB for smaller in (True, False) if (a := group.closest(smaller))]
    return min((max(each / price, price / each) for each in found if each > 0 and price > 0), default=inf)


def _names(group: GroupReasons) -> tuple[str, str]:
    return group.name, f"+{len(group.units) - 1}" if len(group.units) > 1 else ""


def _loss(group: GroupReasons) -> str:
    return "–" if group.loss is None else f"{group.loss:.4g}"


def _next(group: GroupReasons, smaller: bool) -> str:
    found = group.closest(smaller)
    return "–" if found is None else f"{found.scheme} {found.per_mib:.3g}"


def _pin(group: GroupReasons) -> str:
    return ", ".join(group.pins)


def _mib(alternative: Alternative) -> str:
    return "–" if alternative.per_mib == inf else f"{alternative.per_mib:.4g}"
