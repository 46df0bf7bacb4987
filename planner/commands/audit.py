"""`bitplan audit`. May import: everything."""

from argparse import Namespace

from bitplan.planner.commands.common import candidate_formats, emit, log, texts_of
from bitplan.planner.report.audit_text import audit_text
from bitplan.planner.report.losses import losses_of, profile_csv
from bitplan.planner.report.page.render import refuse_without_report, render
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit, audit_cache
from bitplan.sensitivity.profile import write
from bitplan.sensitivity.profile_cache import remember
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.store import refuse_overwrite, write_text


def run(arguments: Namespace) -> None:
    for path in (arguments.output, arguments.html, arguments.csv):
        refuse_overwrite(path, arguments.force)
    refuse_without_report(arguments.html)
    menu = candidate_formats(arguments)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    session = open_session(source, texts_of(arguments, source), tuple(arguments.keep), arguments.device)
    profile = audit(session, menu, arguments.rounding, arguments.measure)
    profile = profile.model_copy(update={"kv_cache": audit_cache(session)})
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
