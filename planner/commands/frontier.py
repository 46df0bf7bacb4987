"""`bitplan frontier`. May import: everything."""

from argparse import Namespace
from math import expm1
from pathlib import Path

from bitplan.formats.errors import UsageError
from bitplan.formats.sizes import format_bytes
from bitplan.planner.assemble import Finish, quick_plan
from bitplan.planner.commands.common import candidate_formats, emit, log, texts_of
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Budget
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.page.render import refuse_without_report, render
from bitplan.planner.report.tables import table, with_error
from bitplan.search.frontier import Point, frontier, knee
from bitplan.search.problem import Problem, problem_of
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.curvature import evenly
from bitplan.sensitivity.profile import Profile, read
from bitplan.sensitivity.profile_cache import remember
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.store import refuse_overwrite, write_text


def run(arguments: Namespace) -> None:
    refuse_overwrite(arguments.html, arguments.force)
    refuse_without_report(arguments.html)
    if arguments.points < 2:
        raise UsageError(f"--points {arguments.points}: it must be 2 or more")
    formats = candidate_formats(arguments) if arguments.formats else None
    profile, session = _profile(arguments)
    if formats and (unknown := set(formats) - {row.format for row in profile.rows}):
        raise UsageError(f"the profile has no rows for {', '.join(sorted(unknown))}")
    problem = problem_of(profile, formats)
    points = frontier(problem.options)
    rows = _rows(problem, _spread(points, arguments.points), knee(points))
    if session:
        _measure(rows, arguments, problem, session)
    if arguments.html:
        from bitplan.planner.report.page.audit import audit_page, measured_dots  # matplotlib is an extra

        write_text(arguments.html, render(audit_page(profile, measured_dots(rows))))
        log(f"page written to {arguments.html}")
    cells = [
        (
            f"{row['bytes']:,}",
            format_bytes(row["bytes"]),
            f"{row['bits_per_weight']:.3f}",
            f"{row['loss']:.5f}",
            f"{100 * expm1(row['loss']):.2f} %",
            *([_kl(row)] if session else []),
            "knee" if row["knee"] else "",
        )
        for row in rows
    ]
    head = ("bytes", "", "bits/weight", "nats per token", "perplexity", *(["measured KL"] if session else []), "")
    text = (
        f"{table(head, cells, left=0)}\n\npredicted for {len(points):,} allocations of least loss, {len(rows)} shown;"
        " above full precision. `bitplan plan --budget` searches further for one, and measures it."
    )
    emit(arguments, rows, text)


def _profile(arguments: Namespace) -> tuple[Profile, Session | None]:
    """Of a file, or made of a model; with the model's session where something is to be measured."""
    if arguments.measure < 0:
        raise UsageError(f"--measure {arguments.measure}: it must be 0 or more")
    if Path(arguments.source).is_file():
        if arguments.measure:
            raise UsageError("--measure makes plans, for which it needs the model: name it in the profile's place")
        return read(Path(arguments.source), Profile), None
    source = sources.find(arguments.source, trust_remote_code=arguments.trust_remote_code)
    session = open_session(source, texts_of(arguments, source), device=arguments.device)
    profile = audit(session, candidate_formats(arguments), arguments.rounding)
    remember(profile)
    return profile, session if arguments.measure else None


def _measure(rows: list[dict], arguments: Namespace, problem: Problem, session: Session) -> None:
    """Make the plans of some rows, each the knapsack's for its bytes, and add their `measured_kl` on held-out text."""
    others = [row for row in rows if not row["knee"]]
    picked = [*(row for row in rows if row["knee"]), *evenly(others, arguments.measure - 1)][: arguments.measure]
    objective, finish = Objective(session), Finish(arguments.rounding)
    for row in sorted(picked, key=lambda row: row["bytes"]):
        plan = quick_plan(problem, Budget(requested=f"{row['bytes']} bytes", weights=row["bytes"]), finish)
        round_missing(plan, session)
        found = objective.heldout(load_planned(plan, session.source, arguments.device))
        row |= {"measured_kl": found.kl, "measured_kl_se": found.kl_se, "measured_bytes": plan.bytes}
        log(f"{plan.bytes:,} bytes: {_kl(row)} on held-out text, {row['loss']:.5f} was predicted")


def _kl(row: dict) -> str:
    return with_error(f"{row['measured_kl']:.5f}", row["measured_kl_se"]) if "measured_kl" in row else ""


def _spread(points: list[Point], count: int) -> list[Point]:
    """So many points at most and the knee, from end to end, each by the same factor larger than the one before."""
    first, last = points[0].nbytes, points[-1].nbytes
    aims = [first * (last / first) ** (i / (count - 1)) for i in range(count)]
    picked = {min(points, key=lambda point: abs(point.nbytes - aim)) for aim in aims} | {knee(points)}
    return sorted(picked, key=lambda point: point.nbytes)


def _rows(problem: Problem, points: list[Point], at: Point) -> list[dict]:
    kept, parameters = problem.profile.unquantized_bytes, problem.profile.provenance.model.parameters
    return [
        {
            "bytes": point.nbytes + kept,
            "bits_per_weight": (point.nbytes + kept) * 8 / parameters,
            "loss": point.loss,
            "knee": point == at,
        }
        for point in points
    ]
