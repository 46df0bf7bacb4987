"""`bitplan frontier`. May import: everything."""

from argparse import Namespace
from math import expm1
from pathlib import Path

from bitplan.formats.errors import UsageError
from bitplan.formats.sizes import format_bytes
from bitplan.planner.commands.common import candidate_formats, emit, log, texts_of
from bitplan.planner.report.page.render import refuse_without_report, render
from bitplan.planner.report.tables import table
from bitplan.search.frontier import Point, frontier, knee
from bitplan.search.problem import Problem, problem_of
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.profile import Profile, read
from bitplan.sensitivity.profile_cache import remember
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.store import refuse_overwrite, write_text


def run(arguments: Namespace) -> None:
    refuse_overwrite(arguments.html, arguments.force)
    refuse_without_report(arguments.html)
    if arguments.points < 2:
        raise UsageError(f"--points {arguments.points}: it must be 2 or more")
    formats = candidate_formats(arguments) if arguments.formats else None
    profile = _profile(arguments)
    if formats and (unknown := set(formats) - {row.format for row in profile.rows}):
        raise UsageError(f"the profile has no rows for {', '.join(sorted(unknown))}")
    problem = problem_of(profile, formats)
    points = frontier(problem.options)
    rows = _rows(problem, _spread(points, arguments.points), knee(points))
    if arguments.html:
        from bitplan.planner.report.page.audit import audit_page  # matplotlib is an extra

        write_text(arguments.html, render(audit_page(profile)))
        log(f"page written to {arguments.html}")
    cells = [
        (
            f"{row['bytes']:,}",
            format_bytes(row["bytes"]),
            f"{row['bits_per_weight']:.3f}",
            f"{row['loss']:.5f}",
            f"{100 * expm1(row['loss']):.2f} %",
            "knee" if row["knee"] else "",
        )
        for row in rows
    ]
    head = ("bytes", "", "bits/weight", "nats per token", "perplexity", "")
    text = (
        f"{table(head, cells, left=0)}\n\npredicted for {len(points):,} allocations of least loss, {len(rows)} shown;"
        " above full precision. `bitplan plan --budget` makes and measures one."
    )
    emit(arguments, rows, text)


def _profile(arguments: Namespace) -> Profile:
    """Of a file, or made of a model."""
    if Path(arguments.source).is_file():
        return read(Path(arguments.source), Profile)
    source = sources.find(arguments.source, trust_remote_code=arguments.trust_remote_code)
    session = open_session(source, texts_of(arguments, source), device=arguments.device)
    profile = audit(session, candidate_formats(arguments), arguments.rounding)
    remember(profile)
    return profile


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
