"""Profile and budget → plan, never worse than uniform. May import: formats, sensitivity, search, planner."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from formats.errors import BitplanError, BudgetInfeasible
from formats.rounding import refuse_misfit, rounding_for
from formats.table import FORMATS
from planner.budget import human
from planner.heal import round_missing
from planner.materialize import materialize
from planner.plan import DTYPES, NATIVE_KV, Budget, KVCache, Measured, Plan, PlannedUnit, Predicted, Search, Uniform
from planner.session import Session
from search import knapsack
from search.knapsack import Option, Problem, Solution
from search.study import Allocation, search
from sensitivity.bank import Choice
from sensitivity.loss import Judgement, Reference
from sensitivity.profile import Profile, Row
from sensitivity.store import sha256

JUDGED_UNIFORM = 3
"""Uniform plans, of least predicted loss, that are judged on the search text."""


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


def refuse_infeasible(menu: Menu, budget: Budget) -> None:
    """Raises BudgetInfeasible, which says what was asked, what is the least, and what to change."""
    kept = menu.profile.kept_bytes
    least = knapsack.floor(menu.problem) + kept
    if budget.weights >= least:
        return
    parameters = menu.profile.provenance.model.parameters
    names = {option.choice.format for options in menu.problem.values() for option in options}
    in_large = {name: format.nbytes(4096, 4096) for name, format in FORMATS.items()}
    smaller = [name for name, size in in_large.items() if size < min(size for name in names)]
    ways = [f"raise the budget to at least --budget {least}B"]
    ways += [f"add a smaller format to --formats ({', '.join(smaller)})"] if smaller else []
    ways += ["drop --keep"] if any(entry.reason == "kept on request" for entry in menu.profile.kept) else []
    raise BudgetInfeasible(
        f"{budget.asked} is {budget.weights:,} bytes{' for weights' if budget.device else ''}, and the least that the"
        f" formats {', '.join(sorted(names))} allow is"
        f" {least:,} bytes ({human(least)}, {least * 8 / parameters:.3f} bits per weight), of which {kept:,} bytes are"
        f" {len(menu.profile.kept)} tensors kept as they are: {', or '.join(ways)}"
    )


@dataclass(frozen=True)
class Finish:
    """How a plan's codes are made: a rounding for the formats that it fits (None: each format's own), and healing."""

    rounding: str | None = None
    healed: bool = False

    def __call__(self, choice: Choice, dtype: str) -> str:
        """The rounding of a unit in a choice, which itself names the rounding that scored it."""
        native = choice.format == DTYPES[dtype]
        return "nearest" if native else rounding_for(FORMATS[choice.format], self.rounding)


def refinished(plan: Plan, rounding: str | None, healed: bool | None) -> Plan:
    """The plan with its codes made in another way, where that is asked for, and without the measurements of the old.

    Raises UsageError for a rounding that none of its formats has.
    """
    if (rounding is None and healed is None) or not plan.packed:
        return plan
    refuse_misfit(rounding, [FORMATS[unit.format] for unit in plan.packed])
    finish = Finish(rounding, plan.healed if healed is None else healed)
    units = tuple(
        unit
        if unit.is_native or rounding is None
        else unit.model_copy(update={"rounding": finish(Choice(unit.format, unit.rounding), unit.dtype)})
        for unit in plan.units
    )
    made = plan.model_copy(update={"units": units, "healed": finish.healed and bool(plan.packed)})
    same = made.units == plan.units and made.healed == plan.healed
    return plan if same else made.model_copy(update={"measured": None, "uniform": None})


def assemble(
    menu: Menu,
    allocation: Allocation,
    budget: Budget,
    solution: Solution,
    finish: Finish,
    shipped: Literal["search", "uniform"] = "search",
    **parts: Any,
) -> Plan:
    """A plan from an allocation."""
    units = []
    for entry in menu.profile.units:
        choice = allocation[entry.group]
        rounding, size = finish(choice, entry.dtype), menu.rows[entry.name, choice].bytes
        units.append(PlannedUnit(**dict(entry), format=choice.format, rounding=rounding, bytes=size))
    total = menu.nbytes(allocation)
    return Plan(
        budget=budget,
        bytes=total,
        bits_per_weight=total * 8 / menu.profile.provenance.model.parameters,
        shipped=shipped,
        units=tuple(units),
        kept=menu.profile.kept,
        healed=finish.healed and any(not unit.is_native for unit in units),
        predicted=Predicted(nll=menu.loss(allocation), bound=solution.bound, gap=solution.gap),
        provenance=menu.profile.provenance,
        **parts,
    )


def quick_plan(menu: Menu, budget: Budget, finish: Finish, kv_cache: KVCache = NATIVE_KV) -> Plan:
    """The knapsack's solution, unmeasured: seconds, and no model. Raises BudgetInfeasible."""
    refuse_infeasible(menu, budget)
    solution = knapsack.solve(menu.problem, budget.weights - menu.profile.kept_bytes)
    fitting = menu.uniform(budget.weights)
    uniform = _uniform(menu, *fitting[0], finish) if fitting else None
    return assemble(menu, solution.choices, budget, solution, finish, uniform=uniform, kv_cache=kv_cache)


def make_plan(
    menu: Menu,
    budget: Budget,
    session: Session,
    finish: Finish,
    *,
    trials: int,
    device: str = "auto",
    kv_cache: KVCache = NATIVE_KV,
) -> Plan:
    """Search, materialise the winner and the best uniform plan that fits, judge both on held-out text, keep the better.
    A KV cache of another format is judged too, alone and then with both.

    Candidates are judged with each unit's codes chosen alone; the two at the end have theirs made as `finish` says.
    Raises BudgetInfeasible before anything runs.
    """
    refuse_infeasible(menu, budget)
    session.gather()
    room = budget.weights - menu.profile.kept_bytes
    on_search = Reference(session.model, session.texts.search)

    def judge(allocation: Allocation) -> float:
        for group, choice in allocation.items():
            for name in menu.members[group]:
                unit = session.bench.units[name]
                session.bench.exchange(unit, session.bank.dequantized(unit, choice))
        kl = on_search.judge(session.model).kl
        for unit in session.bench.units.values():
            session.bench.restore(unit)
        return kl

    problem_key = sha256(repr(menu.problem), str(room), session.texts.search.fingerprint)[:24]
    journal = session.bank.folder / "studies" / f"{problem_key}.log"
    best, exact = search(menu.problem, room, judge, trials=trials, journal=journal, name=problem_key)
    candidates = [(judge(alike), choice, alike) for choice, alike in menu.uniform(budget.weights)[:JUDGED_UNIFORM]]
    on_heldout = Reference(session.model, session.texts.heldout)
    if kv_cache.format != "native":
        alone = on_heldout.judge(session.model, kv_cache.format)
        kv_cache = kv_cache.model_copy(update={"kl": alone.kl, "kl_se": alone.kl_se})

    def measure(plan: Plan, expected: float) -> Measured:
        """Judge the loaded model; on the way, that it computes what its weights say (`expected` KL on the search text,
        from codes that gptq chose for each unit alone: a lesser rounding may lose more)."""
        round_missing(plan, session)
        model = materialize(plan, session.source, device)
        loaded = on_search.judge(model).kl
        if finish.rounding not in ("nearest", "awq") and not loaded < 1.5 * expected + 0.02:
            raise BitplanError(
                f"the loaded model is {loaded:.4f} nats from full precision, its weights alone make {expected:.4f}:"
                f" {type(model).__name__} uses weights in a way that packed ones do not serve; keep some with --keep"
            )
        return measured(on_heldout.judge(model, kv_cache.format))

    facts = Search(trials=best.trials, best_trial=best.trial, kl=best.kl, first_kl=best.first_kl)
    plan = assemble(menu, best.allocation, budget, exact, finish, search=facts, kv_cache=kv_cache)
    plan = plan.model_copy(update={"measured": measure(plan, best.kl)})
    if not candidates:
        return plan
    kl, choice, alike = min(candidates, key=lambda candidate: candidate[0])
    uniform_plan = assemble(menu, alike, budget, exact, finish, shipped="uniform", search=facts, kv_cache=kv_cache)
    uniform = _uniform(menu, choice, alike, finish, measure(uniform_plan, kl))
    assert plan.measured is not None and uniform.measured is not None
    if uniform.measured.kl < plan.measured.kl:
        return uniform_plan.model_copy(update={"measured": uniform.measured, "uniform": uniform})
    return plan.model_copy(update={"uniform": uniform})


def _uniform(
    menu: Menu, choice: Choice, alike: Allocation, finish: Finish, measured: Measured | None = None
) -> Uniform:
    return Uniform(
        format=choice.format,
        rounding=finish(choice, menu.profile.units[0].dtype),
        bytes=menu.nbytes(alike),
        predicted_nll=menu.loss(alike),
        measured=measured,
    )


def measured(judgement: Judgement) -> Measured:
    return Measured(**{name: getattr(judgement, name) for name in Measured.model_fields})
