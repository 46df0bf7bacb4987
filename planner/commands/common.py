"""Parsing and output shared by several commands. May import: everything."""

import json
import re
import sys
from argparse import Namespace
from functools import partial
from typing import Any

from bitplan.formats.errors import FormatUnavailable, UsageError, printable
from bitplan.formats.rounding import refuse_misfit
from bitplan.formats.sizes import parse_size
from bitplan.formats.table import DEFAULT_FORMATS, FORMATS
from bitplan.planner.assemble import parse_formats
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.tasks.task import Task, read_task
from bitplan.sensitivity.texts.read import default_texts, has_written, read_texts
from bitplan.sensitivity.texts.text import DEFAULT_SOURCE, Texts

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_in(option: str, text: str) -> int:
    """Raises UsageError for what is no duration."""
    if not (found := re.fullmatch(r"(\d+)([dhms])", text)):
        raise UsageError(f"{option} {text!r} is no duration: write a number and a unit, as 30d, 12h, 45m or 90s")
    return int(found[1]) * SECONDS[found[2]]


def emit(arguments: Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, allow_nan=False) if arguments.json else printable(text))


def log(text: str) -> None:
    print(printable(text), file=sys.stderr)


def texts_of(arguments: Namespace, source: Source) -> Texts:
    """Of the options; by default what the model writes itself, where it is in memory whole and can write."""
    _refuse_unclear_text(arguments)
    read = default_texts if samples(arguments) else partial(read_texts, sampled=arguments.sample)
    texts = read(
        source,
        files=arguments.text,
        dataset=arguments.dataset,
        heldout=arguments.heldout,
        device=arguments.device,
        tokens=arguments.tokens,
        length=arguments.block,
    )
    parts = {name: getattr(texts, name).ids.shape for name in ("calibration", "search", "heldout")}
    sizes = ", ".join(f"{name} {count} × {length} tokens" for name, (count, length) in parts.items())
    log(f"text: {texts.source}: {sizes}")
    if texts.source == DEFAULT_SOURCE:
        log("text of the kind that the model reads (--text) loses less")
    found, length = texts.calibration.ids.numel(), texts.calibration.ids.shape[1]
    if found < arguments.tokens // length * length:
        log(f"the text has {found:,} calibration tokens, fewer than the {arguments.tokens:,} requested")
    return texts


def _refuse_unclear_text(arguments: Namespace) -> None:
    if arguments.block < 8:
        raise UsageError(f"--block {arguments.block}: it must be at least 8 tokens")
    if sum(map(bool, (arguments.text, arguments.dataset, arguments.sample))) > 1:
        raise UsageError("give one of --text, --dataset and --sample")


def memory_of(arguments: Namespace) -> int | None:
    """Bytes of --max-memory. Raises UsageError beside what holds a whole model in full precision."""
    if arguments.max_memory is None:
        return None
    whole = [f"--{name}" for name in ("sample", "task", "heal") if getattr(arguments, name, None)]
    whole += ["--kv-dtype"] if getattr(arguments, "kv_dtype", "native") != "native" else []
    if whole:
        raise UsageError(f"{whole[0]} runs the whole model in memory: leave it or --max-memory out")
    return parse_size(arguments.max_memory)


def samples(arguments: Namespace) -> bool:
    """Whether the model is to write the text: none was named, and the model is in memory whole."""
    return not (arguments.text or arguments.dataset or arguments.sample or getattr(arguments, "max_memory", None))


def has_texts(arguments: Namespace, source: Source) -> bool:
    """Whether `texts_of` need not let the model write first."""
    _refuse_unclear_text(arguments)
    writes = arguments.sample or samples(arguments)
    return not writes or has_written(source, arguments.tokens, arguments.block, arguments.device)


def candidate_formats(arguments: Namespace) -> tuple[str, ...]:
    candidates = parse_formats(arguments.formats, DEFAULT_FORMATS)
    refuse_misfit(arguments.rounding, [FORMATS[name] for name in candidates])
    for name in candidates:
        if reason := FORMATS[name].unavailable():
            raise FormatUnavailable(f"{name} cannot run here: {reason}")
    return candidates


def tasks_of(arguments: Namespace, source: Source) -> list[Task]:
    if arguments.limit is not None and not arguments.task:
        raise UsageError("--limit is the number of items of a task: give --task too")
    if not arguments.task:
        return []
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit {arguments.limit}: it must be 1 or more")
    tokenizer, length = sources.load_tokenizer(source), sources.block_length(source, 1 << 20)
    tasks = [read_task(name, tokenizer, length, arguments.limit) for name in arguments.task]
    for task in tasks:
        if task.note:
            log(task.note)
    return tasks
