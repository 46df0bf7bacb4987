"""What `bitplan plan` is asked for: one budget or several, or a loss. May import: everything."""

import math
import re
from argparse import Namespace
from pathlib import Path

from bitplan.formats.errors import UsageError
from bitplan.planner.evaluate.trials import StudyPlace
from bitplan.planner.memory.budget import budget_bytes, refuse_unclear
from bitplan.planner.plan import Budget
from bitplan.planner.select import LossLimit
from bitplan.search.storage import Storage

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
