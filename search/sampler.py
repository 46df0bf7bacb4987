"""The study's sampler: Thompson sampling from the corrections' posterior. May import: search.corrections/knapsack."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from bitplan.search.corrections import LIMIT, Allocation, Corrections

TRIES = 20
"""Draws until one gives an allocation that was not evaluated yet."""
WIDER = 1.15
"""What the posterior's standard deviations are multiplied by after each draw that gave a known allocation."""
MEAN_EVERY = 3
"""Every third trial takes the posterior's mean instead of a draw."""


class PosteriorSampler(optuna.samplers.BaseSampler):
    """Draws θ. `evaluated()` gives the allocations so far with their losses, `solve(θ)` the allocation of a θ.
    `elsewhere(trial)` tells whether no other worker has the first trial, and what the others are evaluating."""

    def __init__(
        self,
        corrections: Corrections,
        evaluated: Callable[[], Sequence[tuple[Allocation, float]]],
        solve: Callable[[dict[str, float]], Allocation],
        seed: Sequence[int],
        elsewhere: Callable[[int], tuple[bool, Sequence[Allocation]]] = lambda number: (False, ()),
    ):
        self.corrections, self.evaluated, self.solve, self.elsewhere = corrections, evaluated, solve, elsewhere
        self.generator = np.random.default_rng(list(seed))
        self.single: dict[str, float] = {}
        """The last draw's corrections of single groups, which are no parameters of the study: a storage writes each
        parameter by itself, and there are hundreds."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return dict(distributions(self.corrections))

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        theta = self._draw(*self.elsewhere(trial.number))
        self.single = {name: theta[name] for name in self.corrections.names if name not in search_space}
        return {name: theta[name] for name in search_space}

    def _draw(self, first: bool = False, elsewhere: Sequence[Allocation] = ()) -> dict[str, float]:
        evaluated = self.evaluated()
        zero = self.corrections.named(np.zeros(len(self.corrections.names)))
        if first:
            return zero
        known = [*(allocation for allocation, _ in evaluated), *elsewhere]
        fit = self.corrections.fit([(each, loss) for each, loss in evaluated if 0 < loss < np.inf])
        theta, width = zero, 1.0
        for attempt in range(TRIES):
            mean = attempt == 0 and len(evaluated) % MEAN_EVERY == MEAN_EVERY - 1
            theta = self.corrections.named(fit.mean) if mean else self.corrections.draw(fit, self.generator, width)
            if self.solve(theta) not in known:
                break
            width *= WIDER
        return theta

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        raise AssertionError(param_name)  # all of them are drawn together


def distributions(corrections: Corrections) -> dict[str, FloatDistribution]:
    """The study's parameters: each θ that groups share, by name."""
    limits = (LIMIT * corrections.prior[: len(corrections.shared)]).tolist()
    return {name: FloatDistribution(-limit, limit) for name, limit in zip(corrections.shared, limits, strict=True)}
