"""Search for a plan that is never worse than uniform, from a profile and a budget, or within a loss.

May import: formats, sensitivity, search, planner.assemble, planner.evaluate, planner.plan, planner.quantize.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import optuna

from bitplan.formats.errors import BitplanError, BudgetInfeasible
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.sizes import format_bytes
from bitplan.planner.assemble import Finish, uniform_facts
from bitplan.planner.evaluate.finished import FinishedPlans
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.evaluate.trials import EFFORTS, Effort, StudyPlace, Trials
from bitplan.planner.plan import NATIVE_WORKLOAD, Budget, Finalist, KVCacheLoss, Measured, Plan, Search, Workload
from bitplan.planner.quantize.candidates import Candidates
from bitplan.search import knapsack
from bitplan.search.corrections import Allocation, Corrections
from bitplan.search.limit import Tried, narrow, smallest
from bitplan.search.problem import Problem, refuse_infeasible
from bitplan.search.study import Found
from bitplan.sensitivity.loss import Evaluation, finite, standard_error
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.tasks.task import Task

ROUNDS = 4
"""Times that the limit on the search text is lowered because the loss on held-out text is above the limit."""
SAFETY = 0.98
"""And by this factor more than the difference."""


@dataclass(frozen=True)
class LossLimit:
    """A loss that a plan may have: KL, or the increase of nats per token, whose exponential is the perplexity's."""

    requested: str
    metric: Literal["kl", "delta_nll"]
    nats: float

    def of(self, found: Evaluation | Measured) -> float:
        return found.kl if self.metric == "kl" else found.delta_nll


class Selection:
    """Searches with one session, whatever their budgets: the reference losses, and the work that candidates share."""

    def __init__(
        self,
        problem: Problem,
        session: Session,
        finish: Finish,
        effort: Effort = EFFORTS["standard"],
        *,
        device: str = "auto",
        workload: Workload = NATIVE_WORKLOAD,
        task: Task | None = None,
        place: StudyPlace | None = None,
    ):
        self.problem, self.session, self.finish, self.effort = problem, session, finish, effort
        self.workload, self.place = workload, place
        self.objective = Objective(session, task)
        session.gather()
        self.candidates = Candidates(session)
        self.finished = FinishedPlans(problem, session, finish, self.objective, device, workload)
        self.study: optuna.Study | None = None
        """Of the last search."""

    def made(self, goal: Budget | LossLimit) -> Plan:
        return self.within(goal) if isinstance(goal, Budget) else self.within_loss(goal)

    def within(self, budget: Budget) -> Plan:
        """The plan of least loss within a budget and, where one is set, within the latency as it is measured on the
        plan as loaded: where that is above the limit, the search starts again with less.

        Raises BudgetInfeasible and UsageError before anything runs; BitplanError where the measured latency stays above
        the limit.
        """
        limit = self.problem.latency
        if limit is None:
            return self._within(self.problem, budget)
        for _ in range(ROUNDS):
            plan = self._within(replace(self.problem, latency=limit), budget)
            assert plan.latency is not None
            seconds = self.finished.decode_seconds(plan)
            told = f"{1e3 * seconds:.3f} ms per token as loaded, {1e3 * plan.latency.predicted:.3f} ms predicted"
            above = "above" if seconds > limit.limit else "within"
            print(f"{plan.bytes:,} bytes: {told}, {above} {limit.requested}", file=sys.stderr)
            if seconds <= limit.limit:
                measured = plan.latency.model_copy(update={"measured": seconds})
                return plan.model_copy(update={"latency": measured})
            limit = replace(limit, aim=limit.aim * SAFETY * limit.limit / seconds)
        raise BitplanError(
            f"{limit.requested}: the plan takes {1e3 * seconds:.3f} ms per token as loaded, and after {ROUNDS} tries"
            " that is still above the limit: run `bitplan speed` again while nothing else runs, or give a higher limit"
        )

    def _within(self, problem: Problem, budget: Budget) -> Plan:
        """The plan of least loss within a budget and a problem's latency. The best candidates and the best uniform plan
        are finished; the search text chooses among the candidates, and held-out text between that one and the uniform
        one.

        Raises BudgetInfeasible and UsageError before anything runs.
        """
        refuse_infeasible(problem, budget.weights, budget.requested)
        trials = self._trials(problem, budget)
        found = trials.run()
        self.study = found.study
        uniform = trials.best_uniform()
        lost = self._race(trials, found)
        finalists = tuple(finalist for finalist, _ in lost) if len(lost) > 1 else ()
        chosen = lost[0][1]
        plan = self.finished.plan(
            chosen, budget, trials.exact, search=self._facts(found, finalists), kv_cache_loss=self.cache_loss
        )
        return self._beside_uniform(self.finished.measured(chosen, plan, trials.kl(chosen, found)), trials, uniform)

    def within_loss(self, limit: LossLimit) -> Plan:
        """The plan of fewest bytes whose loss is at most the limit's, finished, on the search text and on held-out
        text. With trials, the knapsack's losses are corrected by a study at the size that it reaches without.

        Raises BudgetInfeasible for a limit that no allocation of the formats can have.
        """
        options, unquantized = self.problem.options, self.problem.profile.unquantized_bytes
        found: Found | None = None
        aim, tried = limit.nats, list[Tried]()
        for _ in range(ROUNDS):
            tried = narrow(options, aim, lambda allocation: self._lost(allocation, limit), tried)
            best = smallest(tried, aim)
            if best is None:
                raise self._unreachable(limit, aim, tried)
            if found is None and self.effort.trials:
                trials = self._trials(self.problem, self._budget(limit, best.nbytes + unquantized))
                found = trials.run()
                self.study = found.study
                corrected = Corrections(options).fitted(found.evaluated)
            if found is not None:
                tried = narrow(corrected, aim, lambda allocation: self._lost(allocation, limit), tried)
                best = smallest(tried, aim)
                assert best is not None
            trials = self._trials(self.problem, self._budget(limit, best.nbytes + unquantized))
            plan = self.finished.plan(
                best.allocation,
                trials.budget,
                trials.exact,
                search=found and self._facts(found, ()),
                kv_cache_loss=self.cache_loss,
            )
            plan = self.finished.measured(best.allocation, plan, trials.kl(best.allocation, found))
            assert plan.measured is not None
            loss = limit.of(plan.measured)
            print(f"{plan.bytes:,} bytes: {loss:.5f} on held-out text, {limit.nats:g} is the limit", file=sys.stderr)
            if loss <= limit.nats:
                return self._beside_uniform(plan, trials, trials.best_uniform(), limit)
            aim *= SAFETY * limit.nats / loss
        raise BitplanError(
            f"{limit.requested}: on held-out text the plan loses {loss:.5f} nats per token, and after {ROUNDS} tries"
            " that is still above the limit: give more --text, or a higher limit"
        )

    @cached_property
    def cache_loss(self) -> KVCacheLoss | None:
        """Of a quantized KV cache alone."""
        if self.workload.kv_format == "native":
            return None
        alone = self.objective.heldout(self.session.model, self.workload.kv_format)
        return KVCacheLoss(kl=alone.kl, kl_se=alone.kl_se)

    # Steps ----------------------------------------------------------------------------------------------------------

    def _trials(self, problem: Problem, budget: Budget) -> Trials:
        return Trials(
            problem,
            budget,
            self.session,
            self.objective,
            self.finish,
            self.effort,
            candidates=self.candidates,
            place=self.place,
        )

    def _race(self, trials: Trials, found: Found) -> list[tuple[Finalist, Allocation]]:
        """The finalists by rising loss on the search text. A single one is not run."""
        allocations = trials.finalists(found)
        lost: list[tuple[Finalist, Allocation]] = []
        for name, allocation in allocations.items():
            plan = self.finished.plan(allocation, trials.budget, trials.exact)
            if len(allocations) == 1:
                mean, error = found.best.loss, None
            else:
                losses = self.finished.losses(allocation, plan)
                mean, error = float(losses.mean()), finite(standard_error(losses))
                print(f"finished {name}: {mean:.5f} on the search text", file=sys.stderr)
            if math.isfinite(mean):
                lost.append((Finalist(name=name, bytes=plan.bytes, loss=mean, loss_se=error), allocation))
        if not lost:
            raise BitplanError(
                "no finished plan has a finite loss: leave the weights that overflow unquantized by --keep"
            )
        return sorted(lost, key=lambda each: each[0].loss)

    def _facts(self, found: Found, finalists: tuple[Finalist, ...]) -> Search:
        return Search(
            trials=found.trials,
            best_trial=found.best.trial,
            loss=found.best.loss,
            first_loss=found.first_loss if math.isfinite(found.first_loss) else None,
            task=self.objective.task,
            finalists=finalists,
        )

    def _beside_uniform(
        self,
        plan: Plan,
        trials: Trials,
        uniform: tuple[QuantScheme, Allocation] | None,
        limit: LossLimit | None = None,
    ) -> Plan:
        """The better of a measured plan and the best uniform one within its budget, with the figures of both."""
        if uniform is None:
            return plan
        scheme, allocation = uniform
        parts = {name: getattr(plan, name) for name in ("search", "kv_cache_loss")}
        other = self.finished.plan(allocation, plan.budget, trials.exact, shipped="uniform", **parts)
        other = self.finished.measured(allocation, other, trials.kl(allocation))
        beside = uniform_facts(self.problem, scheme, allocation, self.finish, other.measured)
        assert plan.measured is not None and other.measured is not None
        better = other.measured.loss < plan.measured.loss and (limit is None or limit.of(other.measured) <= limit.nats)
        return (other if better else plan).model_copy(update={"uniform": beside})

    def _budget(self, limit: LossLimit, nbytes: int) -> Budget:
        return Budget(requested=limit.requested, weights=nbytes)

    def _lost(self, allocation: Allocation, limit: LossLimit) -> float:
        """Of an allocation, finished, on the search text."""
        nbytes = self.problem.nbytes(allocation)
        exact = knapsack.solve(self.problem.options, nbytes - self.problem.profile.unquantized_bytes)
        plan = self.finished.plan(allocation, self._budget(limit, nbytes), exact)
        loss = limit.of(self.finished.evaluation(allocation, plan))
        print(f"finished {nbytes:,} bytes: {loss:.5f} on the search text", file=sys.stderr)
        return loss if math.isfinite(loss) else math.inf

    def _unreachable(self, limit: LossLimit, aim: float, tried: list[Tried]) -> BudgetInfeasible:
        least = min(tried, key=lambda each: each.loss)
        nbytes = self.problem.nbytes(least.allocation)
        names = {option.scheme.format for options in self.problem.options.values() for option in options}
        ways = ["raise the limit", "add a larger format to --formats"]
        ways += ["drop an override"] if self.problem.overrides else []
        return BudgetInfeasible(
            f"{limit.requested}: the least that the formats {', '.join(sorted(names))} reach is {least.loss:.5f} nats"
            f" per token, at {nbytes:,} bytes ({format_bytes(nbytes)}): {', or '.join(ways)}"
        )
