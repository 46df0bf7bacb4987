"""A plan, told to those who serve models: `export(plan, target)` for one of `TARGETS`.

    exported = export(plan, "compressed-tensors", source=source, nearest=True)
    write_export(exported, Path("out"))

What a target has no words for is FormatUnavailable, which names the units; with `nearest` it is changed to the nearest
that the target has, and `exported.changes` lists every unit that is another or takes other bytes.
"""

from pathlib import Path

from bitplan.formats.errors import PlanMismatch, UsageError
from bitplan.planner.codes import refuse_missing
from bitplan.planner.export.auto_round import AutoRound
from bitplan.planner.export.compressed_tensors import CompressedTensors, save_compressed
from bitplan.planner.export.gguf import Gguf
from bitplan.planner.export.gptqmodel import GptqModel
from bitplan.planner.export.lower import settled
from bitplan.planner.export.show import export_text
from bitplan.planner.export.target import Exported, ExportedUnit, Target
from bitplan.planner.export.torchao import TorchAo
from bitplan.planner.load import load_planned, make_codes
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import Profile
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.store import write_text

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (GptqModel, CompressedTensors, TorchAo, Gguf, AutoRound)
}
NEED_MODEL = ("gptqmodel", "compressed-tensors", "gguf")
"""Targets that look at the plan's model."""


def export(
    plan: Plan,
    target: str,
    *,
    nearest: bool = False,
    profile: Profile | None = None,
    source: Source | None = None,
) -> Exported:
    """A plan in a target's words. `source`: the plan's model, for the targets in NEED_MODEL; `profile`: tells what the
    changes cost.

    Raises UsageError for an unknown target or a missing model, FormatUnavailable for units that the target cannot say
    and for a package that is not installed, PlanMismatch for a profile of another model, ModelUnreadable.
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}: there are {', '.join(TARGETS)}")
    if source is None and target in NEED_MODEL:
        raise UsageError(f"{target} needs the plan's model: give its folder or hub id")
    of_plan, of_profile = plan.provenance.model, profile.provenance.model if profile else plan.provenance.model
    if source:  # either may be of an older bitplan
        of_plan, of_profile = sources.current_facts(of_plan, source), sources.current_facts(of_profile, source)
        plan = plan.for_model(of_plan)
    if profile and of_profile.weights_sha256 != of_plan.weights_sha256:
        raise PlanMismatch(
            f"the profile is {profile.provenance.model.id}'s, and the plan another model's: audit that one"
        )
    losses = {(row.unit, row.format): row.predicted_nll for row in profile.rows} if profile else {}
    told = TARGETS[target](plan, source)
    made = settled(plan, told, nearest)
    lines = []
    for before, after in zip(plan.units, made.units, strict=True):
        like = told.like(after)
        old, new = losses.get((before.name, before.format)), losses.get((before.name, like))
        nats = 0.0 if like == before.format else new - old if old is not None and new is not None else None
        size = told.nbytes(after)
        lines.append(ExportedUnit(before.name, before.format, after.format, told.word(after), before.bytes, size, nats))
    total = sum(line.bytes for line in lines) + sum(map(told.unquantized_nbytes, plan.unquantized))
    notes = told.notes(made)
    if made.workload.kv_format != "native":
        notes.append(f"the plan's KV cache, {made.workload.kv_format}, is not told: set it at the server")
    return Exported(told, made, tuple(lines), told.text(made), plan.bytes, total, tuple(notes))


def write_export(
    exported: Exported,
    output: Path,
    *,
    force: bool = False,
    text: list[Path] | None = None,
    device: str = "auto",
) -> int:
    """Write an export: a file, or for a target that holds codes a checkpoint folder; the bytes of weights in it.

    `text`: the plan's text, where its codes follow from text and are not in the cache. Raises BitplanError where
    nothing can be written, CodesMissing, PlanMismatch, FormatUnavailable.
    """
    source = exported.target.source
    if not exported.target.holds_codes or source is None:
        write_text(output, exported.text)
        return 0
    make_codes(exported.plan, source, text, device)
    refuse_missing(exported.plan)
    return save_compressed(load_planned(exported.plan, source, device), exported, output, force)


__all__ = ["NEED_MODEL", "TARGETS", "Exported", "Line", "Target", "export", "export_text", "write_export"]
