"""The search over whole plans: an Optuna study of corrections to predicted losses.

A trial's parameters are corrections (`search.corrections`); the knapsack is solved under them, so every
candidate fits the budget, and the candidate is evaluated as a whole, one block of text after the other. A candidate
that is worse than the best one on the same blocks (Wilcoxon's signed-rank test) is dropped, and its loss estimated from
the blocks that were run. The first trial has no corrections. Trials lie in a storage (`search.storage`): a study that
was cut short goes on, with one worker as it would have, and several workers share its trials.
May import: formats.errors, search.corrections/knapsack/latency/storage/worker, sensitivity.progress.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from bitplan.formats.errors import BitplanError, UsageError
from bitplan.search.corrections import Allocation
from bitplan.search.knapsack import Options, Solution
from bitplan.search.latency import solve
from bitplan.search.storage import Storage
from bitplan.search.worker import ENDED, Surplus, Worker, loss_of
from bitplan.sensitivity.progress import progress

WORSE = 0.05
"""p-value of the signed-rank test below which a candidate is dropped; five blocks, all worse, have 0.03."""
LOOK = 1.0
"""Seconds between two looks at trials that other workers are running."""
TAKEN = (optuna.exceptions.UpdateFinishedTrialError, ValueError, AssertionError)
"""What Optuna raises where another worker has ended the trial."""
FACTS = "bitplan"
"""The study's attribute that holds what it was made for."""


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
    """Of the knapsack's own solution, the first trial."""
    trials: int
    dropped: int
    """Trials that ended before their last block."""
    evaluated: tuple[tuple[Allocation, float], ...] = ()
    """What each trial evaluated and its loss, in their order."""
    study: optuna.Study | None = field(default=None, compare=False, repr=False)

    @property
    def best(self) -> Candidate:
        return self.ranked[0]


def search(
    problem: Options,
    budget: int,
    evaluate: Callable[[Allocation], Iterable[float]],
    *,
    trials: int,
    journal: Path | str,
    name: str,
    shared: bool = False,
    facts: Mapping[str, str] | None = None,
    seed: int = 0,
    seconds: float = math.inf,
    enough: Callable[[int], bool] = lambda done: False,
    sampler: Callable[[int], optuna.samplers.BaseSampler] | None = None,
) -> tuple[Found, Solution]:
    """Run a study up to `trials` trials in all, or until `enough(finished trials)`, at least one. Returns what was
    found, and the knapsack's solution without corrections.

    `evaluate(allocation)` gives the losses of blocks of text, whose mean is to be least: KL on the search text, or a
    task's nats as a single block. A loss that is not finite counts as infinitely bad. `journal` is a file, or the URL
    of a database; `shared`: other processes may work on the study, too. `facts` say what the study is for, by name.
    `sampler(finished trials)` replaces Thompson sampling. `seconds` limits the latency of the groups.

    Raises BudgetInfeasible; UsageError where the study has other facts; BitplanError where no trial has a finite loss,
    or the storage cannot be used.
    """
    exact = solve(problem, budget, seconds=seconds)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = Storage(journal, shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=WORSE)
        with storage.refusals():
            study = optuna.create_study(storage=storage.storage, study_name=name, pruner=pruner, load_if_exists=True)
            _refuse_other_study(study, storage, facts or {})
    work = Worker(study, storage, problem, budget, exact, evaluate, trials, seconds)
    bar = progress(total=trials, initial=len(work.trials(ENDED)), desc="trials", unit="plan")
    with storage.working(), storage.refusals(opening=False):
        while True:
            storage.end_stale(study)
            done = len(work.trials(ENDED))
            bar.update(done - bar.n)
            if done >= trials or (done and enough(done)):
                break
            if done + len(work.trials((TrialState.RUNNING,))) >= trials and not work.trials((TrialState.WAITING,)):
                time.sleep(LOOK)  # they are other workers'
                continue
            # Seeded by place and from finished trials only, so that a resumed study draws what an uninterrupted one
            # would have drawn, whatever trial a kill left running.
            study.sampler = sampler(done) if sampler else work.sampler((seed, done, *storage.seed))
            try:
                study.optimize(work.objective, n_trials=1, catch=(Surplus,))
            except TAKEN as error:
                if not work.was_taken_for_dead():
                    if isinstance(error.__context__, BitplanError):  # the trial's end could not be written either
                        raise error.__context__ from None
                    raise
            losses = [loss_of(trial) for trial in work.trials(ENDED)]
            bar.set_postfix(loss=f"{min(losses):.5f}" if losses else "", refresh=False)
    bar.close()
    return replace(_found(work.trials(ENDED), work.allocation_in, exact), study=study), exact


def _refuse_other_study(study: optuna.Study, storage: Storage, facts: Mapping[str, str]) -> None:
    """Raises UsageError where a study was made for something else; a new one is marked."""
    known = study.user_attrs.get(FACTS)
    if known is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(FACTS, dict(facts))
        study.set_metric_names(["loss, nats"])
        known = study.user_attrs[FACTS]  # of the worker that came first
    if not isinstance(known, dict):
        raise UsageError(f"study {study.study_name!r} in {storage.shown()} is none of bitplan's: give another --study")
    for what, value in facts.items():
        if known.get(what) != value:
            raise UsageError(
                f"study {study.study_name!r} in {storage.shown()} is of another {what}, {known.get(what)}, and this is"
                f" {value}: give another --study, or the same command line as its other workers"
            )


def _found(trials: list[FrozenTrial], allocation_in: Callable[[FrozenTrial], Allocation], exact: Solution) -> Found:
    ranked: list[Candidate] = []
    for place, trial in sorted(enumerate(trials), key=lambda each: loss_of(each[1])):
        allocation = allocation_in(trial)
        whole = trial.state == TrialState.COMPLETE and math.isfinite(loss_of(trial))
        if whole and all(allocation != each.allocation for each in ranked):
            ranked.append(Candidate(allocation, loss_of(trial), place))
    if not ranked:
        raise BitplanError(
            f"none of the {len(trials)} plans that were tried has a finite loss: give other --formats, or leave the"
            " weights that overflow unquantized by --keep"
        )
    dropped = sum(trial.state == TrialState.PRUNED for trial in trials)
    evaluated = tuple((allocation_in(trial), loss_of(trial)) for trial in trials)
    first = next((loss for allocation, loss in evaluated if allocation == exact.allocation), math.inf)
    return Found(tuple(ranked), first, len(trials), dropped, evaluated)
