"""A device's memory → bytes for weights: what is left of it after KV cache, workspace and reserve.

May import: formats, sensitivity, planner.budget/plan/session/workspace.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from formats.errors import BitplanError, BudgetInfeasible, UsageError
from formats.kernels import Machine, machine
from planner.budget import human, parse_size
from planner.plan import Budget, KVCache, Plan
from planner.session import pick_device
from planner.workspace import Needs, Setting, foresee, meta_model
from sensitivity.profile import UnitEntry
from sensitivity.source import Source

CUDA_CONTEXT = 512 << 20
"""Bytes that a process's CUDA context and kernels take before the first tensor: an allowance, used where the memory is
named; a GPU that is asked has it in use already."""
RESERVE = 0.02
"""Part of the device's memory that is left alone, unless told otherwise: for fragmentation."""


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


@dataclass(frozen=True)
class Room:
    """What a model needs beside its weights on a device, in whichever of the formats needs most."""

    device: Device
    reserve: int
    setting: Setting
    needs: Needs

    @property
    def weights(self) -> int:
        return self.device.memory - self.needs.kv_cache - self.workspace - self.reserve

    @property
    def workspace(self) -> int:
        return self.needs.workspace + self.device.taken

    def budget(self) -> Budget:
        """Raises BudgetInfeasible where nothing is left for weights."""
        if self.weights <= 0:
            raise BudgetInfeasible(f"{self.described}: nothing is left for weights")
        return Budget(
            asked=self.described,
            weights=self.weights,
            device=self.device.memory,
            kv_cache=self.needs.kv_cache,
            workspace=self.workspace,
            reserve=self.reserve,
        )

    @property
    def described(self) -> str:
        s = self.setting
        return f"{self.device.asked} with {s.context:,} tokens of context × {s.batch}, KV cache {s.kv_format}"


def alike(source: Source, dtype: str, units: Iterable[UnitEntry], formats: Iterable[str]) -> list[PreTrainedModel]:
    """The model on the meta device, as the checkpoint has it and with all units in each of the formats."""
    entries = list(units)
    return [
        meta_model(source, dtype, packed)
        for packed in ([], *([(entry, name) for entry in entries] for name in formats))
    ]


def most_needs(models: Iterable[PreTrainedModel], setting: Setting, on: Machine) -> Needs:
    """What the neediest of the models needs beside its weights."""
    found = [foresee(model, setting, on) for model in models]
    return Needs(*(max(getattr(needs, term) for needs in found) for term in ("kv_cache", "prefill", "decode")))


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


def what_fits(room: Room, least: int, models: list[PreTrainedModel]) -> str:
    """The way out, where a room has fewer bytes for weights than `least`: which term is too big, and what would fit."""
    terms = {
        "the KV cache": room.needs.kv_cache,
        "the workspace": room.workspace,
        "the reserve": room.reserve,
        "the weights at their fewest bits": least,
    }
    biggest = max(terms, key=lambda term: terms[term])
    told = f"of {human(room.device.memory)}, {', '.join(f'{term} takes {human(size)}' for term, size in terms.items())}"

    on = room.device.on
    neediest = sorted(models, key=lambda model: foresee(model, room.setting, on).workspace)[-2:]

    def fits(setting: Setting) -> bool:
        return replace(room, setting=setting, needs=most_needs(neediest, setting, on)).weights >= least

    ways = []
    for what, asked in (("context", room.setting.context), ("batch", room.setting.batch)):
        if found := _largest(asked, lambda value, what=what: fits(_changed(room.setting, **{what: value}))):  # type: ignore[misc]
            ways.append(f"--{what} {found}")
    others = {"--kv-dtype int8": {"kv_format": "int8"}, "--kv-dtype int4": {"kv_format": "int4"}}
    for said, change in (others | {"--prefill-chunk 64": {"chunk": 64}}).items():
        tried = _changed(room.setting, **change)
        if room.setting.chunk > tried.chunk or room.setting.kv_format == "native" != tried.kv_format:
            ways += [said] if fits(tried) else []
    ways.append(f"a device with {human(least - room.weights)} more")
    return f"{told}: {biggest} is the biggest term; what would fit: {', or '.join(ways)}"


def _changed(setting: Setting, **change: Any) -> Setting:
    return Setting(**asdict(setting) | change)


def _largest(asked: int, fits: Callable[[int], bool]) -> int:
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
    told = ", ".join(f"{name} {human(size)}" for name, size in terms.items() if size)
    way_out = "make a plan for a smaller budget"
    setting = setting_of(plan.kv_cache)
    if setting is not None:
        model = meta_model(source, plan.provenance.model.dtype, [(unit, unit.format) for unit in plan.packed])

        def fits(context: int) -> bool:
            needs = foresee(model, _changed(setting, context=context), machine(device))
            return plan.bytes + needs.kv_cache + needs.workspace <= free

        context = _largest(setting.context, fits)
        way_out += f", or for --context {context}" if context else ""
    raise BitplanError(
        f"{device} has {human(free)} free and the plan needs {human(needed)} ({told}), {human(needed - free)} more:"
        f" {way_out}"
    )
