"""`bitplan export`. May import: everything."""

from argparse import Namespace

from bitplan.planner.commands.common import emit, log
from bitplan.planner.export import NEED_MODEL, TARGETS, export, export_text, write_export
from bitplan.planner.load import find_for
from bitplan.planner.plan import Plan
from bitplan.planner.report.model_card import refuse_folder
from bitplan.sensitivity.profile import Profile, read
from bitplan.sensitivity.store import refuse_overwrite


def run(arguments: Namespace) -> None:
    plan = read(arguments.plan, Plan)
    refuse = refuse_folder if arguments.to in TARGETS and TARGETS[arguments.to].holds_codes else refuse_overwrite
    refuse(arguments.output, arguments.force)
    profile = read(arguments.profile, Profile) if arguments.profile else None
    needs_model = arguments.to in NEED_MODEL
    source = None
    if needs_model:
        plan, source = find_for(plan, arguments.model, arguments.trust_remote_code)
    exported = export(plan, arguments.to, nearest=arguments.nearest, profile=profile, source=source)
    write_export(exported, arguments.output, force=arguments.force, text=arguments.text, device=arguments.device)
    log(f"written to {arguments.output}")
    emit(arguments, exported.as_dict(), export_text(exported))
