"""Search for a plan that is never worse than uniform, from a profile and a budget.

May import: formats, sensitivity, search, planner.assemble, planner.evaluate, planner.load, planner.plan,
planner.quantize.
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from bitplan.formats.errors import BitplanError
from bitplan.planner.assemble import Finish, allocated_plan, uniform_facts
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.planner.plan import NATIVE_WORKLOAD, Budget, KVCacheLoss, Measured, Plan, Search, Workload
from bitplan.planner.quantize.distillation import round_missing
from bitplan.search.problem import Problem, refuse_infeasible
from bitplan.search.study import Allocation, search
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import locked, sha256
from bitplan.sensitivity.tasks.task import Task

EVALUATED_UNIFORM = 3
"""Uniform plans, of least predicted loss, that are evaluated on the search text."""


def make_plan(
    problem: Problem,
    budget: Budget,
    session: Session,
    finish: Finish,
    *,
    trials: int,
    device: str = "auto",
    workload: Workload = NATIVE_WORKLOAD,
    task: Task | None = None,
) -> Plan:
    """Search, load the best candidate and the best uniform plan that fits, evaluate both on held-out text, and return
    the better one: by KL, or by the task's loss if there is a task. A quantized KV cache is evaluated alone, and with
    both plans.

    Candidates are evaluated with each unit's codes chosen alone; the two final plans are rounded as `finish` specifies.
    Raises BudgetInfeasible and UsageError before anything runs.
    """
    refuse_infeasible(problem, budget.weights, budget.requested)
    objective = Objective(session, task)
    session.gather()
    available = budget.weights - problem.profile.unquantized_bytes

    def evaluated(allocation: Allocation, by: Callable[[PreTrainedModel], float] = objective.loss) -> float:
        units = session.swapper.units
        pairs = [(units[name], scheme) for group, scheme in allocation.items() for name in problem.members[group]]
        session.weight_cache.prepare(pairs)  # before any weight is exchanged
        for unit, scheme in pairs:
            session.swapper.exchange(unit, session.weight_cache.dequantized(unit, scheme))
        found = by(session.model)
        for unit in units.values():
            session.swapper.restore(unit)
        return found

    key = sha256(repr(problem.options), str(available), objective.fingerprint)[:24]
    studies = session.weight_cache.folder / "studies"
    journal = studies / f"{key}.log"
    with locked(studies / key):  # not the journal: Optuna waits 30 seconds for a file named like the journal's lock
        best, exact = search(problem.options, available, evaluated, trials=trials, journal=journal, name=key)
    uniform_allocations = problem.uniform(budget.weights)[:EVALUATED_UNIFORM]
    candidates = [(evaluated(allocation), scheme, allocation) for scheme, allocation in uniform_allocations]
    candidates = [candidate for candidate in candidates if math.isfinite(candidate[0])]
    cache_loss = None
    if workload.kv_format != "native":
        alone = objective.heldout(session.model, workload.kv_format)
        cache_loss = KVCacheLoss(kl=alone.kl, kl_se=alone.kl_se)

    def measure(plan: Plan, allocation: Allocation, loss: float) -> Measured:
        """Evaluate the loaded model, and check that it computes what its weights say (by KL on the search text, with
        codes that gptq chose for each unit alone: a lesser rounding may lose more)."""
        expected = evaluated(allocation, objective.kl) if task else loss
        round_missing(plan, session)
        model = load_planned(plan, session.source, device)
        loaded = objective.kl(model)
        if finish.rounding not in ("nearest", "awq") and math.isfinite(loaded) and not loaded < 1.5 * expected + 0.02:
            raise BitplanError(
                f"the loaded model is {loaded:.4f} nats from full precision, its weights alone make {expected:.4f}:"
                f" {type(model).__name__} uses weights in a way that packed ones do not support; exclude some with"
                f" --keep"
            )
        return objective.heldout(model, workload.kv_format)

    facts = Search(
        trials=best.trials,
        best_trial=best.trial,
        loss=best.loss,
        first_loss=best.first_loss if math.isfinite(best.first_loss) else None,
        task=objective.task,
    )
    parts: dict[str, Any] = {"search": facts, "workload": workload, "kv_cache_loss": cache_loss}
    plan = allocated_plan(problem, best.allocation, budget, exact, finish, **parts)
    plan = plan.model_copy(update={"measured": measure(plan, best.allocation, best.loss)})
    if not candidates:
        return plan
    loss, scheme, allocation = min(candidates, key=lambda candidate: candidate[0])
    uniform_plan = allocated_plan(problem, allocation, budget, exact, finish, shipped="uniform", **parts)
    uniform = uniform_facts(problem, scheme, allocation, finish, measure(uniform_plan, allocation, loss))
    assert plan.measured is not None and uniform.measured is not None
    if uniform.measured.loss < plan.measured.loss:
        return uniform_plan.model_copy(update={"measured": uniform.measured, "uniform": uniform})
    return plan.model_copy(update={"uniform": uniform})
