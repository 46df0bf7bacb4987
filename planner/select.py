"""Profile and budget → plan, never worse than uniform. May import: formats, sensitivity, search, planner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from bitplan.formats.errors import BitplanError
from bitplan.formats.rounding import refuse_misfit, rounding_for
from bitplan.formats.table import FORMATS
from bitplan.planner.evaluate.objective import Judge
from bitplan.planner.load import materialize
from bitplan.planner.plan import (
    DTYPES,
    NATIVE_KV,
    Budget,
    KVCache,
    Measured,
    Plan,
    PlannedUnit,
    Predicted,
    Search,
    Uniform,
)
from bitplan.planner.quantize.distillation import round_missing
from bitplan.search import knapsack
from bitplan.search.knapsack import Solution
from bitplan.search.problem import Menu, refuse_infeasible
from bitplan.search.study import Allocation, search
from bitplan.sensitivity.bank import Choice
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import sha256
from bitplan.sensitivity.tasks.task import Task

JUDGED_UNIFORM = 3
"""Uniform plans, of least predicted loss, that are judged on the search text."""


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
        predicted=Predicted(nll=menu.loss(allocation), bound=solution.bound),
        provenance=menu.profile.provenance,
        **parts,
    )


def quick_plan(menu: Menu, budget: Budget, finish: Finish, kv_cache: KVCache = NATIVE_KV) -> Plan:
    """The knapsack's solution, unmeasured: seconds, and no model. Raises BudgetInfeasible."""
    refuse_infeasible(menu, budget.weights, budget.asked)
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
    task: Task | None = None,
) -> Plan:
    """Search, materialise the winner and the best uniform plan that fits, judge both held out, keep the better: by KL,
    or by the task's loss where there is a task. A KV cache of another format is judged too, alone and then with both.

    Candidates are judged with each unit's codes chosen alone; the two at the end have theirs made as `finish` says.
    Raises BudgetInfeasible and UsageError before anything runs.
    """
    refuse_infeasible(menu, budget.weights, budget.asked)
    judge = Judge(session, task)
    session.gather()
    room = budget.weights - menu.profile.kept_bytes

    def judged(allocation: Allocation, by: Callable[[PreTrainedModel], float] = judge.loss) -> float:
        for group, choice in allocation.items():
            for name in menu.members[group]:
                unit = session.bench.units[name]
                session.bench.exchange(unit, session.bank.dequantized(unit, choice))
        found = by(session.model)
        for unit in session.bench.units.values():
            session.bench.restore(unit)
        return found

    key = sha256(repr(menu.problem), str(room), judge.fingerprint)[:24]
    journal = session.bank.folder / "studies" / f"{key}.log"
    best, exact = search(menu.problem, room, judged, trials=trials, journal=journal, name=key)
    candidates = [(judged(alike), choice, alike) for choice, alike in menu.uniform(budget.weights)[:JUDGED_UNIFORM]]
    if kv_cache.format != "native":
        alone = judge.heldout(session.model, kv_cache.format)
        kv_cache = kv_cache.model_copy(update={"kl": alone.kl, "kl_se": alone.kl_se})

    def measure(plan: Plan, allocation: Allocation, loss: float) -> Measured:
        """Judge the loaded model; on the way, that it computes what its weights say (by KL on the search text, with
        codes that gptq chose for each unit alone: a lesser rounding may lose more)."""
        expected = judged(allocation, judge.kl) if task else loss
        round_missing(plan, session)
        model = materialize(plan, session.source, device)
        loaded = judge.kl(model)
        if finish.rounding not in ("nearest", "awq") and not loaded < 1.5 * expected + 0.02:
            raise BitplanError(
                f"the loaded model is {loaded:.4f} nats from full precision, its weights alone make {expected:.4f}:"
                f" {type(model).__name__} uses weights in a way that packed ones do not serve; keep some with --keep"
            )
        return judge.heldout(model, kv_cache.format)

    facts = Search(
        trials=best.trials, best_trial=best.trial, loss=best.loss, first_loss=best.first_loss, task=judge.task
    )
    plan = assemble(menu, best.allocation, budget, exact, finish, search=facts, kv_cache=kv_cache)
    plan = plan.model_copy(update={"measured": measure(plan, best.allocation, best.loss)})
    if not candidates:
        return plan
    loss, choice, alike = min(candidates, key=lambda candidate: candidate[0])
    uniform_plan = assemble(menu, alike, budget, exact, finish, shipped="uniform", search=facts, kv_cache=kv_cache)
    uniform = _uniform(menu, choice, alike, finish, measure(uniform_plan, alike, loss))
    assert plan.measured is not None and uniform.measured is not None
    if uniform.measured.loss < plan.measured.loss:
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
