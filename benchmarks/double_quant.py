"""What do double-quantized scales gain? `make bench-double-quant`; `--also MODEL TEXT HELDOUT` adds a model.

Two tables per model, all rounded in sequence and measured on held-out text: each of the formats for all units, and
plans (the knapsack's, no trials) for the bytes of a uniform one, from a plan's default formats with and without the
double-quantized ones. May import: everything.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import models
from benchmarks.machine import described
from bitplan.formats.rounding import ROUNDINGS
from bitplan.formats.table import DEFAULT_FORMATS
from bitplan.planner.assemble import Finish, quick_plan, uniform_plan
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Budget, Measured, Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.tables import table
from bitplan.search.problem import problem_of
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.read import read_texts
from bitplan.sensitivity.texts.text import TOKENS

BITS = (4, 3, 2)
DOUBLE = tuple(f"int{bits}-g32-s4" for bits in BITS)
OTHERS = tuple(name for name in DEFAULT_FORMATS if name not in DOUBLE)


class Case:
    """A model with its texts, opened for work."""

    def __init__(self, model: str | Path, text: str | Path, heldout: str | Path, tokens: int, rounding: str):
        self.name = models.label(model)
        texts = read_texts(sources.find(model), files=[Path(text)], heldout=[Path(heldout)], tokens=tokens)
        self.session: Session = open_session(sources.find(model), texts, device="cpu")
        self.objective = Objective(self.session)
        self.rounding = rounding

    def measured(self, plan: Plan) -> Measured:
        began = time.perf_counter()
        round_missing(plan, self.session)
        found = self.objective.heldout(load_planned(plan, self.session.source, "cpu"))
        print(f"{self.name} {plan.bytes:,} {found.kl:.5f} {time.perf_counter() - began:.0f} s", file=sys.stderr)
        return found

    def row(self, name: str, plan: Plan, found: Measured, beside: Measured) -> tuple[str, ...]:
        kl = f"{found.kl:.5f}" + (f" ± {found.kl_se:.5f}" if found.kl_se else "")
        return self.name, name, f"{plan.bytes:,}", f"{plan.bits_per_weight:.3f}", kl, f"{found.kl / beside.kl:.3f}"

    def uniform(self, chosen: Sequence[int]) -> list[tuple[str, ...]]:
        rows = []
        for bits in chosen:
            plans = {
                n: uniform_plan(self.session, n, self.rounding)
                for n in (f"int{bits}-{g}" for g in ("g64", "g32-s4", "g32"))
            }
            found = {name: self.measured(plan) for name, plan in plans.items()}
            rows += [self.row(name, plan, found[name], found[f"int{bits}-g64"]) for name, plan in plans.items()]
        return rows

    def planned(self, chosen: Sequence[int]) -> list[tuple[str, ...]]:
        profile, rows = audit(self.session, (*OTHERS, *DOUBLE)), []
        for bits in chosen:
            size = uniform_plan(self.session, f"int{bits}-g64").bytes
            budget = Budget(requested=f"the bytes of uniform int{bits}-g64", weights=size)

            def made(formats: Sequence[str], budget: Budget = budget) -> Plan:
                return quick_plan(problem_of(profile, tuple(formats)), budget, Finish(self.rounding))

            plans = {"without": made(OTHERS), "with": made((*OTHERS, *DOUBLE))}
            found = {name: self.measured(plan) for name, plan in plans.items()}
            rows += [
                self.row(f"int{bits}-g64's bytes, {name}", plan, found[name], found["without"])
                for name, plan in plans.items()
            ]
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    models.add_options(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, choices=BITS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounding", default="gptq", choices=ROUNDINGS)
    arguments = parser.parse_args()
    uniform, planned = [], []
    for files in models.chosen(arguments):
        case = Case(*files, arguments.tokens, arguments.rounding)
        uniform += case.uniform(arguments.bits)
        planned += case.planned(arguments.bits)
    head = ("model", "", "bytes", "bits per weight", "held-out KL, nats per token", "ratio")
    print(table(head, uniform, left=2))
    print(table(head, planned, left=2))
    print(described("cpu"))


if __name__ == "__main__":
    main()
