"""Export of a plan for other tools: `export(plan, target)` for one of `TARGETS`.

    exported = export(plan, "compressed-tensors", source=source, nearest=True)
    write_export(exported, Path("out"))

Formats that a target does not support raise FormatUnavailable, which names the units. With `nearest` they are changed
to the nearest supported ones, and `exported.changes` lists every unit whose format or size differs from the plan's.
"""

from pathlib import Path

from bitplan.formats.errors import PlanMismatch, UsageError
from bitplan.planner.codes import refuse_missing
from bitplan.planner.export.auto_round import AutoRound
from bitplan.planner.export.compressed_tensors import CompressedTensors, save_compressed
from bitplan.planner.export.gguf import Gguf
from bitplan.planner.export.gptqmodel import GptqModel
from bitplan.planner.export.lower import lower
from bitplan.planner.export.names import beside, beside_text, refuse_renamed
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
"""Targets that require the plan's model."""


def export(
    plan: Plan,
    target: str,
    *,
    nearest: bool = False,
    profile: Profile | None = None,
    source: Source | None = None,
) -> Exported:
    """Convert a plan to a target's format. `source`: the plan's model, required for the targets in NEED_MODEL;
    `profile`: gives the change of the predicted loss.

    Raises UsageError for an unknown target or a missing model, FormatUnavailable for units that the target does not
    support and for a package that is not installed, PlanMismatch for a profile of another model, ModelUnreadable.
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
    chosen = TARGETS[target](plan, source)
    made = lower(plan, chosen, nearest)
    lines = []
    for before, after in zip(plan.units, made.units, strict=True):
        like = chosen.like(after)
        old, new = losses.get((before.name, before.format)), losses.get((before.name, like))
        nats = 0.0 if like == before.format else new - old if old is not None and new is not None else None
        size = chosen.nbytes(after)
        lines.append(
            ExportedUnit(before.name, before.format, after.format, chosen.word(after), before.bytes, size, nats)
        )
    total = sum(line.bytes for line in lines) + sum(map(chosen.unquantized_nbytes, plan.unquantized))
    notes = chosen.notes(made)
    if chosen.holds_codes and source:
        refuse_renamed(made, source, target)
        notes += beside_text(beside(made, source))
    if made.workload.kv_format != "native":
        notes.append(f"the plan's KV cache format, {made.workload.kv_format}, is not exported: configure the server")
    return Exported(chosen, made, tuple(lines), chosen.text(made), plan.bytes, total, tuple(notes))


def write_export(
    exported: Exported,
    output: Path,
    *,
    force: bool = False,
    text: list[Path] | None = None,
    device: str = "auto",
) -> int:
    """Write an export: a file, or a checkpoint folder for a target that holds codes. Returns the bytes of the folder's
    weights, 0 for a file.

    `text`: the plan's text, required if its rounding needs text and its codes are not in the cache. Raises BitplanError
    if `output` cannot be written, CodesMissing, PlanMismatch, FormatUnavailable.
    """
    source = exported.target.source
    if not exported.target.holds_codes or source is None:
        write_text(output, exported.text)
        return 0
    make_codes(exported.plan, source, text, device)
    refuse_missing(exported.plan)
    return save_compressed(load_planned(exported.plan, source, device), exported, output, force)


__all__ = ["NEED_MODEL", "TARGETS", "Exported", "ExportedUnit", "Target", "export", "export_text", "write_export"]
