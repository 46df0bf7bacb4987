"""A budget in bytes: as it was requested, or what a device's memory leaves for weights after KV cache, workspace and
reserve.

May import: formats, search, sensitivity, planner.plan, the modules beside it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from bitplan.formats.errors import BitplanError, BudgetInfeasible, FormatUnavailable, UsageError
from bitplan.formats.kernels.dispatch import Machine, machine
from bitplan.formats.kv.cache import new_cache
from bitplan.formats.kv.rows import kv_format_named
from bitplan.formats.sizes import format_bytes, parse_size
from bitplan.formats.table import DTYPES
from bitplan.planner.memory.device import Device, free_memory
from bitplan.planner.memory.footprint import MemoryEstimate, estimate_memory, meta_model
from bitplan.planner.plan import Budget, Plan, Workload
from bitplan.search.knapsack import floor
from bitplan.search.problem import Problem, refuse_infeasible
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import UnitEntry
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.source import Source

CONTEXT = 4096
"""Tokens of context that a device is budgeted for by default, or what the model takes where that is less."""
RESERVE = 0.02
"""Part of the device's memory that is not used by default: for fragmentation."""


def refuse_unclear(given: dict[str, object]) -> list[str]:
    """The one option that names the budget. Raises UsageError for none, or more than one."""
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        *names, last = given
        raise UsageError(f"give the budget once, by {', '.join(names)} or {last}; given: {', '.join(named) or 'none'}")
    return named


def budget_bytes(size: str | None, bpw: float | None, fraction: float | None, parameters: int) -> tuple[int, str]:
    """The budget in bytes and how it was requested; exactly one of the three must be given.

    `bpw` is bits per weight over all parameters, `fraction` a part of 2 bytes per parameter. Raises UsageError.
    """
    (option,) = refuse_unclear({"--budget": size, "--bpw": bpw, "--fraction": fraction})
    if size is not None:
        return parse_size(size), size
    value = bpw if bpw is not None else fraction
    assert value is not None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{option} {value} is no budget: it must be a number above zero")
    if bpw is not None:
        return int(bpw * parameters / 8), f"{bpw:g} bits per weight"
    return int(value * 2 * parameters), f"{value:g} of the bf16 size"


@dataclass(frozen=True)
class DeviceBudget:
    """A device's memory in its terms. Bytes."""

    device: Device
    reserve: int
    workload: Workload
    estimate: MemoryEstimate
    """Of what lies beside the weights, in the formats that need most."""

    @property
    def weights(self) -> int:
        """What is left for weights; below zero where nothing is."""
        return self.device.memory - self.estimate.kv_cache - self.workspace - self.reserve

    @property
    def workspace(self) -> int:
        return self.estimate.workspace + self.device.context

    @property
    def requested(self) -> str:
        w = self.workload
        return f"{self.device.requested} with {w.context:,} tokens of context × {w.batch}, KV cache {w.kv_format}"

    def budget(self) -> Budget:
        """As the plan file has it. Raises BudgetInfeasible where nothing is left for weights."""
        if self.weights <= 0:
            raise BudgetInfeasible(f"{self.requested}: nothing is left for weights")
        return Budget(
            requested=self.requested,
            weights=self.weights,
            device=self.device.memory,
            kv_cache=self.estimate.kv_cache,
            workspace=self.workspace,
            reserve=self.reserve,
        )


def meta_models(
    source: Source, dtype: str, units: Iterable[UnitEntry], formats: Iterable[str]
) -> list[PreTrainedModel]:
    """The model on the meta device, as the checkpoint has it and with all units in each of the formats but their own
    type."""
    entries = list(units)
    packed = ([(entry, name) for entry in entries if DTYPES[entry.dtype] != name] for name in formats)
    return [meta_model(source, dtype, pairs) for pairs in ([], *filter(None, packed))]


def largest_estimate(estimates: Iterable[MemoryEstimate]) -> MemoryEstimate:
    """The most of each term."""
    terms = zip(*((each.kv_cache, each.prefill, each.decode) for each in estimates), strict=True)
    return MemoryEstimate(*map(max, terms))


def reserved(device: Device, reserve: str | None) -> int:
    """Bytes of a device that are not used, as `--reserve` gives them. Raises UsageError."""
    return int(RESERVE * device.memory) if reserve is None else parse_size(reserve)


def requested_workload(
    source: Source, kv_format: str, context: int | None, batch: int, prefill_chunk: int, exactly: bool
) -> Workload:
    """The workload that a command asks for; unless `exactly`, a context beyond the model's longest is cut to that.

    Raises UsageError, UnknownFormat, FormatUnavailable.
    """
    for name, value in (("context", context), ("batch", batch), ("prefill-chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: it must be 1 or more")
    if context is not None and (longest := sources.block_length(source, context)) < context:
        if exactly:
            raise UsageError(f"--context {context}: {source.model} takes at most {longest} tokens")
        context = longest
    if kv_format_named(kv_format) is not None:
        new_cache(sources.transformers_config(source), kv_format, 1, 8)
    if context is None:
        return Workload(kv_format=kv_format)
    return Workload(kv_format=kv_format, context=context, batch=batch, prefill_chunk=min(prefill_chunk, context))


def device_budget(
    device: Device,
    reserve: str | None,
    source: Source,
    problem: Problem,
    workload: Workload,
    report: Callable[[DeviceBudget], None],
) -> Budget:
    """What a device leaves for weights; `report` gets its terms first. Raises BudgetInfeasible with what would fit."""
    profile = problem.profile
    names = sorted({option.scheme.format for options in problem.options.values() for option in options})
    models = meta_models(source, profile.provenance.model.dtype, profile.units, names)
    estimates = [
        estimate_memory(model, workload, device.on) for model in progress(models, desc="memory", unit="format")
    ]
    found = DeviceBudget(device, reserved(device, reserve), workload, largest_estimate(estimates))
    report(found)
    try:
        budget = found.budget()
        refuse_infeasible(problem, budget.weights, f"{budget.requested}: what is left for weights")
    except BudgetInfeasible as error:
        least = floor(problem.options) + profile.unquantized_bytes
        raise BudgetInfeasible(f"{error}; {what_fits(found, least, models, estimates)}") from None
    return budget


def plan_memory(plan: Plan, source: Source, on: Machine, workload: Workload | None = None) -> MemoryEstimate:
    """What a planned model needs beside its weights, by default with the workload that it was budgeted for.

    Raises UsageError for a workload without a context.
    """
    workload = workload or plan.workload
    if workload.context is None:
        raise UsageError("the plan is budgeted for no context: give one with --context")
    packed = [(unit, unit.format) for unit in plan.packed]
    return estimate_memory(meta_model(source, plan.provenance.model.dtype, packed), workload, on)


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number under `limit` that fits, to 1/256 of it; 0 where none does."""
    low, high = 0, limit
    while high - low > max(limit // 256, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def what_fits(
    found: DeviceBudget, least: int, models: Sequence[PreTrainedModel], estimates: Sequence[MemoryEstimate]
) -> str:
    """What to change where a device has fewer bytes for weights than `least`: which term is the biggest, and what would
    fit. `estimates` are the models' in the device's workload."""
    terms = {
        "the KV cache": found.estimate.kv_cache,
        "the workspace": found.workspace,
        "the reserve": found.reserve,
        "the least for weights": least,
    }
    biggest = max(terms, key=lambda term: terms[term])
    sizes = ", ".join(f"{term} takes {format_bytes(size)}" for term, size in terms.items())

    different = dict(zip(estimates, models, strict=True))
    largest_models = [different[each] for each in sorted(different, key=lambda each: each.workspace)[-2:]]
    rest = found.device.memory - found.device.context - found.reserve - least

    def fits(change: dict[str, int | str]) -> bool:
        if rest <= 0:  # not even a cache of no tokens
            return False
        workload = found.workload.model_copy(update=change)
        try:
            most = largest_estimate(estimate_memory(model, workload, found.device.on) for model in largest_models)
            return most.kv_cache + most.workspace <= rest
        except FormatUnavailable:  # a KV format that the model's cache cannot have
            return False

    ways = []
    context, chunk = found.workload.context, found.workload.prefill_chunk
    assert context is not None and chunk is not None
    if longest := largest(context, lambda value: fits({"context": value})):
        ways.append(f"--context {longest}")
    if widest := largest(found.workload.batch, lambda value: fits({"batch": value})):
        ways.append(f"--batch {widest}")
    if found.workload.kv_format == "native":
        ways += [f"--kv-dtype {name}" for name in ("int8", "int4") if fits({"kv_format": name})]
    if chunk > 64 and fits({"prefill_chunk": 64}):
        ways.append("--prefill-chunk 64")
    ways.append(f"a device with {format_bytes(least - found.weights)} more")
    return (
        f"of {format_bytes(found.device.memory)}, {sizes}: {biggest} is the biggest term; what would fit:"
        f" {', or '.join(ways)}"
    )


def refuse_full(plan: Plan, source: Source, device: str) -> None:
    """Raises BitplanError where a device has less free than a plan needs with the workload it was budgeted for."""
    terms = {"weights": plan.bytes, "KV cache": plan.budget.kv_cache or 0, "workspace": plan.budget.workspace or 0}
    free, needed = free_memory(device), sum(terms.values())
    if free >= needed:
        return
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms.items() if size)
    ways = ["make a plan for a smaller budget"]
    if plan.workload.context is not None:
        model = meta_model(source, plan.provenance.model.dtype, [(unit, unit.format) for unit in plan.packed])

        def fits(context: int) -> bool:
            workload = plan.workload.model_copy(update={"context": context})
            estimate = estimate_memory(model, workload, machine(device))
            return plan.bytes + estimate.kv_cache + estimate.workspace <= free

        if context := largest(plan.workload.context, fits):
            ways.append(f"for --context {context}")
    raise BitplanError(
        f"{device} has {format_bytes(free)} free and the plan needs {format_bytes(needed)} ({sizes}),"
        f" {format_bytes(needed - free)} more: {', or '.join(ways)}"
    )
