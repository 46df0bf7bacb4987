"""The search over whole plans: an Optuna study of corrections to predicted losses.

A trial's parameters are corrections (`search.corrections`); the knapsack is solved under them, so every
candidate fits the budget, and the candidate is evaluated as a whole, one block of text after the other. A candidate
that is worse than the best one on the same blocks (Wilcoxon's signed-rank test) is dropped, and its loss estimated from
the blocks that were run. The first trial has no corrections. Trials lie in a journal file: a study that was cut short
goes on, and ends as it would have. May import: formats.errors, search.corrections/knapsack/sampler,
sensitivity.progress.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from bitplan.formats.errors import BitplanError
from bitplan.search.corrections import Allocation, Corrections
from bitplan.search.knapsack import GAP, Options, Solution, solve
from bitplan.search.sampler import PosteriorSampler, distributions
from bitplan.sensitivity.progress import progress

WORSE = 0.05
"""p-value of the signed-rank test below which a candidate is dropped; five blocks, all worse, have 0.03."""

ROUGH = 1e-2
"""The knapsack's gap under corrections, which are uncertain by more than that."""


@dataclass(frozen=True)
class Candidate:
    allocation: Allocation
    loss: float
    """Mean over all blocks."""
    trial: int
    """Its place among the finished trials, from 0; the same whether the study was interrupted or not."""


@dataclass(frozen=True)
class Found:
    ranked: tuple[Candidate, ...]
    """Different allocations that were evaluated on all blocks, the least loss first."""
    first_loss: float
    """Of the first trial, the knapsack's own solution."""
    trials: int
    dropped: int
    """Trials that ended before their last block."""
    evaluated: tuple[tuple[Allocation, float], ...] = ()
    """What each trial evaluated and its loss, in their order."""

    @property
    def best(self) -> Candidate:
        return self.ranked[0]


def search(
    problem: Options,
    budget: int,
    evaluate: Callable[[Allocation], Iterable[float]],
    *,
    trials: int,
    journal: Path,
    name: str,
    seed: int = 0,
    enough: Callable[[int], bool] = lambda done: False,
    sampler: Callable[[int], optuna.samplers.BaseSampler] | None = None,
) -> tuple[Found, Solution]:
    """Run a study up to `trials` trials in all, or until `enough(finished trials)`, at least one. Returns what was
    found, and the knapsack's solution without corrections.

    `evaluate(allocation)` gives the losses of blocks of text, whose mean is to be least: KL on the search text, or a
    task's nats as a single block. A loss that is not finite counts as infinitely bad. `sampler(finished trials)`
    replaces Thompson sampling. Raises BudgetInfeasible, and BitplanError where no trial has a finite loss.
    """
    exact = solve(problem, budget)
    corrections = Corrections(problem)
    ranges = distributions(corrections)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=WORSE)
    study = optuna.create_study(storage=JournalStorage(backend), study_name=name, pruner=pruner, load_if_exists=True)
    options = {group: [option.scheme for option in options] for group, options in problem.items()}
    solved: dict[tuple[float, ...], Allocation] = {}

    def allocation_of(theta: dict[str, float]) -> Allocation:
        key = tuple(theta.get(name, 0.0) for name in corrections.names)
        if key not in solved:
            gap = ROUGH if any(key) else GAP
            solved[key] = solve(corrections.corrected(theta), budget, gap).allocation
        return solved[key]

    def finished() -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def allocation_in(trial: FrozenTrial) -> Allocation:
        return {g: options[g][i] for g, i in zip(problem, trial.user_attrs["indices"], strict=True)}

    def evaluated() -> list[tuple[Allocation, float]]:
        return [(allocation_in(trial), _loss(trial)) for trial in finished()]

    def objective(trial: optuna.Trial) -> float:
        theta = {name: trial.suggest_float(name, each.low, each.high) for name, each in ranges.items()}
        single = study.sampler.single if isinstance(study.sampler, PosteriorSampler) else {}
        allocation = allocation_of(theta | single)
        trial.set_user_attr("indices", [options[group].index(scheme) for group, scheme in allocation.items()])
        for other in finished():
            if allocation_in(other) == allocation:
                return _repeat(trial, other)
        best = next((t for t in sorted(finished(), key=_loss) if t.state == TrialState.COMPLETE), None)
        losses: list[float] = []
        for step, loss in enumerate(evaluate(allocation)):
            if not math.isfinite(loss):
                return math.inf  # Optuna fails a trial that returns NaN, and failed trials are not counted
            losses.append(loss)
            trial.report(loss, step)
            if best is not None and math.isfinite(_loss(best)) and trial.should_prune():
                beside = sum(best.intermediate_values[i] for i in range(len(losses)))
                trial.set_user_attr("loss", _loss(best) * sum(losses) / beside if beside > 0 else sum(losses))
                raise optuna.TrialPruned
        return sum(losses) / len(losses)

    bar = progress(total=trials, initial=len(finished()), desc="trials", unit="plan")
    while (done := len(finished())) < trials and not (done and enough(done)):
        # Seeded by place and from finished trials only, so that a resumed study draws what an uninterrupted one would
        # have drawn, whatever trial a kill left running.
        study.sampler = (
            sampler(done) if sampler else PosteriorSampler(corrections, evaluated, allocation_of, (seed, done))
        )
        study.optimize(objective, n_trials=1)
        bar.update()
        bar.set_postfix(loss=f"{min(map(_loss, finished())):.5f}", refresh=False)
    bar.close()
    return _found(finished(), allocation_in), exact


def _loss(trial: FrozenTrial) -> float:
    """Of a finished trial; of a dropped one, as estimated from the blocks that were run."""
    if trial.state == TrialState.PRUNED:
        return float(trial.user_attrs["loss"])
    assert trial.value is not None
    return trial.value


def _repeat(trial: optuna.Trial, other: FrozenTrial) -> float:
    """End a trial as another ended that had the same allocation."""
    if other.state == TrialState.PRUNED:
        trial.set_user_attr("loss", _loss(other))
        raise optuna.TrialPruned
    for step, loss in other.intermediate_values.items():
        trial.report(loss, step)
    return _loss(other)


def _found(trials: list[FrozenTrial], allocation_in: Callable[[FrozenTrial], Allocation]) -> Found:
    ranked: list[Candidate] = []
    for place, trial in sorted(enumerate(trials), key=lambda each: _loss(each[1])):
        allocation = allocation_in(trial)
        whole = trial.state == TrialState.COMPLETE and math.isfinite(_loss(trial))
        if whole and all(allocation != each.allocation for each in ranked):
            ranked.append(Candidate(allocation, _loss(trial), place))
    if not ranked:
        raise BitplanError(
            f"none of the {len(trials)} plans that were tried has a finite loss: give other --formats, or leave the"
            " weights that overflow unquantized by --keep"
        )
    dropped = sum(trial.state == TrialState.PRUNED for trial in trials)
    evaluated = tuple((allocation_in(trial), _loss(trial)) for trial in trials)
    return Found(tuple(ranked), _loss(trials[0]), len(trials), dropped, evaluated)
