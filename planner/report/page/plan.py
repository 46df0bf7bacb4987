"""The page of a plan: the format of each unit, why it has it, where the plan lies on the frontier.

May import: formats, planner.plan, planner.report.
"""

from bitplan.formats.sizes import MIB, format_bytes
from bitplan.planner.plan import Plan
from bitplan.planner.report.explain import GroupReasons, Reasons, price_text, why
from bitplan.planner.report.figures.heat import format_map
from bitplan.planner.report.figures.scatter import Dot
from bitplan.planner.report.losses import losses_of
from bitplan.planner.report.page.facts import model_name, number, provenance, unquantized
from bitplan.planner.report.page.render import Page, PageFigure, PageTable
from bitplan.planner.report.page.sensitivity import sensitivity_parts, sizes_of
from bitplan.planner.report.places import places


def plan_page(reasons: Reasons) -> Page:
    """With a profile also the losses that the plan was chosen by; without, what the plan file alone says."""
    plan = reasons.plan
    title, papers = model_name(plan.provenance.model.id), provenance(plan.provenance)
    beside = f" and {plan.latency.requested}" if plan.latency else ""
    lead = (
        f"A plan of {plan.bytes:,} bytes ({format_bytes(plan.bytes)}), {plan.bits_per_weight:.3f} bits per weight,"
        f" for a budget of {plan.budget.requested} ({plan.budget.weights:,} bytes){beside}."
    )
    figures, tables = [_formats(plan)], [_reasons_table(reasons), *measured_tables(plan), *_overrides(plan)]
    found = [price_text(reasons.price), *_findings(plan)]
    left = unquantized(plan.unquantized)
    losses = None if reasons.problem is None else losses_of(reasons.problem.profile)
    if reasons.problem is None or losses is None or not losses.formats:
        return Page(title, lead, figures, [*tables, left], papers, findings=found)
    sizes = sizes_of(reasons.problem)
    parts = sensitivity_parts(losses, sizes, _dots(plan))
    return Page(
        title=title,
        lead=lead,
        findings=found,
        figures=[*figures, *parts.figures],
        tables=[*tables, *parts.tables, left],
        provenance=papers,
        **parts.choice,
    )


def _formats(plan: Plan) -> PageFigure:
    bits = {unit.name: 8 * unit.bytes / (unit.experts * unit.rows * unit.columns) for unit in plan.units}
    notes = {
        unit.name: f"{unit.name}\n{unit.format}/{unit.rounding}, {bits[unit.name]:.3f} bits\n{unit.bytes:,} bytes"
        for unit in plan.units
    }
    caption = (
        f"Bits per weight, scales counted, from {min(bits.values()):.2f} (dark) to {max(bits.values()):.2f} (bright)."
        " Input at the top; a unit outside of the layers fills a row."
    )
    return PageFigure("The format of each unit", format_map(places(bits), bits, notes), caption)


def _dots(plan: Plan) -> list[Dot]:
    if plan.predicted is None:
        return []
    size = f"{plan.bytes:,} bytes\n{plan.bits_per_weight:.3f} bits per weight"
    note = f"the plan\n{size}\n{plan.predicted.nll:.5g} nats per token predicted"
    return [Dot("plan", plan.bits_per_weight, plan.predicted.nll, note, own=True)]


def _findings(plan: Plan) -> list[str]:
    said = []
    if plan.measured:
        m = plan.measured
        said.append(
            f"Measured on {m.tokens:,} held-out tokens: KL {m.kl:.5f} ± {m.kl_se:.5f} nats per token, perplexity"
            f" {m.ppl:.3f}."
        )
    else:
        said.append("Not measured: the plan was made by the profile alone.")
    if plan.uniform and plan.uniform.measured:
        u = plan.uniform
        said.append(
            f"The best uniform plan in the budget, {u.format}, has KL {u.measured.kl:.5f} in {u.bytes:,} bytes:"  # type: ignore[union-attr]
            f" the {'mixed' if plan.shipped == 'search' else 'uniform'} plan ships."
        )
    return said


def _reasons_table(reasons: Reasons) -> PageTable:
    rows = [
        (
            ", ".join(unit.name for unit in group.units),
            group.scheme,
            why(reasons, group),
            f"{group.nbytes:,}",
            "–" if group.loss is None else number(group.loss),
            _step(group, True),
            _step(group, False),
        )
        for group in reasons.groups
    ]
    head = ("units of a group", "format", "why", "bytes", "loss", "lost per MiB, smaller", "gained per MiB, larger")
    note = "A group shares one format."
    if reasons.price:
        note += (
            f" The marginal price of the plan is {number(reasons.price * MIB)} nats per token for each MiB: a smaller"
            " format loses more for what it saves, a larger one gains less for what it takes."
        )
    return PageTable("Why each unit has its format", head, rows, left=3, note=note)


def _step(group: GroupReasons, smaller: bool) -> str:
    found = group.closest(smaller)
    return "–" if found is None else f"{number(found.per_mib)} ({found.scheme})"


def measured_tables(plan: Plan) -> list[PageTable]:
    """The plan's figures and the best uniform plan's, where there are any."""
    rows = []
    for name, size, found in (
        ("plan", plan.bytes, plan.measured),
        (f"uniform {plan.uniform.format}", plan.uniform.bytes, plan.uniform.measured)
        if plan.uniform
        else ("", 0, None),
    ):
        if found is not None:
            kl = (f"{found.kl:.5f}", f"{found.kl_se:.5f}")
            rows.append((name, f"{size:,}", *kl, f"{found.delta_nll:+.4f}", f"{found.ppl:.3f}"))
    head = ("", "bytes", "KL", "± standard error", "nats above full precision", "perplexity")
    return [PageTable("Measured on held-out text", head, rows)] if rows else []


def _overrides(plan: Plan) -> list[PageTable]:
    rows = [(str(each), ", ".join(each.units)) for each in plan.overrides]
    return [PageTable("Overrides", ("as typed", "units"), rows, left=2)] if rows else []
