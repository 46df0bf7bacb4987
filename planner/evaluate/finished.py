"""Plans as they ship: rounded by their own rounding, loaded in packed form, evaluated and measured.

May import: formats, sensitivity, search, planner.assemble/load/plan, planner.quantize, the modules beside it.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitplan.formats.errors import BitplanError
from bitplan.planner.assemble import Finish, allocated_plan
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.evaluate.speed import decode_seconds, prompt_length
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Budget, Plan, Workload
from bitplan.planner.quantize.distillation import round_missing
from bitplan.search.corrections import Allocation
from bitplan.search.knapsack import Solution
from bitplan.search.problem import Problem
from bitplan.sensitivity.loss import Evaluation
from bitplan.sensitivity.session import Session


class FinishedPlans:
    """Makes the plans of allocations and evaluates them; what was evaluated on the search text is not evaluated again.

    `device` and `workload` are those that the plans are made for.
    """

    def __init__(
        self,
        problem: Problem,
        session: Session,
        finish: Finish,
        objective: Objective,
        device: str,
        workload: Workload,
    ):
        self.problem, self.session, self.finish = problem, session, finish
        self.objective, self.device, self.workload = objective, device, workload
        self._kl: dict[str, float] = {}
        """Of allocations, on the search text."""
        self._evaluations: dict[str, Evaluation] = {}

    def plan(self, allocation: Allocation, budget: Budget, solution: Solution, **parts: Any) -> Plan:
        return allocated_plan(self.problem, allocation, budget, solution, self.finish, workload=self.workload, **parts)

    def losses(self, allocation: Allocation, plan: Plan) -> Tensor:
        """The search's objective, block by block of the search text: float64 [blocks]; one block with a task."""
        losses = torch.tensor(list(self.objective.blocks(self._loaded(plan))), dtype=torch.float64)
        if self.objective.task is None:
            self._kl[_key(allocation)] = float(losses.mean())
        return losses

    def evaluation(self, allocation: Allocation, plan: Plan) -> Evaluation:
        """On the search text."""
        key = _key(allocation)
        if key not in self._evaluations:
            self._evaluations[key] = self.objective.evaluate(self._loaded(plan))
            self._kl[key] = self._evaluations[key].kl
        return self._evaluations[key]

    def measured(self, allocation: Allocation, plan: Plan, expected: float) -> Plan:
        """The plan with its figures on held-out text. `expected` is the KL on the search text of the same weights in
        the full-precision model. Raises BitplanError where the loaded model computes something else."""
        model = self._loaded(plan)
        if self.finish.rounding not in ("nearest", "awq"):  # a lesser rounding may lose more than the candidate
            found = self._kl.get(_key(allocation))
            _refuse_other_function(model, self.objective.kl(model) if found is None else found, expected)
        return plan.model_copy(update={"measured": self.objective.heldout(model, self.workload.kv_format)})

    def decode_seconds(self, plan: Plan) -> float:
        """Of one decoded token in the loaded model."""
        return decode_seconds(self._loaded(plan), prompt_length(self.session.source), self.workload.kv_format)

    def _loaded(self, plan: Plan) -> PreTrainedModel:
        round_missing(plan, self.session)
        return load_planned(plan, self.session.source, self.device)


def _key(allocation: Allocation) -> str:
    return repr(sorted(allocation.items()))


def _refuse_other_function(model: PreTrainedModel, found: float, expected: float) -> None:
    """Raises BitplanError where the loaded model computes something else than its weights make."""
    if math.isfinite(found) and not found < 1.5 * expected + 0.02:
        raise BitplanError(
            f"the loaded model is {found:.4f} nats from full precision, its weights alone make {expected:.4f}:"
            f" {type(model).__name__} uses weights in a way that packed ones do not support; exclude some with --keep"
        )
