"""`bitplan show`. May import: everything."""

from argparse import Namespace

from bitplan.formats.kernels.dispatch import named_machine
from bitplan.planner.commands.common import emit
from bitplan.planner.plan import Plan
from bitplan.planner.report.show import kernel_rows, kernels_text, plan_text
from bitplan.sensitivity.profile import read


def run(arguments: Namespace) -> None:
    plan = read(arguments.plan, Plan)
    data, text = plan.model_dump(mode="json"), plan_text(plan)
    if arguments.device:
        rows = kernel_rows(plan, named_machine(arguments.device))
        data["kernels"] = [dict(zip(("unit", "count", "format", "kernel", "why"), row, strict=True)) for row in rows]
        text = f"{text}\n\n{kernels_text(rows, arguments.device)}"
    emit(arguments, data, text)
