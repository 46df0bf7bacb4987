"""Allocation → plan: how codes are finished, the one place where a Plan is built, uniform plans.

May import: formats, search, sensitivity, planner.plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitplan.formats.errors import FormatUnavailable, UsageError
from bitplan.formats.floats import FloatFormat
from bitplan.formats.rounding import refuse_misfit, rounding_for
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import DTYPES, FORMATS, format_named
from bitplan.planner.plan import (
    NATIVE_WORKLOAD,
    Budget,
    Measured,
    Plan,
    PlanLatency,
    PlannedUnit,
    PlanOverride,
    Predicted,
    Uniform,
    Workload,
)
from bitplan.search.corrections import Allocation
from bitplan.search.knapsack import Solution
from bitplan.search.overrides import matched
from bitplan.search.problem import Problem, refuse_infeasible
from bitplan.sensitivity.profile import Provenance, UnitEntry, UnquantizedEntry, unit_entry, unquantized_entry
from bitplan.sensitivity.session import Session

COMPARED = ("fp32", "bf16", "fp16", "fp8", "int8", "int4-g64", "nf4", "binary-g64")
"""What `compare` shows by default."""


@dataclass(frozen=True)
class Finish:
    """How a plan's codes are made: a rounding for the formats that it fits (None: each format's own), and whether
    scales are distilled afterwards."""

    rounding: str | None = None
    distilled: bool = False

    def __call__(self, format: str, dtype: str) -> str:
        """The rounding of a unit of a checkpoint dtype in a format."""
        return "nearest" if format == DTYPES[dtype] else rounding_for(FORMATS[format], self.rounding)


def assemble(
    entries: Sequence[UnitEntry],
    unquantized: Sequence[UnquantizedEntry],
    provenance: Provenance,
    format_of: Callable[[UnitEntry], str],
    finish: Finish,
    budget: Budget | str,
    shipped: Literal["search", "uniform"],
    **parts: Any,
) -> Plan:
    """The plan that gives each unit `format_of(unit)`; where no budget was set, `budget` is the name of the plan."""
    units = tuple(
        PlannedUnit(
            **dict(entry),
            format=format_of(entry),
            rounding=finish(format_of(entry), entry.dtype),
            bytes=entry.nbytes(format_of(entry)),
        )
        for entry in entries
    )
    total = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in unquantized)
    return Plan(
        budget=Budget(requested=budget, weights=total) if isinstance(budget, str) else budget,
        bytes=total,
        bits_per_weight=total * 8 / provenance.model.parameters,
        shipped=shipped,
        units=units,
        unquantized=tuple(unquantized),
        distilled=finish.distilled and any(not unit.is_native for unit in units),
        provenance=provenance,
        **parts,
    )


def allocated_plan(
    problem: Problem,
    allocation: Allocation,
    budget: Budget,
    solution: Solution,
    finish: Finish,
    shipped: Literal["search", "uniform"] = "search",
    **parts: Any,
) -> Plan:
    """The plan of an allocation, with its predicted loss and the bound of the exact `solution`; where a latency is
    limited, also its predicted one."""
    profile, limit = problem.profile, problem.latency
    if limit is not None:
        seconds = problem.seconds(allocation) + limit.rest
        parts |= {
            "latency": PlanLatency(requested=limit.requested, limit=limit.limit, device=limit.device, predicted=seconds)
        }
    predicted = Predicted(nll=problem.loss(allocation), bound=solution.bound)
    overrides = tuple(PlanOverride(**vars(each), units=matched(profile, each)) for each in problem.overrides)
    return assemble(
        profile.units,
        profile.unquantized,
        profile.provenance,
        lambda unit: allocation[unit.group].format,
        finish,
        budget,
        shipped,
        predicted=predicted,
        overrides=overrides,
        **parts,
    )


def quick_plan(problem: Problem, budget: Budget, finish: Finish, workload: Workload = NATIVE_WORKLOAD) -> Plan:
    """The knapsack's solution, unmeasured: seconds, and no model. Raises BudgetInfeasible."""
    refuse_infeasible(problem, budget.weights, budget.requested)
    solution = problem.solved(budget.weights)
    fitting = problem.uniform(budget.weights)
    uniform = uniform_facts(problem, *fitting[0], finish) if fitting else None
    return allocated_plan(problem, solution.allocation, budget, solution, finish, uniform=uniform, workload=workload)


def uniform_facts(
    problem: Problem, scheme: QuantScheme, allocation: Allocation, finish: Finish, measured: Measured | None = None
) -> Uniform:
    """A uniform allocation as the plan file of another reports it."""
    return Uniform(
        format=scheme.format,
        rounding=finish(scheme.format, problem.profile.units[0].dtype),
        bytes=problem.nbytes(allocation),
        predicted_nll=problem.loss(allocation),
        measured=measured,
    )


def uniform_plan(session: Session, format: str, rounding: str | None = None, distilled: bool = False) -> Plan:
    """The plan that gives every unit one format. Raises UnknownFormat, FormatUnavailable, UsageError."""
    row = format_named(format)
    if reason := row.unavailable():
        raise FormatUnavailable(f"{row.name} cannot run here: {reason}")
    refuse_misfit(rounding, [row])
    scheme = QuantScheme(row.name, rounding_for(row, rounding))
    return assemble(
        [unit_entry(unit) for unit in session.graph.units],
        [unquantized_entry(tensor) for tensor in session.graph.unquantized],
        session.provenance,
        lambda unit: row.name,
        Finish(rounding, distilled),
        f"uniform {scheme}{', distilled' if distilled else ''}",
        "uniform",
    )


def refinished(plan: Plan, rounding: str | None, distilled: bool | None) -> Plan:
    """The plan with its codes made in another way, where that is requested, and without the old ones' measurements.

    Raises UsageError for a rounding that none of its formats has.
    """
    if (rounding is None and distilled is None) or not plan.packed:
        return plan
    refuse_misfit(rounding, [FORMATS[unit.format] for unit in plan.packed])
    finish = Finish(rounding, plan.distilled if distilled is None else distilled)
    units = tuple(
        unit
        if unit.is_native or rounding is None
        else unit.model_copy(update={"rounding": finish(unit.format, unit.dtype)})
        for unit in plan.units
    )
    made = plan.model_copy(update={"units": units, "distilled": finish.distilled and bool(plan.packed)})
    same = made.units == plan.units and made.distilled == plan.distilled
    return plan if same else made.model_copy(update={"measured": None, "uniform": None})


def parse_formats(text: str | None, default: Sequence[str]) -> tuple[str, ...]:
    """Full names from a list with commas. Raises UnknownFormat."""
    names = [name.strip() for name in text.split(",") if name.strip()] if text else default
    if not names:
        raise UsageError(f"--formats {text!r} names none; `bitplan formats` lists them")
    return tuple(dict.fromkeys(format_named(name).name for name in names))


def is_float(format: str) -> bool:
    return isinstance(FORMATS[format], FloatFormat)
