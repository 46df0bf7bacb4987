"""`bitplan explain`. May import: everything."""

from argparse import Namespace
from dataclasses import asdict
from fnmatch import fnmatchcase

from bitplan.formats.errors import UsageError
from bitplan.planner.commands.common import emit, log
from bitplan.planner.plan import Plan
from bitplan.planner.report.explain import GroupReasons, explain_text, price_text, reasons, unit_text, why
from bitplan.planner.report.page.render import refuse_without_report, render
from bitplan.sensitivity.profile import Profile, read
from bitplan.sensitivity.profile_cache import remembered
from bitplan.sensitivity.store import refuse_overwrite, write_text


def run(arguments: Namespace) -> None:
    refuse_overwrite(arguments.html, arguments.force)
    refuse_without_report(arguments.html)
    plan = read(arguments.plan, Plan)
    names = [unit.name for unit in plan.units if arguments.unit and fnmatchcase(unit.name, arguments.unit)]
    if arguments.unit and not names:
        first = ", ".join(unit.name for unit in plan.units[:3])
        raise UsageError(f"--unit {arguments.unit!r} matches no unit; the first names are {first}")
    formats = {unit.name: unit.format for unit in plan.units}
    given = read(arguments.profile, Profile) if arguments.profile else None
    profile = given or remembered(plan.provenance, formats)
    found = reasons(plan, profile)
    if profile is None:
        log("the cache has no profile of this plan's model and text: give the one of `bitplan audit` by --profile FILE")
    if arguments.html:
        from bitplan.planner.report.page.plan import plan_page  # matplotlib is an extra

        write_text(arguments.html, render(plan_page(found)))
        log(f"page written to {arguments.html}")
    groups = [group for group in found.groups if not names or {unit.name for unit in group.units}.intersection(names)]

    def facts(group: GroupReasons) -> dict:
        units = [unit.name for unit in group.units]
        alternatives = [asdict(each) | {"verdict": each.verdict} for each in group.alternatives]
        return {"units": units, "format": group.scheme, "bytes": group.nbytes, "loss": group.loss} | {
            "pins": group.pins,
            "why": why(found, group),
            "alternatives": alternatives,
        }

    if names:
        text = "\n\n".join([*(unit_text(found, name) for name in names), price_text(found.price)])
    else:
        text = explain_text(found, arguments.all)
    emit(arguments, {"price_per_byte": found.price, "groups": [facts(group) for group in groups]}, text)
