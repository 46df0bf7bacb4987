"""Optuna over the score that feeds the knapsack; each trial is a whole plan, judged by its real loss.

A trial bends the predicted losses: a power (how much a large loss counts against many small ones), a slope over
depth, a weight per role (q_proj, down_proj, …), then solves the knapsack exactly, so every candidate fits the budget.
The unbent prediction is the first trial. Trials lie in a journal file: a study that was cut short goes on, and ends
as it would have. May import: search.knapsack, sensitivity.bank.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

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

    `judge(allocation)` gives what is to be least: KL on the search text, or a task's nats. Raises BudgetInfeasible.
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
            evaluated[key] = evaluate(allocation)
        return evaluated[key]

    bar = progress(total=trials, initial=len(finished()), desc="trials", unit="plan")
    while (done := len(finished())) < trials:
        # Seeded by place, so that a resumed study draws what an uninterrupted one would have drawn.
        study.sampler = optuna.samplers.TPESampler(seed=seed + done, multivariate=True, n_startup_trials=1 + len(roles))
        if done == 0:
            study.enqueue_trial({"power": 1.0, "slope": 0.0, **{f"role {name}": 0.0 for name in roles}})
        study.optimize(objective, n_trials=1)
        bar.update()
        bar.set_postfix(loss=f"{study.best_value:.5f}", refresh=False)
    bar.close()
    best = min(finished(), key=lambda trial: (_value(trial), trial.number))
    allocation = {group: options[group][i] for group, i in zip(problem, best.user_attrs["indices"], strict=True)}
    return Best(allocation, _value(best), _value(finished()[0]), best.number, done), exact
