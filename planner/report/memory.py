"""A device's memory as tables. May import: formats, planner.memory, planner.report.tables."""

import torch

from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.sizes import format_bytes
from bitplan.planner.memory.budget import DeviceBudget
from bitplan.planner.memory.fit import Fit
from bitplan.planner.memory.kv_size import kv_facts
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.source import Source


def device_budget_text(budget: DeviceBudget) -> str:
    """The arithmetic from a device's memory to bytes for weights."""
    terms = [
        (budget.requested, budget.device.memory),
        ("KV cache", -budget.estimate.kv_cache),
        ("workspace: activations, logits, dequantized tiles", -budget.estimate.workspace),
        ("workspace: CUDA context", -budget.device.context),
        ("reserve", -budget.reserve),
        ("left for weights", budget.weights),
    ]
    rows = [(name, f"{size:,}", f"{'-' if size < 0 else ''}{format_bytes(abs(size))}") for name, size in terms if size]
    return table(("", "bytes", ""), rows)


def kv_cache_text(source: Source, dtype: str) -> str:
    """What the KV cache holds, layer by layer."""
    try:
        facts = kv_facts(sources.transformers_config(source), getattr(torch, dtype))
    except FormatUnavailable as reason:
        return f"KV cache: sized by a run of the model; {reason}"
    heads = "/".join(map(str, facts.kv_heads))
    sizes = ", ".join(f"{key} + {value}" for key, value in facts.head_sizes)
    layers = f"KV cache: {facts.attention_layers} layers × {heads} KV heads × ({sizes}) values a token"
    return "; ".join([layers, *facts.notes])


def fit_text(found: Fit) -> str:
    """What fills the device, a row a format."""
    rows = []
    for row in found.rows:
        name = f"{row.format}, unquantized" if row.format == found.native else row.format
        name += ", the least" if row is found.rows[-1] else ""
        terms = (row.weights, row.estimate.kv_cache, row.workspace, row.budget.reserve, row.total)
        verdict = f"fits, {format_bytes(row.spare)} spare" if row.spare >= 0 else f"{format_bytes(-row.spare)} too much"
        rows.append((name, *(f"{size:,}" for size in terms), verdict))
    head = ("bytes", "weights", "KV cache", "workspace", "reserve", "sum", f"of {found.budget.device.memory:,}")
    context = found.budget.device.context
    note = f"; the workspace includes {format_bytes(context)} of CUDA context" if context else ""
    return "\n".join([f"{found.budget.requested}{note}", table(head, rows)])
