"""`bitplan speed`. May import: everything."""

from argparse import Namespace

from bitplan.planner.commands.common import candidate_formats, emit, log
from bitplan.planner.evaluate.speed import measure
from bitplan.planner.report.speed import speed_text
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import write
from bitplan.sensitivity.store import refuse_overwrite


def run(arguments: Namespace) -> None:
    refuse_overwrite(arguments.output, arguments.force)
    formats = candidate_formats(arguments)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    found = measure(source, formats, arguments.device)
    if arguments.output:
        write(arguments.output, found)
        log(f"speed table written to {arguments.output}")
    emit(arguments, found.model_dump(mode="json"), speed_text(found))
