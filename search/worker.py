"""The trials of a study that one process runs, and what they leave in the study.

May import: search.corrections/knapsack/latency/sampler/storage.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable

import optuna
from optuna.trial import FrozenTrial, TrialState

from bitplan.search.corrections import Allocation, Corrections
from bitplan.search.knapsack import GAP, Options, Solution
from bitplan.search.latency import solve
from bitplan.search.sampler import PosteriorSampler, distributions
from bitplan.search.storage import Storage

ROUGH = 1e-2
"""The knapsack's gap under corrections, which are uncertain by more than that."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
LIVE = (*ENDED, TrialState.RUNNING, TrialState.WAITING)


class Surplus(Exception):
    """Other workers have begun all trials."""


class Worker:
    """One process' trials of a study."""

    def __init__(
        self,
        study: optuna.Study,
        storage: Storage,
        problem: Options,
        budget: int,
        exact: Solution,
        evaluate: Callable[[Allocation], Iterable[float]],
        count: int,
        seconds: float = math.inf,
    ):
        self.study, self.storage, self.problem, self.budget, self.exact = study, storage, problem, budget, exact
        self.seconds = seconds
        self.evaluate, self.count, self.corrections = evaluate, count, Corrections(problem)
        self.ranges = distributions(self.corrections)
        self._options = {group: [option.scheme for option in options] for group, options in problem.items()}
        self._nbytes = {group: {o.scheme: o.nbytes for o in options} for group, options in problem.items()}
        self._number = -1
        """Of the trial that was begun last."""
        self._solved: dict[tuple[float, ...], Allocation] = {}

    def trials(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def allocation_of(self, theta: dict[str, float]) -> Allocation:
        key = tuple(theta.get(name, 0.0) for name in self.corrections.names)
        if key not in self._solved:
            corrected = self.corrections.corrected(theta)
            self._solved[key] = solve(corrected, self.budget, ROUGH if any(key) else GAP, self.seconds).allocation
        return self._solved[key]

    def allocation_in(self, trial: FrozenTrial) -> Allocation:
        return {g: self._options[g][i] for g, i in zip(self.problem, trial.user_attrs["indices"], strict=True)}

    def sampler(self, seed: tuple[int, ...]) -> PosteriorSampler:
        def evaluated() -> list[tuple[Allocation, float]]:
            return [(self.allocation_in(trial), loss_of(trial)) for trial in self.trials(ENDED)]

        def elsewhere(number: int) -> tuple[bool, list[Allocation]]:
            """Whether the first trial is this one's to draw, and what others are evaluating."""
            others = [trial for trial in self.trials(LIVE) if trial.number != number]
            drawn = [self.allocation_in(trial) for trial in others if "indices" in trial.user_attrs]
            before = [trial for trial in others if trial.number < number and "indices" not in trial.user_attrs]
            return not before and self.exact.allocation not in drawn, drawn

        return PosteriorSampler(self.corrections, evaluated, self.allocation_of, seed, elsewhere)

    def objective(self, trial: optuna.Trial) -> float:
        if sum(other.number < trial.number for other in self.trials(LIVE)) >= self.count and not _again(trial):
            raise Surplus
        self._number = trial.number
        trial.set_user_attr("worker", self.storage.name)
        theta = {name: trial.suggest_float(name, each.low, each.high) for name, each in self.ranges.items()}
        if "indices" in trial.user_attrs:  # it is run again
            allocation = self.allocation_in(self.study._storage.get_trial(trial._trial_id))
        else:
            single = self.study.sampler.single if isinstance(self.study.sampler, PosteriorSampler) else {}
            allocation = self.allocation_of(theta | single)
            self._describe(trial, allocation)
        finished = self.trials(ENDED)
        for other in finished:
            if self.allocation_in(other) == allocation:
                return _repeat(trial, other)
        best = next((t for t in sorted(finished, key=loss_of) if t.state == TrialState.COMPLETE), None)
        losses: list[float] = []
        for step, loss in enumerate(self.evaluate(allocation)):
            if not math.isfinite(loss):
                return math.inf  # Optuna fails a trial that returns NaN, and failed trials are not counted
            losses.append(loss)
            trial.report(loss, step)
            if best is not None and math.isfinite(loss_of(best)) and trial.should_prune():
                beside = sum(best.intermediate_values[i] for i in range(len(losses)))
                trial.set_user_attr("loss", loss_of(best) * sum(losses) / beside if beside > 0 else sum(losses))
                raise optuna.TrialPruned
        return sum(losses) / len(losses)

    def was_taken_for_dead(self) -> bool:
        """Whether another worker ended this one's last trial and enqueued it again: what it did is then lost."""
        again = (trial.user_attrs.get("run again", "") for trial in self.trials(LIVE))
        return any(text.startswith(f"trial {self._number},") for text in again)

    def _describe(self, trial: optuna.Trial, allocation: Allocation) -> None:
        """What the trial is, for this program and for who reads the study in a dashboard."""
        formats = Counter(scheme.format for scheme in allocation.values()).most_common()
        trial.set_user_attr("plan", "knapsack" if allocation == self.exact.allocation else f"draw {trial.number}")
        trial.set_user_attr("formats", ", ".join(f"{name} ×{count}" for name, count in formats))
        trial.set_user_attr("bytes of groups", sum(self._nbytes[g][scheme] for g, scheme in allocation.items()))
        indices = [self._options[group].index(scheme) for group, scheme in allocation.items()]
        trial.set_user_attr("indices", indices)


def _again(trial: optuna.Trial) -> bool:
    return "run again" in trial.user_attrs


def loss_of(trial: FrozenTrial) -> float:
    """Of a finished trial; of a dropped one, as estimated from the blocks that were run."""
    if trial.state == TrialState.PRUNED:
        return float(trial.user_attrs["loss"])
    assert trial.value is not None
    return trial.value


def _repeat(trial: optuna.Trial, other: FrozenTrial) -> float:
    """End a trial as another ended that had the same allocation."""
    if other.state == TrialState.PRUNED:
        trial.set_user_attr("loss", loss_of(other))
        raise optuna.TrialPruned
    for step, loss in other.intermediate_values.items():
        trial.report(loss, step)
    return loss_of(other)
