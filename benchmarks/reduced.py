"""How close does the search come to the optimum, where that is known? `make bench-reduced` (about ten minutes).

Ten groups with four formats each have a million allocations, so that all of them can be evaluated. The true loss is not
the predicted one: a factor by depth, by role and by group, a power, and terms between neighbouring groups are drawn for
each seed, as large as the corrections' prior takes them to be or larger. The arms differ in what draws the corrections.
May import: everything.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

from benchmarks.machine import described
from benchmarks.search import PriorSampler
from bitplan.formats.scheme import QuantScheme
from bitplan.planner.report.tables import table
from bitplan.search.corrections import Allocation, Corrections
from bitplan.search.knapsack import Option, Options
from bitplan.search.study import search

BITS = (2, 3, 4, 6)
SCHEMES = [QuantScheme(f"int{bits}-g64", "gptq") for bits in BITS]
LAYERS = 5
ROLES = ("self_attn.q_proj", "mlp.down_proj")
BLOCKS = 8
WITHIN = 1.02


class Reduced:
    """A problem, its budget, and the losses of all allocations within it."""

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        groups = [f"model.layers.{layer}.{role}" for layer in range(LAYERS) for role in ROLES]
        sizes = np.array([1.0, 3.0] * LAYERS)
        weights = draw.lognormal(0, 1, len(groups)) * sizes
        predicted = weights[:, None] * 4.0 ** -np.array(BITS) * draw.uniform(0.7, 1.4, (len(groups), len(BITS)))
        nbytes = (sizes[:, None] * np.array(BITS) * 8).astype(int)
        self.problem: Options = {
            group: [Option(*each) for each in zip(SCHEMES, nbytes[i].tolist(), predicted[i].tolist(), strict=True)]
            for i, group in enumerate(groups)
        }
        depth = np.repeat(np.linspace(-0.5, 0.5, LAYERS), len(ROLES))
        factor = np.exp(draw.normal(0, 1) * depth + np.tile(draw.normal(0, 0.5, 2), LAYERS) + draw.normal(0, 0.4, 10))
        self._true = factor[:, None] * predicted ** (1 + draw.normal(0, 0.1))
        self._between = draw.uniform(0, 0.5, len(groups) - 1)
        self._harder = draw.uniform(0.7, 1.3, BLOCKS)
        self.budget = int(3.2 * 8 * sizes.sum())
        every = np.array(list(itertools.product(range(len(BITS)), repeat=len(groups))), dtype=np.int8)
        fitting = every[nbytes[np.arange(len(groups)), every].sum(-1) <= self.budget]
        self.optimum = float(min(self.losses(part).min() for part in np.array_split(fitting, 20)))

    def losses(self, indices: NDArray[Any]) -> NDArray[np.float64]:
        """Of allocations: indices int [allocations, groups]."""
        single = self._true[np.arange(indices.shape[-1]), indices]
        return single.sum(-1) + (self._between * np.sqrt(single[:, :-1] * single[:, 1:])).sum(-1)

    def evaluate(self, allocation: Allocation) -> list[float]:
        """Blocks of text, some harder than others."""
        indices = np.array([[SCHEMES.index(allocation[group]) for group in self.problem]])
        return (float(self.losses(indices)[0]) * self._harder / self._harder.mean()).tolist()

    def searched(self, arm: str, trials: int, seed: int) -> tuple[list[float], float, float]:
        """The best loss after each trial as a multiple of the optimum, the share of groups that agree with an earlier
        allocation up to the first that does not, and seconds."""
        corrections, seen, known = Corrections(self.problem), list[float](), list[Allocation]()
        same = 0

        def evaluate(allocation: Allocation) -> list[float]:
            nonlocal same
            same += shared(allocation, known)
            known.append(allocation)
            losses = self.evaluate(allocation)
            seen.append(float(np.mean(losses)))
            return losses

        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            sampler = samplers(corrections, seed)[arm]
            options = {"trials": trials, "journal": Path(folder) / "study.log", "name": arm, "seed": seed}
            search(self.problem, self.budget, evaluate, sampler=sampler, **options)  # type: ignore[arg-type]
        best = np.minimum.accumulate(seen) / self.optimum
        return best.tolist(), same / len(known) / len(self.problem), time.perf_counter() - began


def shared(allocation: Allocation, known: Sequence[Allocation]) -> int:
    """The number of groups, in the order of the data flow, up to which an allocation agrees with a known one."""
    groups = list(allocation)
    same = (next((i for i, g in enumerate(groups) if allocation[g] != each[g]), len(groups)) for each in known)
    return max(same, default=0)


def samplers(corrections: Corrections, seed: int) -> dict[str, Callable[[int], Any] | None]:
    """For each arm a function from the number of finished trials to the study's sampler; None is Thompson sampling."""
    made: dict[str, Any] = {}

    def once(name: str, make: Callable[[], Any]) -> Callable[[int], Any]:
        return lambda done: made.setdefault(name, made.get(name) or make())

    return {
        "thompson": None,
        "random": lambda done: PriorSampler(corrections, lambda: [({}, 1.0)] * done, dict, (seed, done)),
        "tpe": once("tpe", lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=False)),
        "gp": once("gp", lambda: optuna.samplers.GPSampler(seed=seed)),
        "cma-es": once("cma-es", lambda: optuna.samplers.CmaEsSampler(seed=seed, sigma0=0.5)),
    }


def at(best: Sequence[float], trials: int) -> float:
    """After so many different allocations; a study may evaluate fewer."""
    return best[min(trials, len(best)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arms", default="thompson,random,tpe,gp,cma-es")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    problems = [Reduced(seed) for seed in range(arguments.seeds)]
    rows = []
    for arm in arguments.arms.split(","):
        runs = [problem.searched(arm, arguments.trials, seed) for seed, problem in enumerate(problems)]
        found = [best for best, _, _ in runs]
        within = sum(at(best, arguments.trials) <= WITHIN for best in found)
        means = (f"{np.mean([at(best, n) for best in found]):.4f}" for n in (1, 5, 20, arguments.trials))
        rows.append(
            (
                arm,
                *means,
                f"{within} of {len(found)}",
                f"{np.mean([s for _, s, _ in runs]):.0%}",
                f"{np.mean([s for *_, s in runs]):.1f}",
            )
        )
        print(*rows[-1], flush=True)
    head = ("arm", "1 trial", "5", "20", f"{arguments.trials}", "within 2 %", "shared", "seconds")
    print(table(head, rows, left=1))
    print(described())


if __name__ == "__main__":
    main()
