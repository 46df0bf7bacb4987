"""The embedded model, and the main job run on it. May import: planner, sensitivity."""

from collections.abc import Callable
from pathlib import Path

from bitplan.formats.table import DEFAULT_FORMATS
from bitplan.planner.assemble import Finish, uniform_plan
from bitplan.planner.evaluate.compare import ComparisonRow, compare
from bitplan.planner.evaluate.trials import Effort
from bitplan.planner.plan import Budget, Plan
from bitplan.planner.select import Selection
from bitplan.search.problem import problem_of
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts

MODEL = Path(__file__).parent / "model"
CALIBRATION = Path(__file__).parent / "text" / "calibration.txt"
HELDOUT = Path(__file__).parent / "text" / "heldout.txt"


def run(trials: int, log: Callable[[str], None]) -> tuple[Plan, list[ComparisonRow]]:
    """Audit the embedded model, plan it for the bytes of uniform int4-g64, apply the plan, and compare.

    Returns the plan and the table's lines: full precision, int8, int4-g64 and the plan, on held-out text.
    """
    source = sources.find(MODEL)
    session = open_session(source, read_texts(source, files=[CALIBRATION], heldout=[HELDOUT]))
    log("1/4 audit: what each format costs each unit")
    profile = audit(session, DEFAULT_FORMATS)
    size = uniform_plan(session, "int4-g64").bytes
    log(f"2/4 plan for {size:,} bytes, those of uniform int4-g64")
    selection = Selection(problem_of(profile), session, Finish(), Effort(trials, finalists=1))
    plan = selection.made(Budget(requested="the bytes of uniform int4-g64", weights=size))
    log("3/4 apply and 4/4 compare, on held-out text")
    native = session.graph.units[0].native
    lines = []
    for line in compare(session, (native, "int8", "int4-g64"), {"plan": plan}):
        log(f"    {line.name}: {'measured' if line.evaluation else line.note}")
        lines.append(line)
    return plan, lines
