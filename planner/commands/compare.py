"""`bitplan compare`. May import: everything."""

from argparse import Namespace

from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.rounding import refuse_misfit
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import COMPARED, parse_formats
from bitplan.planner.commands.common import emit, log, tasks_of, texts_of
from bitplan.planner.evaluate.compare import FAILURES, compare, why_not
from bitplan.planner.load import check_plan_fits, make_codes
from bitplan.planner.plan import Plan
from bitplan.planner.report.comparison import compare_text
from bitplan.planner.report.page.render import refuse_without_report, render
from bitplan.planner.report.sheet import csv_text
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.store import refuse_overwrite, write_text


def run(arguments: Namespace) -> None:
    for path in (arguments.html, arguments.csv):
        refuse_overwrite(path, arguments.force)
    refuse_without_report(arguments.html)
    formats = parse_formats(arguments.formats, COMPARED)
    refuse_misfit(arguments.rounding, [FORMATS[name] for name in formats])
    names = [path.name for path in arguments.plan]
    plans = {p.name if names.count(p.name) == 1 else str(p): read(p, Plan) for p in arguments.plan}
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    refused = {}
    for name, plan in plans.items():
        try:
            plans[name] = check_plan_fits(plan, source)
        except FormatUnavailable as error:
            refused[name] = str(error)
    tasks = tasks_of(arguments, source)
    for name, plan in plans.items():
        try:
            if name not in refused:
                make_codes(plan, source, arguments.text, arguments.device)
        except FAILURES as error:
            refused[name] = why_not(error)
    session = open_session(source, texts_of(arguments, source), device=arguments.device)
    lines = []
    for line in compare(
        session, formats, plans, arguments.rounding, bool(arguments.heal), arguments.device, tasks, refused
    ):
        lines.append(line)
        log(f"{line.name}: {'measured' if line.evaluation else line.note}")
    if arguments.html:
        from bitplan.planner.report.page.compare import compare_page  # matplotlib is an extra

        write_text(arguments.html, render(compare_page(lines, session.provenance)))
    if arguments.csv:
        write_text(arguments.csv, csv_text(lines))
    emit(arguments, {"rows": [line.as_dict() for line in lines]}, compare_text(lines))
