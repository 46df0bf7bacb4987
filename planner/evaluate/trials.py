"""The trials of a search: allocations rounded in sequence, as plans are, and evaluated block by block of text.

May import: formats, sensitivity, search, planner.assemble, planner.evaluate.objective, planner.plan,
planner.quantize.candidates.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitplan.formats.errors import UsageError
from bitplan.formats.scheme import QuantScheme
from bitplan.planner.assemble import Finish, allocated_plan
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.plan import Budget, Plan
from bitplan.planner.quantize.candidates import TOKENS, Candidates, Rounded
from bitplan.search.corrections import Allocation
from bitplan.search.problem import Problem
from bitplan.search.study import Found, search
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import locked, sha256

EVALUATED_UNIFORM = 3
"""Uniform plans, of least predicted loss, that are evaluated on the search text."""


@dataclass(frozen=True)
class Effort:
    """`trials` plans are evaluated on the search text; the best `finalists` of them are finished as plans are, with
    more than one also the knapsack's own and the best with high first and last layers. `seconds` ends the trials
    earlier."""

    trials: int = 30
    finalists: int = 3
    seconds: float | None = None

    @classmethod
    def of(cls, trials: int) -> "Effort":
        """One finalist for ten trials, at least one and at most six."""
        return cls(trials, min(max(1, trials // 10), 6))


@dataclass(frozen=True)
class StudyPlace:
    """Where the study lies that several processes work on, and its name; by default that of model and budget."""

    storage: str
    study: str | None = None

    def name(self, model: str, budget: str) -> str:
        return self.study or f"{Path(model).name}, {budget}"


EFFORTS = {"quick": Effort(10, 1), "standard": Effort(), "thorough": Effort(100, 6)}


class Trials:
    """The trials of one search: evaluates allocations, counts the work that is shared or dropped, and keeps to the
    time."""

    def __init__(
        self,
        problem: Problem,
        budget: Budget,
        session: Session,
        objective: Objective,
        finish: Finish,
        effort: Effort,
        candidates: Candidates | None = None,
        place: StudyPlace | None = None,
    ):
        self.problem, self.budget, self.session = problem, budget, session
        self.objective, self.effort, self.place = objective, effort, place
        self.candidates = candidates or Candidates(session)
        self._before = self.candidates.segments, self.candidates.shared, self.candidates.saved
        """Of the searches before, with which this one may share its candidates."""
        self.available = budget.weights - problem.profile.unquantized_bytes
        self.exact = problem.solved(budget.weights)
        self._finish = Finish("nearest" if finish.rounding == "nearest" else None)
        self.began = time.monotonic()
        self.rounding = self.running = self.longest = 0.0
        """Seconds spent on codes and on text, and of the longest trial."""
        self.blocks = self.evaluated = 0
        self._said = False

    def run(self) -> Found:
        """The study, resumed where it was cut short."""
        tokens = str(min(TOKENS, self.session.texts.calibration.ids.numel()))
        key = sha256(
            repr(self.problem.options),
            str(self.available),
            self.objective.fingerprint,
            tokens,
            "in sequence, with facts",
            *([repr(self._seconds())] if self.problem.latency else []),
        )[:24]
        options = {"trials": self.effort.trials, "enough": self._enough, "facts": self._facts(tokens)}
        options |= {"seconds": self.problem.unit_seconds}
        asked = (self.problem.options, self.available, self.losses)
        if self.place is not None:
            name = self.place.name(self.session.source.model, self.budget.requested)
            found, _ = search(*asked, journal=self.place.storage, name=name, shared=True, **options)  # type: ignore[arg-type]
        else:
            studies = self.session.weight_cache.folder / "studies"
            # The lock is not the journal's: Optuna waits 30 seconds for a file named like that.
            with locked(studies / key):
                found, _ = search(*asked, journal=studies / f"{key}.log", name=key, **options)  # type: ignore[arg-type]
        if self.evaluated:
            print(self._skipped(), file=sys.stderr)
        return found

    def _seconds(self) -> tuple[float, list[float]]:
        """What makes another study of a latency that is limited."""
        return self.problem.unit_seconds, [o.seconds for each in self.problem.options.values() for o in each]

    def _facts(self, tokens: str) -> dict[str, str]:
        """What a study is for: workers that differ in one of them are refused."""
        model = self.session.provenance.model
        return {
            "model": f"{Path(model.id).name} ({(model.weights_sha256 or '')[:12]})",
            "budget": f"{self.budget.weights:,} bytes",
            "profile": sha256(repr(self.problem.options))[:12],
            "text": f"{self.objective.fingerprint[:12]}, {tokens} calibration tokens",
        }

    def losses(self, allocation: Allocation) -> Iterator[float]:
        """The objective of an allocation, rounded in sequence, block by block of the search text."""
        began = time.monotonic()
        plan = self._plan(allocation)
        segments = self.candidates.round(plan)
        self.evaluated += 1
        rounded = time.monotonic()
        self.rounding += rounded - began
        try:
            for loss in self._blocks(plan, segments):
                self.blocks += 1
                yield loss
        finally:
            self.running += time.monotonic() - rounded
            self.longest = max(self.longest, time.monotonic() - began)

    def _blocks(self, plan: Plan, segments: list[Rounded]) -> Iterator[float]:
        if self.objective.task is None:
            yield from self.objective.kl_blocks(self.candidates.log_probabilities(plan, segments))
            return
        with self.candidates.exchanged(plan, segments) as model:
            yield from self.objective.blocks(model)

    def _plan(self, allocation: Allocation) -> Plan:
        return allocated_plan(self.problem, allocation, self.budget, self.exact, self._finish)

    def kl(self, allocation: Allocation, found: Found | None = None) -> float:
        """Of an allocation, rounded in sequence, on the search text; not run again where a trial's loss is that."""
        if found is not None and self.objective.task is None:
            for each in found.ranked:
                if each.allocation == allocation:
                    return each.loss
        plan = self._plan(allocation)
        of_block = self.candidates.log_probabilities(plan, self.candidates.round(plan))
        losses = list(self.objective.kl_blocks(of_block))
        return sum(losses) / len(losses)

    def best_uniform(self) -> tuple[QuantScheme, Allocation] | None:
        """The uniform allocation within the budget that loses least on the search text, with its scheme."""
        fitting = self.problem.uniform(self.budget.weights)[:EVALUATED_UNIFORM]
        losses = [[0.0]]
        if len(fitting) > 1:
            losses = [list(self.losses(each)) for _, each in progress(fitting, desc="uniform plans", unit="plan")]
        means = [sum(each) / len(each) for each in losses]
        ranked = [(mean, pair) for mean, pair in zip(means, fitting, strict=False) if math.isfinite(mean)]
        return min(ranked, key=lambda each: each[0])[1] if ranked else None

    def finalists(self, found: Found) -> dict[str, Allocation]:
        """Different allocations by name."""
        count = self.effort.finalists
        if self.effort.seconds is not None and self.longest:
            count = max(1, min(count, int(self._left() / self._finishing()) - 2))
        named = {f"trial {each.trial}": each.allocation for each in found.ranked[:count]}
        if count > 1:
            named |= {"knapsack": self.exact.allocation}
            ends = self.problem.ends_high(self.budget.weights)
            named |= {"first and last high": ends} if ends else {}
        different: dict[str, Allocation] = {}
        for name, allocation in named.items():
            if allocation not in different.values():
                different[name] = allocation
        return different

    # Time -----------------------------------------------------------------------------------------------------------

    def _left(self) -> float:
        assert self.effort.seconds is not None
        return self.effort.seconds - (time.monotonic() - self.began)

    def _finishing(self) -> float:
        """Seconds to finish a plan, at most: as if all of a trial's time grew with the tokens."""
        return self.longest * max(1.0, self.session.texts.calibration.ids.numel() / TOKENS)

    def _enough(self, done: int) -> bool:
        """Whether the time is up. Says after the first trial of this run what the others will take."""
        first, self._said = not self._said and self.longest > 0, self._said or self.longest > 0
        left = self.effort.trials - done
        if first and left > 0:
            print(
                f"a trial takes {self.longest:.1f} s or less: {left} more at most {self.longest * left:.0f} s",
                file=sys.stderr,
            )
        if self.effort.seconds is None or not self.longest:
            return False
        needed = 2 * self._finishing()
        if first and self._left() < needed:
            spent = time.monotonic() - self.began
            raise UsageError(
                f"--time {self.effort.seconds:.0f}s is too short: one trial took {self.longest:.1f} s, and to finish"
                f" the best plan and the best uniform one takes up to {needed:.0f} s; give at least"
                f" --time {spent + needed:.0f}s, or --trials 0"
            )
        return self._left() < needed + self.longest

    def _skipped(self) -> str:
        """The share of the work that was not done, in the seconds that it would have taken."""
        segments = self.candidates.segments - self._before[0]
        shared = self.candidates.shared - self._before[1]
        blocks = self.evaluated * self.objective.count
        saved = self.candidates.saved - self._before[2]
        saved += (blocks - self.blocks) * self.running / max(1, self.blocks)
        skipped = saved / (saved + self.rounding + self.running)
        return (
            f"{self.evaluated} plans were rounded and evaluated: {shared} of {segments} segments were shared with"
            f" earlier ones, {blocks - self.blocks} of {blocks} blocks of text not run: {skipped:.0%} of the work"
        )
