"""How good and how fast is the search? `make bench-search`; `--knapsack` for the solver alone (a minute).

Each arm gets a model's budget and gives an allocation; every allocation is then finished by the plan's own rounding and
evaluated on held-out text. The arms with trials are those of `bitplan plan`, races between finished plans included, and
differ in what draws the corrections: their posterior (`search`), their prior (`random`, the control) or Optuna's TPE
(`tpe`). Allocations that several arms finish are finished once, and their seconds counted for each.
May import: everything.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from benchmarks import models
from benchmarks.arms import remeasured, thresholds
from benchmarks.machine import described
from bitplan.formats.double_quant import DoubleQuantFormat
from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import DEFAULT_FORMATS, FORMATS
from bitplan.planner.assemble import Finish, allocated_plan
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.evaluate.trials import Effort, Trials
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Budget, Measured, Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.tables import table
from bitplan.search.corrections import Allocation, Corrections
from bitplan.search.frontier import frontier
from bitplan.search.knapsack import Option, Options, ceiling, floor, solve
from bitplan.search.problem import Problem, problem_of
from bitplan.search.sampler import PosteriorSampler
from bitplan.search.study import search
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts

MENU = tuple(name for name in DEFAULT_FORMATS if not isinstance(FORMATS[name], DoubleQuantFormat))
"""The formats that all arms choose among."""
SIZES = ((43, 12), (200, 12), (1000, 30), (10_000, 30))
"""Groups and options each."""
SHARES = (0.05, 0.2, 0.5)
"""Budgets, from the smallest allocation to the largest."""
ARMS = "uniform,ends,mlx-lm,search:5,search:20,random:20"
"""Beside the knapsack; `point`, too, is the knapsack with losses predicted at its plan's operating point."""


def random_problem(groups: int, each: int) -> Options:
    """Options whose loss falls fourfold with each bit, in groups of very different sizes and weights."""
    draw = random.Random(0)

    def options() -> list[Option]:
        size, weight = draw.choice((576 * 576, 576 * 1536, 4096 * 4096, 4096 * 11008)), draw.lognormvariate(0, 2)
        bits = [draw.uniform(1, 16) for _ in range(each)]
        return [
            Option(QuantScheme(f"f{j}", "gptq"), int(size * b / 8), weight * 4.0**-b * draw.uniform(0.5, 2))
            for j, b in enumerate(bits)
        ]

    return {f"g{i}": options() for i in range(groups)}


def knapsack_table() -> str:
    rows = []
    for groups, each in SIZES:
        problem = random_problem(groups, each)
        least, most = floor(problem), ceiling(problem)
        for share in SHARES:
            began = time.perf_counter()
            solution = solve(problem, int(least + share * (most - least)))
            seconds = time.perf_counter() - began
            rows.append((f"{groups:,} × {each}", f"{share:g}", f"{solution.gap:.1e}", f"{seconds:.2f}"))
        began = time.perf_counter()
        points = frontier(problem)
        rows.append((f"{groups:,} × {each}", f"all {len(points):,} points", "", f"{time.perf_counter() - began:.2f}"))
    return table(("groups × options", "budget", "proven gap", "seconds"), rows, left=2)


class PriorSampler(PosteriorSampler):
    """The control: corrections from the prior, whatever was evaluated."""

    def _draw(self, first: bool = False, elsewhere: Sequence[Allocation] = ()) -> dict[str, float]:
        zero = self.corrections.named(np.zeros(len(self.corrections.names)))
        return self.corrections.draw(self.corrections.fit([]), self.generator) if self.evaluated() else zero


class Case:
    """A model with its texts, at a budget of bits per weight over all parameters."""

    def __init__(self, model: str, text: str, heldout: str, bits: float):
        source = sources.find(model)
        self.name = models.label(model)
        self.session = open_session(
            source, read_texts(source, files=[Path(text)], heldout=[Path(heldout)]), device="cpu"
        )
        self.problem: Problem = problem_of(audit(self.session, MENU))
        weights = int(self.session.model.num_parameters() * bits / 8)
        self.budget = Budget(requested=f"{bits:g} bits per weight", weights=weights)
        self.available = weights - self.problem.profile.unquantized_bytes
        self.objective = Objective(self.session)
        self.exact = self.problem.solved(self.budget.weights)
        self._finished: dict[str, tuple[float, Measured, float]] = {}
        self.seconds = 0.0
        self.skipped: float | None = None
        """The share of an arm's trials that sharing and dropping saved, in seconds."""

    def plan(self, allocation: Allocation) -> Plan:
        return allocated_plan(self.problem, allocation, self.budget, self.exact, Finish())

    def finished(self, allocation: Allocation) -> tuple[float, Measured]:
        """KL on the search text, and the figures on held-out text."""
        key = repr(sorted(allocation.items()))
        if key not in self._finished:
            began = time.perf_counter()
            plan = self.plan(allocation)
            round_missing(plan, self.session)
            model = load_planned(plan, self.session.source, "cpu")
            found = self.objective.kl(model), self.objective.heldout(model)
            self._finished[key] = (*found, time.perf_counter() - began)
        kl, measured, seconds = self._finished[key]
        self.seconds += seconds
        return kl, measured

    def searched(self, arm: str, trials: int, seed: int) -> Allocation:
        """What `bitplan plan` would choose, but for the comparison with uniform."""
        corrections = Corrections(self.problem.options)
        evaluated = Trials(self.problem, self.budget, self.session, self.objective, Finish(), Effort())
        samplers: dict[str, Callable[[int], Any] | None] = {
            "search": None,
            "random": lambda done: PriorSampler(corrections, lambda: [({}, 1.0)] * done, dict, (seed, done)),
            "tpe": lambda done: optuna.samplers.TPESampler(seed=seed + done, multivariate=True, constant_liar=False),
        }
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            options = {"trials": trials, "journal": Path(folder) / "study.log", "name": "bench", "seed": seed}
            asked = (self.problem.options, self.available, evaluated.losses)
            found, exact = search(*asked, sampler=samplers[arm], **options)  # type: ignore[arg-type]
        self.seconds += time.perf_counter() - began
        blocks = evaluated.evaluated * self.objective.count
        saved = evaluated.candidates.saved + (blocks / evaluated.blocks - 1) * evaluated.running
        self.skipped = saved / (saved + evaluated.rounding + evaluated.running)
        finalists = [each.allocation for each in found.ranked[: Effort.of(trials).finalists]]
        if len(finalists) > 1:
            ends = self.problem.ends_high(self.budget.weights)
            finalists += [exact.allocation, *([ends] if ends else [])]
        return min(finalists, key=lambda allocation: self.finished(allocation)[0])


def jobs(case: Case, arms: str, seeds: int) -> Iterator[tuple[str, Callable[[], Allocation]]]:
    """The arms by name, each a function that gives an allocation."""
    yield "knapsack", lambda: case.exact.allocation
    for arm, _, trials in (each.partition(":") for each in arms.split(",")):
        fixed: dict[str, Allocation] = {}
        if arm == "uniform":
            uniform = case.problem.uniform(case.budget.weights)
            fixed = {"best uniform": uniform[0][1]} if uniform else {}
        elif arm == "ends":
            ends = case.problem.ends_high(case.budget.weights)
            fixed = {"first and last high": ends} if ends else {}
        elif arm == "mlx-lm":
            made = list(thresholds(case.problem, case.session, case.budget.weights))
            fixed = {"mlx-lm's rule": min(made, key=lambda each: case.finished(each)[0])} if made else {}
        elif arm == "point":
            fixed = dict(remeasured(case.problem, case.session, case.plan(case.exact.allocation), case.available))
        for name, allocation in fixed.items():
            yield name, partial(dict, allocation)
        for seed in range(seeds if trials else 0):
            name = f"{arm}, {trials} trials" + (f", seed {seed}" if seeds > 1 else "")
            yield name, partial(case.searched, arm, int(trials), 1000 * seed)


def cases_of(models: list[tuple[str, str, str]], budgets: list[float]) -> Iterator[Case]:
    """Those whose budget the formats allow."""
    for files in models:
        for bits in budgets:
            try:
                yield Case(*files, bits)
            except BudgetInfeasible as error:
                print(f"{files[0]}, {bits:g} bits per weight: {error}", file=sys.stderr)


def arms_table(cases: Iterable[Case], arms: str, seeds: int) -> str:
    rows = []
    for case in cases:
        base = case.finished(case.exact.allocation)[1].kl
        for name, job in jobs(case, arms, seeds):
            case.seconds, case.skipped = 0.0, None
            allocation = job()
            kl, error = (found := case.finished(allocation)[1]).kl, found.kl_se
            figures = (f"{kl:.5f}", f"{error:.5f}", f"{kl / base:.3f}", f"{case.seconds:.0f}")
            figures += ("" if case.skipped is None else f"{case.skipped:.0%}",)
            rows.append((case.name, case.budget.requested, name, f"{case.problem.nbytes(allocation):,}", *figures))
            print(*rows[-1], file=sys.stderr, flush=True)
    head = ("model", "budget", "arm", "bytes", "held-out KL", "± se", "of knapsack", "seconds", "work skipped")
    return table(head, rows, left=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--knapsack", action="store_true", help="only the solver, on random problems")
    models.add_options(parser)
    parser.add_argument("--bpw", type=float, nargs="+", default=[2.5, 3.2, 4.0], metavar="BITS")
    parser.add_argument("--arms", default=ARMS, metavar="ARM,ARM:TRIALS,…")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.knapsack:
        print(knapsack_table())
    else:
        cases = cases_of(models.chosen(arguments), arguments.bpw)
        print(arms_table(cases, arguments.arms, arguments.seeds))
    print(described())


if __name__ == "__main__":
    main()
