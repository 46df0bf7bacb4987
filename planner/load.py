"""Loading of a plan's model on a device.

May import: formats, sensitivity, planner.plan, planner.codes, planner.memory, planner.hf, planner.quantize.
"""

from pathlib import Path

from transformers import PreTrainedModel

from bitplan.formats.errors import ModelUnreadable
from bitplan.planner.codes import missing_codes
from bitplan.planner.hf.checks import resident_bytes
from bitplan.planner.hf.quantizer import PlanConfig, refuse_unavailable
from bitplan.planner.memory.budget import refuse_full
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.session import open_session, pick_device
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.texts.read import recall_texts

__all__ = ["check_plan_fits", "find_for", "load", "load_planned", "make_codes", "resident_bytes"]


def check_plan_fits(plan: Plan, source: Source) -> Plan:
    """The plan, with current fingerprints if an older bitplan made it. Raises PlanMismatch for a plan of another model,
    FormatUnavailable if this machine cannot run a format."""
    plan = plan.for_model(sources.check_model(plan.provenance.model, source, "plan"))
    refuse_unavailable(plan)
    return plan


def load(
    plan: Plan | str | Path,
    model: str | Path | None = None,
    device: str = "auto",
    text: list[str | Path] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model quantized by a plan, in eval mode. `model` is a folder or hub id, by default the plan's; `text` is the
    plan's text, required if its rounding needs text and neither the codes nor the text are in the cache.

    Raises PlanMismatch, CodesMissing, FormatUnavailable, ModelUnreadable, UsageError.
    """
    if not isinstance(plan, Plan):
        plan = read(Path(plan), Plan)
    plan, source = find_for(plan, model, trust_remote_code)
    make_codes(plan, source, [Path(file) for file in text] if text else None, device)
    return load_planned(plan, source, device)


def find_for(plan: Plan, model: str | Path | None, trust_remote_code: bool = False) -> tuple[Plan, Source]:
    """A plan and its model, checked. Raises PlanMismatch, FormatUnavailable, ModelUnreadable."""
    facts = plan.provenance.model
    try:
        source = sources.find(model or facts.id, None if model else facts.revision, trust_remote_code)
    except ModelUnreadable as error:
        hint = "" if model else "; this is the plan's model, perhaps relative to another folder: give --model FOLDER"
        raise ModelUnreadable(f"{error}{hint}") from None
    sources.refuse_quantized(source)
    return check_plan_fits(plan, source), source


def make_codes(
    plan: Plan,
    source: Source,
    files: list[Path] | None = None,
    device: str = "auto",
    memory: int | None = None,
) -> None:
    """Compute codes of the plan that are not in the cache, if its text is available; `memory`: bytes that this process
    may take. Raises PlanMismatch, RoundingFailed, UsageError."""
    plan = plan.for_model(sources.current_facts(plan.provenance.model, source))
    refuse_full(plan, source, pick_device(device))
    needed = ("calibration", "search", "healing") if plan.distilled else ("calibration",)
    if missing_codes(plan) and (
        found := recall_texts(plan.provenance.text, source, files, needed=needed, device=device)
    ):
        round_missing(plan, open_session(source, found, device=device, whole=False, memory=memory))


def load_planned(plan: Plan, source: Source, device: str = "auto") -> PreTrainedModel:
    """Load a checked plan's model. Raises CodesMissing; BitplanError where the device has too little memory;
    PlanMismatch where the loaded tensors are not the planned."""
    device = pick_device(device)
    refuse_full(plan, source, device)
    return sources.load_model(source, device, quantization_config=PlanConfig(plan))
