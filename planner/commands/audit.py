"""`bitplan audit`. May import: everything."""

from argparse import Namespace
from pathlib import Path

from bitplan.formats.errors import UsageError
from bitplan.formats.rounding import rounding_alone
from bitplan.formats.scheme import QuantScheme, schemes_for
from bitplan.formats.table import format_named
from bitplan.planner.commands.common import candidate_formats, emit, log, memory_of, texts_of
from bitplan.planner.plan import Plan
from bitplan.planner.report.audit_text import audit_text
from bitplan.planner.report.losses import losses_of, profile_csv
from bitplan.planner.report.page.render import refuse_without_report, render
from bitplan.sensitivity import ranks
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import Around, audit, audit_cache
from bitplan.sensitivity.profile import read, write
from bitplan.sensitivity.profile_cache import remember
from bitplan.sensitivity.session import Session, open_session, pick_device
from bitplan.sensitivity.store import refuse_overwrite, write_text


def around_of(name: str, session: Session, rounding: str | None = None) -> Around:
    """What a person means by `--around`: a plan file, or a format. Raises PlanMismatch, UnknownFormat, UsageError."""
    if Path(name).suffix == ".json":
        plan = read(Path(name), Plan)
        sources.check_model(plan.provenance.model, session.source, "plan")
        schemes = {
            unit.name: QuantScheme(unit.format, rounding_alone(format_named(unit.format), unit.rounding))
            for unit in plan.units
            if not unit.is_native
        }
        if unknown := sorted(schemes.keys() - session.swapper.units.keys()):
            raise UsageError(
                f"{name} quantizes {unknown[0]}, which --keep leaves unquantized here: take one of them out"
            )
        return Around(Path(name).name, schemes)
    last = {unit: schemes_for(unit.native, (name,), rounding)[-1] for unit in session.graph.units}
    return Around(name, {unit.name: scheme for unit, scheme in last.items() if scheme.format != unit.native})


def run(arguments: Namespace) -> None:
    for path in (arguments.output, arguments.html, arguments.csv):
        refuse_overwrite(path, arguments.force)
    refuse_without_report(arguments.html)
    if arguments.check < 0:
        raise UsageError(f"--check {arguments.check}: it must be 0 or more")
    if arguments.around and arguments.tier != "measured":
        raise UsageError("--around says what all other units are while one is measured: give --tier measured too")
    formats = candidate_formats(arguments)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    memory = memory_of(arguments)
    device = ranks.start(pick_device(arguments.device))
    texts, keep = texts_of(arguments, source), tuple(arguments.keep)
    session = open_session(source, texts, keep, device, memory=memory, per_expert=arguments.per_expert)
    if arguments.per_expert and (whole := [unit.name for unit in session.graph.units if unit.kind == "experts"]):
        log(f"--per-expert: {len(whole)} units, such as {whole[0]}, hold all experts of a block, which share a format")
    ranks.refuse_disagreement(
        model=session.source.weights_sha256 + session.source.config_sha256,
        text=session.texts.calibration.fingerprint + session.texts.search.fingerprint,
        formats=str(formats),
        versions=str(session.provenance.versions),
    )
    around = around_of(arguments.around, session, arguments.rounding) if arguments.around else None
    profile = audit(session, formats, arguments.rounding, arguments.tier, around, arguments.check)
    if ranks.rank():
        return
    if memory:
        log("--max-memory: the KV cache's formats are not measured, for that the model runs whole")
    elif arguments.tier != "weights":
        profile = profile.model_copy(update={"kv_cache": audit_cache(session.brief)})
    if arguments.output:
        write(arguments.output, profile)
        log(f"profile written to {arguments.output}")
    remember(profile)
    losses = losses_of(profile)
    if arguments.csv:
        write_text(arguments.csv, profile_csv(losses))
    if arguments.html:
        from bitplan.planner.report.page.audit import audit_page  # matplotlib is an extra

        write_text(arguments.html, render(audit_page(profile)))
        log(f"page written to {arguments.html}")
    nll = profile.full_precision_nll
    rows = [{**row.model_dump(), "delta_nll": row.delta_nll, "full_precision_nll": nll} for row in profile.rows]
    emit(arguments, rows, audit_text(losses, arguments.all))
