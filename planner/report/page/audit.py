"""The page of a profile: which units, kinds and layers are sensitive, and what a byte buys.

May import: formats, search, sensitivity, planner.report.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bitplan.formats.sizes import format_bytes
from bitplan.planner.report.figures.scatter import Dot
from bitplan.planner.report.losses import Losses, losses_of
from bitplan.planner.report.page.facts import model_name, number, provenance, unquantized
from bitplan.planner.report.page.render import Page
from bitplan.planner.report.page.sensitivity import Sizes, cache_table, sensitivity_parts, sizes_of
from bitplan.planner.report.tables import with_error
from bitplan.search.problem import problem_of
from bitplan.sensitivity.profile import Profile


def measured_dots(rows: Sequence[dict[str, Any]]) -> list[Dot]:
    """Of those rows of `bitplan frontier` that were measured."""
    return [
        Dot(
            "",
            row["bits_per_weight"],
            row["measured_kl"],
            f"measured plan\n{row['measured_bytes']:,} bytes\nKL"
            f" {with_error(number(row['measured_kl']), row['measured_kl_se'])}",
            own=True,
        )
        for row in rows
        if "measured_kl" in row
    ]


def audit_page(profile: Profile, plans: Sequence[Dot] = ()) -> Page:
    """Figures and tables of a profile, with measured plans beside its frontier; where no unit can take any format, only
    what is unquantized."""
    losses = losses_of(profile)
    facts, formats = profile.provenance.model, losses.formats
    title, papers = model_name(facts.id), provenance(profile.provenance)
    lead = (
        f"Sensitivity of {len(profile.units)} units to {len(formats)} formats: {facts.parameters:,} parameters in"
        f" {facts.dtype}; losses in nats per token above full precision."
    )
    if not formats:
        return Page(title, lead, (), [unquantized(profile.unquantized)], papers)
    sizes = sizes_of(problem_of(profile))
    parts = sensitivity_parts(losses, sizes, plans)
    return Page(
        title=title,
        lead=lead,
        findings=findings(losses, sizes),
        figures=parts.figures,
        tables=[*parts.tables, *cache_table(profile), unquantized(profile.unquantized)],
        provenance=papers,
        **parts.choice,
    )


def findings(losses: Losses, sizes: Sizes) -> list[str]:
    """What an engineer would take from the figures, in sentences."""
    format, total = losses.usual, sizes.knee.nbytes + sizes.kept
    said = [
        f"The knee of the frontier is at {sizes.bits(total):.2f} bits per weight ({format_bytes(total)}), with"
        f" {number(sizes.knee.loss)} nats per token by prediction: a budget to start from is"
        f" --bpw {sizes.bits(total):.2f}."
    ]
    units = [unit for unit, row in losses.rows.items() if format in row]
    whole = sum(losses.cost(unit, format) for unit in units)
    if whole > 0:
        kinds: dict[str, float] = defaultdict(float)
        for unit in units:
            kinds[losses.place[unit].kind] += losses.cost(unit, format)
        first = sorted(kinds, key=lambda kind: -kinds[kind])[:2]
        shares = " and ".join(f"{kind} ({100 * kinds[kind] / whole:.0f} %)" for kind in first)
        said.append(f"In {format} most of the summed loss comes from {shares}.")
        dear = sorted(units, key=lambda unit: -losses.per_mib(unit, format))[:3]
        said.append(f"Units that lose most for each byte saved in {format}: {', '.join(dear)}.")
    found = losses.total(format)
    best = sizes.best(found[0]) if found else None
    if found and best and best.loss > 0 and found[1] > 0:
        said.append(
            f"In the bytes of uniform {format}, mixed formats predict {number(best.loss)} nats per token instead of"
            f" {number(found[1])}."
        )
    return said
