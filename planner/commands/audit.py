"""`bitplan audit`. May import: everything."""

from argparse import Namespace

from bitplan.planner.commands.common import candidate_formats, emit, log, texts_of
from bitplan.planner.report.show import profile_text
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit, audit_cache
from bitplan.sensitivity.profile import write
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.store import refuse_overwrite


def run(arguments: Namespace) -> None:
    refuse_overwrite(arguments.output, arguments.force)
    menu = candidate_formats(arguments)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    session = open_session(source, texts_of(arguments, source), tuple(arguments.keep), arguments.device)
    profile = audit(session, menu, arguments.rounding, arguments.measure)
    profile = profile.model_copy(update={"kv_cache": audit_cache(session)})
    if arguments.output:
        write(arguments.output, profile)
        log(f"profile written to {arguments.output}")
    nll = profile.full_precision_nll
    rows = [{**row.model_dump(), "delta_nll": row.delta_nll, "full_precision_nll": nll} for row in profile.rows]
    emit(arguments, rows, profile_text(profile))
