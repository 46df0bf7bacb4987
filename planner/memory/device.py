"""A device: what it is, what it has free, and whether a plan fits it.

May import: formats, sensitivity, planner.budget/plan/session/workspace.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitplan.formats.errors import BitplanError, UsageError
from bitplan.formats.kernels.dispatch import Machine, machine
from bitplan.formats.sizes import format_bytes, parse_size
from bitplan.planner.memory.footprint import Needs, Setting, foresee, meta_model
from bitplan.planner.plan import KVCache, Plan
from bitplan.sensitivity.session import pick_device
from bitplan.sensitivity.source import Source

CUDA_CONTEXT = 512 << 20
"""Bytes that a process's CUDA context and kernels take before the first tensor: an allowance, used where the memory is
named; a GPU that is asked has it in use already."""


@dataclass(frozen=True)
class Device:
    asked: str
    memory: int
    """Bytes of the whole, or of what is free."""
    taken: int
    """Bytes of it that are gone before the model comes."""
    on: Machine


def find_device(gpu: str, device: str) -> Device:
    """The device of `--gpu SIZE` or `--gpu auto`. Raises UsageError where there is none to ask."""
    if gpu != "auto":
        on = machine(pick_device(device)) if device != "auto" or torch.cuda.is_available() else Machine("cuda", (9, 0))
        return Device(f"a device of {gpu}", parse_size(gpu), 0 if on.kind == "cpu" else CUDA_CONTEXT, on)
    device = pick_device(device)
    if not device.startswith("cuda"):
        raise UsageError("--gpu auto asks the GPU, and there is none here: name its memory, as --gpu 24GiB")
    name = torch.cuda.get_device_name(device)
    return Device(f"what is free on {name}", free_memory(device), 0, machine(device))


def free_memory(device: str) -> int:
    """Bytes that a process can still have there."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":") for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024


def plan_needs(plan: Plan, source: Source, on: Machine, setting: Setting | None = None) -> Needs:
    """What a planned model needs beside its weights, by default in the setting that it was budgeted for."""
    setting = setting or setting_of(plan.kv_cache)
    if setting is None:
        raise UsageError("the plan is budgeted for no context: say one with --context")
    packed = [(unit, unit.format) for unit in plan.packed]
    return foresee(meta_model(source, plan.provenance.model.dtype, packed), setting, on)


def setting_of(kv_cache: KVCache) -> Setting | None:
    if kv_cache.context is None or kv_cache.chunk is None:
        return None
    return Setting(kv_cache.context, kv_cache.batch, kv_cache.chunk, kv_cache.format)


def changed(setting: Setting, **change: Any) -> Setting:
    return Setting(**asdict(setting) | change)


def largest(asked: int, fits: Callable[[int], bool]) -> int:
    """The largest number under `asked` that fits, to 1/256 of it; 0 where none does."""
    low, high = 0, asked
    while high - low > max(asked // 256, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def refuse_full(plan: Plan, source: Source, device: str) -> None:
    """Raises BitplanError where a device has less free than a plan needs with what it was budgeted for."""
    terms = {"weights": plan.bytes, "KV cache": plan.budget.kv_cache or 0, "workspace": plan.budget.workspace or 0}
    free, needed = free_memory(device), sum(terms.values())
    if free >= needed:
        return
    told = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms.items() if size)
    way_out = "make a plan for a smaller budget"
    setting = setting_of(plan.kv_cache)
    if setting is not None:
        model = meta_model(source, plan.provenance.model.dtype, [(unit, unit.format) for unit in plan.packed])

        def fits(context: int) -> bool:
            needs = foresee(model, changed(setting, context=context), machine(device))
            return plan.bytes + needs.kv_cache + needs.workspace <= free

        context = largest(setting.context, fits)
        way_out += f", or for --context {context}" if context else ""
    raise BitplanError(
        f"{device} has {format_bytes(free)} free and the plan needs {format_bytes(needed)} ({told}), {format_bytes(needed - free)} more:"
        f" {way_out}"
    )
