"""Parts that several pages have: the title, provenance, unquantized tensors.

May import: planner.report, sensitivity.profile.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath

from bitplan.planner.report.page.render import PageTable
from bitplan.planner.report.tables import NUMBER
from bitplan.sensitivity.profile import Provenance, UnquantizedEntry


def model_name(id: str) -> str:
    """The last part of a hub id or of a folder's path."""
    return PurePath(id).name or id


def number(value: float) -> str:
    """Four digits, for a table: 0.01234, 1.234e-06."""
    return f"{value:.4g}"


def provenance(facts: Provenance) -> dict[str, str]:
    model, text = facts.model, facts.text
    parts = {"calibration": text.calibration, "search": text.search, "held-out": text.heldout}
    parts |= {"healing": text.healing} if text.healing else {}
    named = {"model": model.id if model.revision else model_name(model.id)}
    if model.revision:
        named["revision"] = model.revision
    return named | {
        "weights": f"{model.parameters:,} parameters in {model.dtype}, sha256 {model.weights_sha256}",
        "text": text.source,
        **{
            f"{name} text": f"{part.blocks} × {part.length} tokens, sha256 {part.sha256}"
            for name, part in parts.items()
        },
        "seed": str(facts.seed),
        "device": facts.device,
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }


def unquantized(kept: Iterable[UnquantizedEntry]) -> PageTable:
    """Tensors that stay as the checkpoint has them, layers folded."""
    folded: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for entry in kept:
        shape = " × ".join(map(str, entry.shape))
        folded[NUMBER.sub("*", entry.name), entry.reason, entry.dtype, shape].append(entry.bytes)
    rows = [
        (name, reason, dtype, shape, str(len(sizes)), f"{sum(sizes):,}")
        for (name, reason, dtype, shape), sizes in folded.items()
    ]
    head = ("tensor", "why", "type", "shape", "tensors", "bytes")
    total = sum(sum(sizes) for sizes in folded.values())
    note = f"{sum(map(len, folded.values()))} tensors, {total:,} bytes, counted in every figure on this page."
    return PageTable("Unquantized tensors", head, rows, left=4, note=note)
