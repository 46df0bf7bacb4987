"""Formats and plans side by side on held-out text, one model in memory at a time.

May import: formats, sensitivity, planner.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from formats.errors import BitplanError
from formats.table import FORMATS
from planner.heal import round_missing
from planner.materialize import materialize, resident_bytes
from planner.plan import Plan
from planner.session import Session, pick_device
from planner.uniform import is_float, uniform_plan
from sensitivity import source as sources
from sensitivity.loss import Judgement, Reference
from sensitivity.source import Source


@dataclass(frozen=True)
class Line:
    """One row of the table. `note` says why a row has no figures."""

    name: str
    resident_bytes: int | None = None
    bits_per_weight: float | None = None
    times_smaller_than_fp32: float | None = None
    judgement: Judgement | None = None
    load_seconds: float | None = None
    research: bool = False
    """It has formats below 2 bits."""
    note: str | None = None

    def as_dict(self) -> dict:
        facts = asdict(self)
        judgement = facts.pop("judgement") or {}
        ppl = {"ppl": self.judgement.ppl} if self.judgement else {}
        return {**facts, **judgement, **ppl}


def load_float(source: Source, format: str, device: str) -> PreTrainedModel:
    """The whole model in fp32, bf16 or fp16, without a plan."""
    return sources.load_model(source, pick_device(device), dtype=FORMATS[format].dtype)  # type: ignore[attr-defined]


def compare(
    session: Session,
    formats: tuple[str, ...],
    plans: dict[str, Plan],
    rounding: str | None = None,
    healed: bool = False,
    device: str = "auto",
) -> Iterator[Line]:
    """Yield a line per format and plan (name → plan) as each is measured. The session's model is given up first; the
    plans' codes must be in the cache (`materialize.make_codes`).

    A row that fails for a reason of its own says so in `note`, and the others still run.
    """
    wanted: list[tuple[str, Plan | str]] = []
    for name in formats:
        try:
            row = name if is_float(name) else uniform_plan(session, name, rounding, healed)
            if isinstance(row, Plan):
                round_missing(row, session)
            wanted.append((row.budget.asked if isinstance(row, Plan) else name, row))
        except BitplanError as error:
            yield Line(name, note=str(error))
    wanted += plans.items()
    source, parameters = session.source, session.provenance.model.parameters
    reference = Reference(session.model, session.texts.heldout)
    session.give_up_model()
    for name, row in wanted:
        began = time.perf_counter()
        try:
            model = load_float(source, row, device) if isinstance(row, str) else materialize(row, source, device)
            seconds = time.perf_counter() - began
            size = resident_bytes(model)
            judgement = reference.judge(model, row.kv_cache.format if isinstance(row, Plan) else "native")
        except BitplanError as error:
            yield Line(name, note=str(error))
            continue
        research = isinstance(row, Plan) and bool(row.research)
        yield Line(name, size, size * 8 / parameters, 4 * parameters / size, judgement, seconds, research)
        del model
