"""What `bitplan plan` is asked for: one budget or several, a latency beside it, or a loss. May import: everything."""

import math
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from bitplan.formats.errors import UsageError
from bitplan.planner.evaluate.speed import Speed, refuse_other
from bitplan.planner.evaluate.trials import StudyPlace
from bitplan.planner.memory.budget import budget_bytes, refuse_unclear
from bitplan.planner.plan import Budget
from bitplan.planner.select import LossLimit
from bitplan.search.problem import Problem, limited
from bitplan.search.storage import Storage
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.session import pick_device
from bitplan.sensitivity.source import Source

SIZES = ("budget", "bpw", "fraction")


def limit_of(arguments: Namespace) -> LossLimit | None:
    """The loss that was named instead of a budget. Raises UsageError for values that are none, and for more or less
    than one option that names what is wanted."""
    named = (*SIZES, "gpu", "max_loss", "max_ppl_increase")
    (option,) = refuse_unclear({f"--{name.replace('_', '-')}": getattr(arguments, name) for name in named})
    if option == "--max-loss":
        nats = arguments.max_loss
        limit = LossLimit(f"KL of at most {nats:g} nats per token", "kl", nats)
    elif option == "--max-ppl-increase":
        text = arguments.max_ppl_increase
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
        if not found:
            raise UsageError(f"{option} {text!r} is no percentage: write for example 1% or 0.5%")
        limit = LossLimit(f"perplexity at most {found[1]} % higher", "delta_nll", math.log1p(float(found[1]) / 100))
    else:
        return None
    if not math.isfinite(limit.nats) or limit.nats <= 0:
        raise UsageError(f"{option} must be above zero: no quantized model has exactly the loss of full precision")
    for name in ("task", "time"):
        if getattr(arguments, name):
            raise UsageError(f"{option} is a loss on text, found by as many sizes as it takes: leave --{name} out")
    return limit


@dataclass(frozen=True)
class LatencyGoal:
    """A limit on the seconds of one decoded token, and the table that predicts them."""

    requested: str
    seconds: float
    speed: Speed

    def bind(self, problem: Problem) -> Problem:
        """The problem within the limit, too. Raises UsageError for a format that was not timed."""
        units = problem.profile.units
        return limited(problem, self.speed.seconds, self.speed.latency(self.requested, self.seconds, units))


def latency_of(arguments: Namespace, source: Source) -> LatencyGoal | None:
    """Raises UsageError, FileInvalid; PlanMismatch for a table of another model or device."""
    text, file = arguments.max_latency, arguments.speed
    if text is None and file is None:
        return None
    if text is None or file is None:
        raise UsageError("--max-latency and --speed, a table by `bitplan speed`, go together: give both")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", text)
    if not found or not (seconds := float(found[1]) / (1e3 if found[2] == "ms" else 1)):
        raise UsageError(f"--max-latency {text!r} is no time above zero: write for example 30ms or 0.5s")
    if arguments.max_loss is not None or arguments.max_ppl_increase is not None:
        raise UsageError("--max-latency is a second limit beside a budget in bytes: leave the limit on the loss out")
    if arguments.storage or arguments.time:
        option = "--storage" if arguments.storage else "--time"
        raise UsageError(
            "with --max-latency the finished plan is timed, and searched for again where it is too slow: leave"
            f" {option} out"
        )
    speed = read(file, Speed)
    refuse_other(speed, source, pick_device(arguments.device))
    return LatencyGoal(f"--max-latency {text}", seconds, speed)


def budgets_of(arguments: Namespace, parameters: int) -> list[Budget]:
    """Each once, in the order given. Raises UsageError for values that are none."""
    made: list[Budget] = []
    for name in SIZES:
        for value in getattr(arguments, name) or []:
            size, bpw, fraction = (value if other == name else None for other in SIZES)
            weights, requested = budget_bytes(size, bpw, fraction, parameters)
            made.append(Budget(requested=requested, weights=weights))
    return list(dict.fromkeys(made))


def outputs_of(output: Path | None, budgets: list[Budget]) -> list[Path | None]:
    """A file for each plan: `plan.json`, or for several plan-3-bits-per-weight.json and so on."""
    if output is None or len(budgets) < 2:
        return [output] * max(1, len(budgets))
    names = [re.sub(r"[^\w.]+", "-", budget.requested) for budget in budgets]
    return [output.with_name(f"{output.stem}-{name}{output.suffix}") for name in names]


def place_of(arguments: Namespace, trials: int) -> StudyPlace | None:
    """Where several processes share a study. Raises UsageError, and BitplanError for a storage that cannot be opened:
    an audit may take hours."""
    if arguments.storage is None:
        if arguments.study:
            raise UsageError("--study names a study in a storage that workers share: give --storage too")
        return None
    if not trials:
        raise UsageError("--storage holds trials, and --trials 0 runs none: give --trials 1 or more")
    if arguments.study and len(budgets_of(arguments, 1)) > 1:
        raise UsageError("--study names one study, and each budget has its own: give one budget, or leave --study out")
    Storage(arguments.storage, shared=True)
    return StudyPlace(arguments.storage, arguments.study)
