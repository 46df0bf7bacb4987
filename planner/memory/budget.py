"""A device's memory → bytes for weights: what is left of it after KV cache, workspace and reserve.

May import: formats, search, sensitivity, planner.budget/choose/device/plan/show/workspace.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedModel

from bitplan.formats.errors import BudgetInfeasible, FormatUnavailable, UsageError
from bitplan.formats.kv.cache import kv_format_named, new_cache
from bitplan.formats.sizes import format_bytes, parse_size
from bitplan.formats.table import DTYPES
from bitplan.planner.memory.device import Device, changed, largest, setting_of
from bitplan.planner.memory.footprint import Needs, Setting, foresee, meta_model
from bitplan.planner.memory.kv_size import kv_facts
from bitplan.planner.plan import Budget, KVCache
from bitplan.planner.report.show import table
from bitplan.search.knapsack import floor
from bitplan.search.problem import Menu, refuse_infeasible
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import UnitEntry
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.source import Source

CONTEXT = 4096
"""Tokens of context that a device is budgeted for unless told otherwise, or what the model takes where that is less."""
RESERVE = 0.02
"""Part of the device's memory that is left alone, unless told otherwise: for fragmentation."""


def refuse_unclear(given: dict[str, object]) -> list[str]:
    """The one way in which the budget was said. Raises UsageError for none, or more than one."""
    said = [name for name, value in given.items() if value is not None]
    if len(said) != 1:
        *names, last = given
        raise UsageError(f"say the budget once, by {', '.join(names)} or {last}; given: {', '.join(said) or 'none'}")
    return said


def budget_bytes(size: str | None, bpw: float | None, fraction: float | None, parameters: int) -> tuple[int, str]:
    """The budget in bytes and how it was said; exactly one of the three must be given.

    `bpw` is bits per weight over all parameters, `fraction` a part of 2 bytes per parameter. Raises UsageError.
    """
    said = refuse_unclear({"--budget": size, "--bpw": bpw, "--fraction": fraction})
    if size is not None:
        return parse_size(size), size
    value = bpw if bpw is not None else fraction
    assert value is not None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{said[0]} {value} is no budget: it must be a number above zero")
    if bpw is not None:
        return int(bpw * parameters / 8), f"{bpw:g} bits per weight"
    return int(value * 2 * parameters), f"{value:g} of the bf16 size"


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
    """The model on the meta device, as the checkpoint has it and with all units in each of the formats but their own
    type."""
    entries = list(units)
    packed = ([(entry, name) for entry in entries if DTYPES[entry.dtype] != name] for name in formats)
    return [meta_model(source, dtype, pairs) for pairs in ([], *filter(None, packed))]


def neediest(needs: Iterable[Needs]) -> Needs:
    """The most of each term."""
    terms = zip(*((each.kv_cache, each.prefill, each.decode) for each in needs), strict=True)
    return Needs(*map(max, terms))


def reserved(found: Device, reserve: str | None) -> int:
    """Bytes of a device to leave alone, as `--reserve` says them. Raises UsageError."""
    return int(RESERVE * found.memory) if reserve is None else parse_size(reserve)


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
    rows = [(name, f"{size:,}", f"{'-' if size < 0 else ''}{format_bytes(abs(size))}") for name, size in terms if size]
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


def what_fits(room: Room, least: int, models: Sequence[PreTrainedModel], needs: Sequence[Needs]) -> str:
    """The way out, where a room has fewer bytes for weights than `least`: which term is too big, and what would fit.
    `needs` are the models' in the room's setting."""
    terms = {
        "the KV cache": room.needs.kv_cache,
        "the workspace": room.workspace,
        "the reserve": room.reserve,
        "the least for weights": least,
    }
    biggest = max(terms, key=lambda term: terms[term])
    told = f"of {format_bytes(room.device.memory)}, {', '.join(f'{term} takes {format_bytes(size)}' for term, size in terms.items())}"

    different = dict(zip(needs, models, strict=True))
    hungriest = [different[each] for each in sorted(different, key=lambda each: each.workspace)[-2:]]
    rest = room.device.memory - room.device.taken - room.reserve - least

    def fits(setting: Setting) -> bool:
        if rest <= 0:  # not even a cache of no tokens
            return False
        try:
            most = neediest(foresee(model, setting, room.device.on) for model in hungriest)
            return most.kv_cache + most.workspace <= rest
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
    ways.append(f"a device with {format_bytes(least - room.weights)} more")
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
    needs = [foresee(model, setting, found.on) for model in progress(models, desc="memory", unit="format")]
    room = Room(found, reserved(found, reserve), setting, neediest(needs))
    say(room_text(room))
    say(_cache_text(source, menu.profile.provenance.model.dtype))
    try:
        budget = room.budget()
        refuse_infeasible(menu, budget.weights, budget.asked)
    except BudgetInfeasible as error:
        least = floor(menu.problem) + menu.profile.kept_bytes
        raise BudgetInfeasible(f"{error}; {what_fits(room, least, models, needs)}") from None
    return budget
