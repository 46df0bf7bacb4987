"""`bitplan demo`. May import: everything."""

from argparse import Namespace

from planner.commands.asked import put, say
from planner.demo import run as run_demo
from planner.show import compare_text
from sensitivity.profile import write
from sensitivity.store import refuse_overwrite


def run(arguments: Namespace) -> None:
    refuse_overwrite(arguments.output, arguments.force)
    made, lines = run_demo(arguments.trials, say)
    if arguments.output:
        write(arguments.output, made)
        say(f"plan written to {arguments.output}: bitplan show {arguments.output}")
    put(
        arguments,
        {"rows": [line.as_dict() for line in lines], "plan": made.model_dump(mode="json")},
        compare_text(lines),
    )
