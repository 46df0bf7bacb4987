"""Optuna over the score that feeds the knapsack; each trial is a whole plan, judged by its real loss.

A trial bends the predicted losses: a power (how much a large loss counts against many small ones), a slope over
depth, a weight per role (q_proj, down_proj, …), then solves the knapsack exactly, so every candidate fits the budget.
The unbent prediction is the first trial. Trials lie in a journal file: a study that was cut short goes on, and ends
as it would have. May import: formats, search.knapsack, sensitivity.progress.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from bitplan.formats.errors import BitplanError
from bitplan.formats.scheme import QuantScheme
from bitplan.search.knapsack import Options, Solution, solve
from bitplan.sensitivity.progress import progress

POWER = (0.7, 1.4)
SLOPE = 1.0
ROLE = math.log(3)
"""How far a trial may bend. The unbent prediction is near the best already: wide ranges only find worse plans."""
Allocation = dict[str, QuantScheme]


@dataclass(frozen=True)
class Best:
    allocation: Allocation
    loss: float
    """As `judge` gave it."""
    first_loss: float
    """Of the first trial, the unbent knapsack's solution."""
    trial: int
    """Its place among the finished trials, from 0; the same whether the study was interrupted or not."""
    trials: int


def role(group: str) -> str:
    """A group's name without layer and expert numbers: its last two words."""
    return ".".join(re.sub(r"\.\d+(?=\.|$)", "", group).split(".")[-2:])


def _value(trial: optuna.trial.FrozenTrial) -> float:
    assert trial.value is not None  # only completed trials are asked
    return trial.value


def bend(problem: Options, power: float, slope: float, weights: dict[str, float]) -> Options:
    """The problem with each group's losses bent; groups lie in data-flow order."""
    bent = {}
    for i, (group, options) in enumerate(problem.items()):
        depth = i / max(1, len(problem) - 1) - 0.5
        weight = math.exp(slope * depth + weights.get(role(group), 0.0))
        bent[group] = [replace(option, loss=weight * option.loss**power) for option in options]
    return bent


def search(
    problem: Options,
    budget: int,
    evaluate: Callable[[Allocation], float],
    *,
    trials: int,
    journal: Path,
    name: str,
    seed: int = 0,
) -> tuple[Best, Solution]:
    """Run a study up to `trials` trials in all. Returns the best candidate, and the unbent knapsack's solution.

    `evaluate(allocation)` gives what is to be least: KL on the search text, or a task's nats. A loss that is not finite
    counts as infinitely bad. Raises BudgetInfeasible, and BitplanError where no trial has a finite loss.
    """
    exact = solve(problem, budget)
    roles = sorted({role(group) for group in problem})
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
    study = optuna.create_study(storage=JournalStorage(backend), study_name=name, load_if_exists=True)
    evaluated: dict[tuple, float] = {}
    options = {group: [option.scheme for option in options] for group, options in problem.items()}

    def indices(allocation: Allocation) -> tuple[int, ...]:
        return tuple(options[group].index(choice) for group, choice in allocation.items())

    def finished() -> list[optuna.trial.FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))

    for trial in finished():
        evaluated[tuple(trial.user_attrs["indices"])] = _value(trial)

    def objective(trial: optuna.Trial) -> float:
        power = trial.suggest_float("power", *POWER)
        slope = trial.suggest_float("slope", -SLOPE, SLOPE)
        weights = {name: trial.suggest_float(f"role {name}", -ROLE, ROLE) for name in roles}
        allocation = solve(bend(problem, power, slope, weights), budget).allocation
        key = indices(allocation)
        trial.set_user_attr("indices", list(key))
        if key not in evaluated:
            loss = evaluate(allocation)
            # Optuna fails a trial that returns NaN, and failed trials are not counted.
            evaluated[key] = loss if math.isfinite(loss) else math.inf
        return evaluated[key]

    bar = progress(total=trials, initial=len(finished()), desc="trials", unit="plan")
    while (done := len(finished())) < trials:
        # Seeded by place and from finished trials only, so that a resumed study draws what an uninterrupted one would
        # have drawn: the constant liar, Optuna 5's default, also counts trials that a kill left running.
        study.sampler = optuna.samplers.TPESampler(
            seed=seed + done, multivariate=True, n_startup_trials=1 + len(roles), constant_liar=False
        )
        if done == 0 and not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
            study.enqueue_trial({"power": 1.0, "slope": 0.0, **{f"role {name}": 0.0 for name in roles}})
        study.optimize(objective, n_trials=1)
        bar.update()
        bar.set_postfix(loss=f"{study.best_value:.5f}", refresh=False)
    bar.close()
    trials_done = finished()
    place = min(range(done), key=lambda i: _value(trials_done[i]))
    best = trials_done[place]
    if not math.isfinite(_value(best)):
        raise BitplanError(
            f"none of the {done} plans that were tried has a finite loss: give other --formats, or leave the weights"
            " that overflow unquantized by --keep"
        )
    allocation = {group: options[group][i] for group, i in zip(problem, best.user_attrs["indices"], strict=True)}
    return Best(allocation, _value(best), _value(trials_done[0]), place, done), exact
