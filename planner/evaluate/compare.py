"""Evaluation of formats and plans on held-out text and on tasks, one model in memory at a time.

Finished rows are cached. May import: formats, sensitivity, planner.plan, planner.assemble, planner.load,
planner.quantize, planner.evaluate.throughput.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import bitplan
from bitplan.formats.errors import BitplanError, WriteFailed
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import is_float, uniform_plan
from bitplan.planner.evaluate.throughput import Throughput, run
from bitplan.planner.load import load_planned, resident_bytes
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import Evaluation, Reference, finite, refuse_not_finite
from bitplan.sensitivity.session import Session, pick_device
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.store import locked, read_row, sha256, write_row
from bitplan.sensitivity.tasks.paired import Paired, paired
from bitplan.sensitivity.tasks.score import Scores, score
from bitplan.sensitivity.tasks.task import Task


@dataclass(frozen=True)
class TaskResult:
    """A task's figure, with its paired difference from full precision and an interval."""

    task: str
    measure: str
    """accuracy, or nats per token."""
    result: Paired


@dataclass(frozen=True)
class ComparisonRow:
    """One row of the table. `note` is the reason why a row has no figures."""

    name: str
    resident_bytes: int | None = None
    bits_per_weight: float | None = None
    times_smaller_than_fp32: float | None = None
    evaluation: Evaluation | None = None
    tasks: tuple[TaskResult, ...] = ()
    throughput: Throughput | None = None
    load_seconds: float | None = None
    research: bool = False
    """It has formats below 2 bits."""
    note: str | None = None

    @property
    def times_smaller_than_bf16(self) -> float | None:
        return self.times_smaller_than_fp32 and self.times_smaller_than_fp32 / 2

    @property
    def peak_bytes(self) -> int | None:
        """Bytes of the weights, and the peak beside them for one sequence of the held-out text's length."""
        return self.resident_bytes + self.throughput.peak_bytes if self.resident_bytes and self.throughput else None

    def as_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        evaluation, throughput = facts.pop("evaluation") or {}, facts.pop("throughput") or {}
        throughput.pop("peak_bytes", None)
        ppl = {"ppl": self.evaluation.ppl} if self.evaluation else {}
        facts["tasks"] = [{"task": t.task, "measure": t.measure, **_finite(asdict(t.result))} for t in self.tasks]
        derived = {"times_smaller_than_bf16": self.times_smaller_than_bf16, "peak_bytes": self.peak_bytes}
        return {**facts, **derived, **_finite(evaluation), **ppl, **throughput}


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: unbounded intervals have null bounds, and one block of text has a null standard error."""
    return {name: finite(value) if isinstance(value, float) else value for name, value in facts.items()}


FAILURES = (BitplanError, MemoryError, RuntimeError)
"""Errors that leave a row without figures; of RuntimeErrors only torch's out-of-memory errors."""


def why_not(error: Exception) -> str:
    """A row's failure as a sentence. Reraises errors that are not specific to a row."""
    if isinstance(error, BitplanError) and not isinstance(error, WriteFailed):
        return str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "allocate memory" in str(error):
        return "out of memory: give a smaller --block, or another --device"
    raise error


def load_float(source: Source, format: str, device: str) -> PreTrainedModel:
    """The whole model in fp32, bf16 or fp16, without a plan."""
    return sources.load_model(source, pick_device(device), dtype=FORMATS[format].dtype)  # type: ignore[attr-defined]


def compare(
    session: Session,
    formats: tuple[str, ...],
    plans: dict[str, Plan],
    rounding: str | None = None,
    distilled: bool = False,
    device: str = "auto",
    tasks: Sequence[Task] = (),
    refused: Mapping[str, str] | None = None,
) -> Iterator[ComparisonRow]:
    """Yield a line per format and plan (name → plan) as each is measured. The session's model is given up first; the
    plans' codes must be in the cache (`round_missing`), but for those `refused` (name → why).

    A row that fails for a reason of its own, memory among them, says so in `note`, and the others still run.
    """
    wanted: list[tuple[str, Plan | str]] = []
    for name in formats:
        try:
            row = name if is_float(name) else uniform_plan(session, name, rounding, distilled)
            wanted.append((row.budget.requested if isinstance(row, Plan) else name, row))
        except FAILURES as error:
            yield ComparisonRow(name, note=why_not(error))
    wanted += plans.items()
    rows = [(name, row, _journal(session, row, tasks, device)) for name, row in wanted]
    known = {journal: found for name, _, journal in rows if (found := _recalled(name, journal))}
    if all(journal in known for _, _, journal in rows):
        session.give_up_model()
        yield from (replace(known[journal], name=name) for name, _, journal in rows)
        return
    refused = dict(refused or {})
    for name, row, journal in rows:
        if isinstance(row, Plan) and row not in plans.values() and journal not in known:
            try:
                round_missing(row, session)
            except FAILURES as error:
                refused[name] = why_not(error)
    reference = Reference(session.model, session.texts.heldout)
    scores = [score(session.model, task) for task in tasks]
    session.give_up_model()
    for name, row, journal in rows:
        if journal in known:
            yield replace(known[journal], name=name)
        elif name in refused:
            yield ComparisonRow(name, note=refused[name])
        else:
            with locked(journal):  # another process may have measured it by now
                line = _recalled(name, journal) or _measured(name, row, session, device, reference, tasks, scores)
                if line.note is None:
                    write_row(journal, asdict(line))
                    if tasks:  # also without tasks, for comparisons that have none
                        write_row(_journal(session, row, (), device), asdict(replace(line, tasks=())))
            yield line


def _measured(
    name: str,
    row: Plan | str,
    session: Session,
    device: str,
    reference: Reference,
    tasks: Sequence[Task],
    scores: Sequence[Scores],
) -> ComparisonRow:
    source, parameters = session.source, session.provenance.model.parameters
    kv_format = row.workload.kv_format if isinstance(row, Plan) else "native"
    began = time.perf_counter()
    try:
        model = load_float(source, row, device) if isinstance(row, str) else load_planned(row, source, device)
        seconds, size = time.perf_counter() - began, resident_bytes(model)
        evaluation = refuse_not_finite(reference.evaluate(model, kv_format), model)
        lines = []
        for task, base in zip(tasks, scores, strict=True):
            found = score(model, task, kv_format)
            measure = "nats per token" if task.kind == "text" else "accuracy"
            lines.append(TaskResult(task.name, measure, paired(base.values, found.values)))
        throughput = run(model, reference.blocks.ids[0], kv_format)
    except FAILURES as error:
        return ComparisonRow(name, note=why_not(error))
    research = isinstance(row, Plan) and bool(row.research)
    times = 4 * parameters / size
    return ComparisonRow(
        name, size, size * 8 / parameters, times, evaluation, tuple(lines), throughput, seconds, research
    )


# Finished rows


def _journal(session: Session, row: Plan | str, tasks: Sequence[Task], device: str) -> Path:
    """The file that caches a row's figures, keyed by all that they depend on except the machine's load."""
    made = row
    if isinstance(row, Plan):
        made = repr([(unit.name, unit.format, unit.rounding) for unit in row.units]) + f"{row.distilled} {row.workload}"
    facts, device = session.provenance, pick_device(device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu {torch.get_num_threads()}"
    parts = [facts.text.part(part).sha256 for part in ("heldout", "calibration", "healing")]
    texts = [*parts, *(task.fingerprint for task in tasks)]
    key = sha256(str(made), name, bitplan.__version__, torch.__version__, *texts)[:24]
    return session.compared / f"{key}.json"


def recalled(session: Session, name: str, row: Plan | str, device: str) -> ComparisonRow | None:
    """A row that was measured on the session's text, or None."""
    return _recalled(name, _journal(session, row, (), device))


def _recalled(name: str, journal: Path) -> ComparisonRow | None:
    facts = read_row(journal)
    if facts is None:
        return None
    facts["evaluation"] = Evaluation(**facts["evaluation"])
    facts["throughput"] = Throughput(**facts["throughput"])
    facts["tasks"] = tuple(TaskResult(t["task"], t["measure"], Paired(**t["result"])) for t in facts["tasks"])
    return replace(ComparisonRow(**facts), name=name)
