"""Corrections of predicted losses, fitted to allocations that were evaluated.

An option of a group has the corrected loss exp(Σ_k θ_k · φ_k) · predicted loss. The features φ are the group's depth
and its square, its role (q_proj, down_proj, …), the group itself, the option's bits relative to the group's largest
option, and the logarithm of the predicted loss, whose θ makes one large loss count more or less against many small
ones. At θ = 0 the prediction is as it was.

An evaluated allocation has log loss = α + log Σ_groups corrected loss + noise. With a normal prior on θ the best fit is
a regularised least-squares problem, solved by Gauss-Newton steps, and its curvature gives the normal approximation of
the posterior (Laplace). A draw from it, and the knapsack's exact solution under that draw, is the next allocation to
evaluate: Thompson sampling (Thompson 1933; Russo et al. 2018).

May import: formats.scheme, search.knapsack.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitplan.formats.scheme import QuantScheme
from bitplan.search.knapsack import Options

Array = NDArray[np.float64]
Allocation = dict[str, QuantScheme]
PRIOR = {"depth": 1.0, "middle": 1.0, "bits": 0.3, "power": 0.15, "role": 0.5, "group": 0.3}
"""Standard deviations of θ before anything is evaluated."""
LIMIT = 3.0
"""θ is within so many of them."""
NOISE = 0.03
"""Standard deviation of log loss that the corrections cannot explain."""
GROUPS = 400
"""Problems of more groups have no corrections of single groups: the fit would take longer than an evaluation."""
STEPS = 30


def role(group: str) -> str:
    """A group's name without layer and expert numbers: its last two words."""
    return ".".join(re.sub(r"\.\d+(?=\.|$)", "", group).split(".")[-2:])


@dataclass(frozen=True)
class Fit:
    """The normal approximation of the posterior."""

    mean: Array
    root: Array
    """A square root of the covariance."""


class Corrections:
    """The features of a problem's options; groups lie in the order of the data flow."""

    def __init__(self, problem: Options):
        self.problem = problem
        roles = sorted({role(group) for group in problem})
        single = list(problem) if len(problem) <= GROUPS else []
        self.shared = ("depth", "middle", "bits", "power", *(f"role {name}" for name in roles))
        self.names = (*self.shared, *(f"group {name}" for name in single))
        self.prior = np.array([PRIOR[name.partition(" ")[0]] for name in self.names])
        self._index = {group: {o.scheme: i for i, o in enumerate(options)} for group, options in problem.items()}
        logs = [np.log(o.loss) for options in problem.values() for o in options if o.loss > 0]
        typical = float(np.median(logs)) if logs else 0.0
        self._features, self._log = [], []
        """For each group: float [options, shared features], and the logarithms of its predicted losses [options]."""
        for place, (group, options) in enumerate(problem.items()):
            depth = place / max(1, len(problem) - 1) - 0.5
            with np.errstate(divide="ignore"):
                log = np.log(np.array([option.loss for option in options]))
            power = np.where(np.isfinite(log), log - typical, 0.0)
            bits = -np.log2([max(1, option.nbytes) for option in options])
            roles_here = [float(name == role(group)) for name in roles]
            constant = np.tile([depth, 4 * depth**2 - 0.5], (len(options), 1))
            columns = [constant, (bits - bits.mean())[:, None], power[:, None]]
            self._features.append(np.hstack([*columns, np.tile(roles_here, (len(options), 1))]))
            self._log.append(log)

    def corrected(self, theta: Mapping[str, float]) -> Options:
        """The problem with corrected losses; a θ that is not named is 0."""
        values = np.array([theta.get(name, 0.0) for name in self.names])
        common = len(self.shared)
        made = {}
        for place, (group, options) in enumerate(self.problem.items()):
            single = values[common + place] if len(values) > common else 0.0
            losses = np.exp(self._log[place] + self._features[place] @ values[:common] + single)
            made[group] = [replace(option, loss=float(loss)) for option, loss in zip(options, losses, strict=True)]
        return made

    def fit(self, evaluated: Sequence[tuple[Allocation, float]]) -> Fit:
        """To allocations and their positive losses; without any, the prior."""
        theta, common = np.zeros(len(self.names)), len(self.shared)
        if not evaluated:
            return Fit(theta, np.diag(self.prior))
        rows = [[self._index[group][each[group]] for group in self.problem] for each, _ in evaluated]
        features = np.array([[self._features[g][i] for g, i in enumerate(row)] for row in rows])
        logs = np.array([[self._log[g][i] for g, i in enumerate(row)] for row in rows])
        aims = np.log([loss for _, loss in evaluated])
        precision = np.diag(self.prior**-2.0)
        for _ in range(STEPS):
            single = theta[common:] if len(theta) > common else 0.0
            parts = logs + features @ theta[:common] + single
            top = parts.max(-1, keepdims=True)
            top[~np.isfinite(top)] = 0.0
            weights = np.exp(parts - top)
            total = np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            values = (top + np.log(total))[:, 0]
            weights /= total
            jacobian = (weights[..., None] * features).sum(1)
            if len(theta) > common:
                jacobian = np.hstack([jacobian, weights])
            # α is not regularised: the means go.
            residual = (aims - aims.mean()) - (values - values.mean())
            jacobian = jacobian - jacobian.mean(0)
            hessian = jacobian.T @ jacobian / NOISE**2 + precision
            step = np.linalg.solve(hessian, jacobian.T @ residual / NOISE**2 - precision @ theta)
            largest = float(np.abs(step / self.prior).max())
            theta = np.clip(theta + step / max(1.0, largest), -LIMIT * self.prior, LIMIT * self.prior)
            if largest < 1e-4:
                break
        return Fit(theta, np.linalg.cholesky(np.linalg.inv(hessian)))

    def fitted(self, evaluated: Sequence[tuple[Allocation, float]]) -> Options:
        """The problem with the losses that fit allocations and their losses best; those that are not finite say
        nothing."""
        fit = self.fit([(each, loss) for each, loss in evaluated if 0 < loss < np.inf])
        return self.corrected(self.named(fit.mean))

    def draw(self, fit: Fit, generator: np.random.Generator, width: float = 1.0) -> dict[str, float]:
        """θ from the posterior, with its standard deviations multiplied by `width`."""
        return self.named(fit.mean + width * fit.root @ generator.standard_normal(len(self.names)))

    def named(self, theta: Array) -> dict[str, float]:
        """θ by name, within its limits."""
        limits = LIMIT * self.prior
        return dict(zip(self.names, np.clip(theta, -limits, limits).tolist(), strict=True))
