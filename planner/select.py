"""Search for a plan that is never worse than uniform, from a profile and a budget.

May import: formats, sensitivity, search, planner.assemble, planner.evaluate, planner.load, planner.plan,
planner.quantize.
"""

import math
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from bitplan.formats.errors import BitplanError
from bitplan.planner.assemble import Finish, allocated_plan, uniform_facts
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.evaluate.trials import EFFORTS, Effort, Trials
from bitplan.planner.load import load_planned
from bitplan.planner.plan import NATIVE_WORKLOAD, Budget, Finalist, KVCacheLoss, Plan, Search, Workload
from bitplan.planner.quantize.distillation import round_missing
from bitplan.search.corrections import Allocation
from bitplan.search.problem import Problem, refuse_infeasible
from bitplan.sensitivity.loss import finite, standard_error
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.tasks.task import Task


def make_plan(
    problem: Problem,
    budget: Budget,
    session: Session,
    finish: Finish,
    effort: Effort = EFFORTS["standard"],
    *,
    device: str = "auto",
    workload: Workload = NATIVE_WORKLOAD,
    task: Task | None = None,
) -> Plan:
    """Search, finish the best candidates and the best uniform plan that fits as `finish` specifies, choose among the
    candidates on the search text, and return the better of that one and the uniform one on held-out text: by KL, or by
    the task's loss if there is a task. A quantized KV cache is evaluated alone, and with both plans.

    Raises BudgetInfeasible and UsageError before anything runs.
    """
    refuse_infeasible(problem, budget.weights, budget.requested)
    objective = Objective(session, task)
    session.gather()
    trials = Trials(problem, budget, session, objective, finish, effort)
    found = trials.run()
    uniform = trials.best_uniform()
    cache_loss = None
    if workload.kv_format != "native":
        alone = objective.heldout(session.model, workload.kv_format)
        cache_loss = KVCacheLoss(kl=alone.kl, kl_se=alone.kl_se)

    def plan_of(allocation: Allocation, **parts: Any) -> Plan:
        return allocated_plan(problem, allocation, budget, trials.exact, finish, **parts)

    def loaded(plan: Plan) -> PreTrainedModel:
        round_missing(plan, session)
        return load_planned(plan, session.source, device)

    allocations = trials.finalists(found)
    lost: list[tuple[Finalist, Allocation]] = []
    for name, allocation in allocations.items():
        plan = plan_of(allocation)
        if len(allocations) == 1:
            mean, error = found.best.loss, None
        else:
            model = loaded(plan)
            losses = torch.tensor(list(objective.blocks(model)), dtype=torch.float64)
            mean, error = float(losses.mean()), finite(standard_error(losses))
            print(f"finished {name}: {mean:.5f} on the search text", file=sys.stderr)
        if math.isfinite(mean):
            lost.append((Finalist(name=name, bytes=plan.bytes, loss=mean, loss_se=error), allocation))
    if not lost:
        raise BitplanError("no finished plan has a finite loss: leave the weights that overflow unquantized by --keep")
    lost.sort(key=lambda each: each[0].loss)
    facts = Search(
        trials=found.trials,
        best_trial=found.best.trial,
        loss=found.best.loss,
        first_loss=found.first_loss if math.isfinite(found.first_loss) else None,
        task=objective.task,
        finalists=tuple(finalist for finalist, _ in lost) if len(lost) > 1 else (),
    )
    parts: dict[str, Any] = {"search": facts, "workload": workload, "kv_cache_loss": cache_loss}

    def measured(plan: Plan, allocation: Allocation) -> Plan:
        model = loaded(plan)
        if finish.rounding not in ("nearest", "awq"):  # a lesser rounding may lose more than the candidate
            _refuse_other_function(model, objective.kl(model), trials.kl(allocation))
        return plan.model_copy(update={"measured": objective.heldout(model, workload.kv_format)})

    plan = measured(plan_of(lost[0][1], **parts), lost[0][1])
    if uniform is None:
        return plan
    scheme, allocation = uniform
    other = measured(plan_of(allocation, shipped="uniform", **parts), allocation)
    beside = uniform_facts(problem, scheme, allocation, finish, other.measured)
    assert plan.measured is not None and other.measured is not None
    better = other if other.measured.loss < plan.measured.loss else plan
    return better.model_copy(update={"uniform": beside})


def _refuse_other_function(model: PreTrainedModel, found: float, expected: float) -> None:
    """Raises BitplanError where the loaded model computes something else than its weights make."""
    if math.isfinite(found) and not found < 1.5 * expected + 0.02:
        raise BitplanError(
            f"the loaded model is {found:.4f} nats from full precision, its weights alone make {expected:.4f}:"
            f" {type(model).__name__} uses weights in a way that packed ones do not support; exclude some with --keep"
        )
