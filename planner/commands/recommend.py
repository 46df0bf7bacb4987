"""`bitplan recommend`. May import: everything."""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from bitplan.formats.errors import ModelUnreadable, UsageError
from bitplan.planner.commands.arguments import build_parser
from bitplan.planner.commands.common import emit, has_texts, texts_of
from bitplan.planner.evaluate.recommend import PURPOSES, recommend
from bitplan.planner.memory.budget import CONTEXT, requested_workload
from bitplan.planner.memory.device import find_device
from bitplan.planner.memory.fit import find_shape, fit
from bitplan.planner.report.comparison import advice_text
from bitplan.planner.report.memory import fit_text
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.store import cache_folder

TEXT = ("text", "dataset", "sample", "heldout", "tokens", "block")
DEVICE = ("gpu", "context", "batch", "kv_dtype", "prefill_chunk", "reserve")
"""Options of the text and of a device, as `_typed` says them again."""


def run(arguments: Namespace) -> None:
    if arguments.purpose not in PURPOSES:
        raise UsageError(f"--for {arguments.purpose!r}: there are {', '.join(PURPOSES)}")
    model, asks = shlex.quote(arguments.model), ("trust_remote_code", *TEXT, "device")
    if arguments.purpose != "fit":
        if typed := _typed(arguments, DEVICE):
            raise UsageError(f"{typed.split()[0]} belongs to --for fit")
        source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
        # Nothing was measured on text that the model has not written.
        texts = texts_of(arguments, source) if arguments.purpose == "training" or has_texts(arguments, source) else None
        advice = recommend(source, arguments.purpose, texts, arguments.device)
        to_measure = advice.to_measure(model, _typed(arguments, asks))
        emit(arguments, advice.as_dict(), advice_text(advice, to_measure, model))
        return
    if arguments.gpu is None:
        raise UsageError("--for fit asks what fits a device: name it by --gpu 24GiB, or --gpu auto for the one here")
    found = find_device(arguments.gpu, arguments.device)
    source = find_shape(arguments.model, arguments.trust_remote_code)
    requested = CONTEXT if arguments.context is None else arguments.context
    workload = requested_workload(
        source, arguments.kv_dtype, requested, arguments.batch, arguments.prefill_chunk, arguments.context is not None
    )
    fitted = fit(found, arguments.reserve, source, workload)
    texts = None
    if source.files and any(cache_folder().glob("*/compared/*.json")) and has_texts(arguments, source):
        with suppress(ModelUnreadable):  # without a tokenizer nothing was measured
            texts = texts_of(arguments, source)
    advice = recommend(source, "fit", texts, arguments.device)
    plan = f"bitplan plan {model}{_typed(arguments, (*DEVICE, *asks))} -o plan.json"
    command = fitted.command(plan)
    notes = ((f"make it: {command}",) if command else ()) + advice.notes
    advice = replace(advice, format=fitted.format or "none", why=fitted.answer, notes=notes)
    advised = advice_text(advice, advice.to_measure(model, _typed(arguments, asks)), model)
    emit(arguments, {**advice.as_dict(), **fitted.as_dict(plan)}, f"{fit_text(fitted)}\n{advised}")


def _typed(arguments: Namespace, names: Sequence[str]) -> str:
    """Options as they were given, those at their defaults left out."""
    plain = build_parser().parse_args([arguments.command, arguments.model, "--for", arguments.purpose])
    words = [""]
    for name in names:
        value = getattr(arguments, name)
        if value != getattr(plain, name):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(shlex.quote, map(str, values))]
    return " ".join(words)
