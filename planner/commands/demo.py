"""`bitplan demo`. May import: everything."""

from argparse import Namespace

from bitplan.planner.commands.common import emit, log
from bitplan.planner.demo import run as run_demo
from bitplan.planner.report.comparison import compare_text
from bitplan.sensitivity.profile import write
from bitplan.sensitivity.store import refuse_overwrite


def run(arguments: Namespace) -> None:
    refuse_overwrite(arguments.output, arguments.force)
    made, lines = run_demo(arguments.trials, log)
    if arguments.output:
        write(arguments.output, made)
        log(f"plan written to {arguments.output}: bitplan show {arguments.output}")
    emit(
        arguments,
        {"rows": [line.as_dict() for line in lines], "plan": made.model_dump(mode="json")},
        compare_text(lines),
    )
