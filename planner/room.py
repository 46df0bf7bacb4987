"""A device's memory → bytes for weights: what is left of it after KV cache, workspace and reserve.

May import: formats, search, sensitivity, planner.budget/choose/device/plan/show/workspace.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, PreTrainedModel

from formats.errors import BudgetInfeasible, FormatUnavailable, UsageError
from formats.kernels import Machine
from formats.kv_cache import kv_format_named, new_cache
from formats.kv_facts import kv_facts
from planner.budget import human, parse_size
from planner.choose import Menu, refuse_infeasible
from planner.device import Device, changed, largest, setting_of
from planner.plan import Budget, KVCache
from planner.show import table
from planner.workspace import Needs, Setting, foresee, meta_model
from search.knapsack import floor
from sensitivity import source as sources
from sensitivity.profile import UnitEntry
from sensitivity.progress import progress
from sensitivity.source import Source

CONTEXT = 4096
"""Tokens of context that a device is budgeted for unless told otherwise, or what the model takes where that is less."""
RESERVE = 0.02
"""Part of the device's memory that is left alone, unless told otherwise: for fragmentation."""


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


def room_text(room: Room) -> str:
    """The arithmetic from a device's memory to bytes for weights."""
    terms = [
        (room.described, room.device.memory),
        ("KV cache", -room.needs.kv_cache),
        ("workspace: activations, logits, dequantized tiles", -room.needs.workspace),
        ("workspace: CUDA context", -room.device.taken),
        ("reserve", -room.reserve),
        ("left for weights", room.weights),
    ]
    rows = [(name, f"{size:,}", f"{'-' if size < 0 else ''}{human(abs(size))}") for name, size in terms if size]
    return table(("", "bytes", ""), rows)


def _cache_text(source: Source, dtype: str) -> str:
    """What the KV cache keeps, layer by layer."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    try:
        facts = kv_facts(config, getattr(torch, dtype))
    except FormatUnavailable as reason:
        return f"KV cache: as a run of it tells; {reason}"
    heads = "/".join(map(str, facts.kv_heads))
    sizes = ", ".join(f"{key} + {value}" for key, value in facts.head_sizes)
    told = f"KV cache: {facts.attention_layers} layers × {heads} KV heads × ({sizes}) values a token"
    return "; ".join([told, *facts.notes])


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
        try:
            return replace(room, setting=setting, needs=most_needs(neediest, setting, on)).weights >= least
        except FormatUnavailable:  # a KV format that the model's cache cannot have
            return False

    ways = []
    for what, asked in (("context", room.setting.context), ("batch", room.setting.batch)):
        if found := largest(asked, lambda value, what=what: fits(changed(room.setting, **{what: value}))):  # type: ignore[misc]
            ways.append(f"--{what} {found}")
    others = {"--kv-dtype int8": {"kv_format": "int8"}, "--kv-dtype int4": {"kv_format": "int4"}}
    for said, change in (others | {"--prefill-chunk 64": {"chunk": 64}}).items():
        tried = changed(room.setting, **change)
        if room.setting.chunk > tried.chunk or room.setting.kv_format == "native" != tried.kv_format:
            ways += [said] if fits(tried) else []
    ways.append(f"a device with {human(least - room.weights)} more")
    return f"{told}: {biggest} is the biggest term; what would fit: {', or '.join(ways)}"


def asked_cache(source: Source, kv_format: str, context: int | None, batch: int, chunk: int, exactly: bool) -> KVCache:
    """The KV cache as a command says it; `context` may be cut to the model's longest unless it was asked for `exactly`.

    Raises UsageError, UnknownFormat, FormatUnavailable.
    """
    for name, value in (("context", context), ("batch", batch), ("prefill-chunk", chunk)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: it must be 1 or more")
    if context is not None and (longest := sources.block_length(source, context)) < context:
        if exactly:
            raise UsageError(f"--context {context}: {source.model} takes at most {longest} tokens")
        context = longest
    if kv_format_named(kv_format) is not None:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        new_cache(config, kv_format, 1, 8)
    if context is None:
        return KVCache(format=kv_format)
    return KVCache(format=kv_format, context=context, batch=batch, chunk=min(chunk, context))


def device_budget(
    found: Device, reserve: str | None, source: Source, menu: Menu, kv_cache: KVCache, say: Callable[[str], None]
) -> Budget:
    """What a device leaves for weights; `say` is told the arithmetic. Raises BudgetInfeasible with what would fit."""
    setting = setting_of(kv_cache)
    assert setting is not None
    names = sorted({option.choice.format for options in menu.problem.values() for option in options})
    models = alike(source, menu.profile.provenance.model.dtype, menu.profile.units, names)
    left = int(RESERVE * found.memory) if reserve is None else parse_size(reserve)
    needs = most_needs(progress(models, desc="memory", unit="format"), setting, found.on)
    room = Room(found, left, setting, needs)
    say(room_text(room))
    say(_cache_text(source, menu.profile.provenance.model.dtype))
    try:
        budget = room.budget()
        refuse_infeasible(menu, budget)
    except BudgetInfeasible as error:
        least = floor(menu.problem) + menu.profile.kept_bytes
        raise BudgetInfeasible(f"{error}; {what_fits(room, least, models)}") from None
    return budget
