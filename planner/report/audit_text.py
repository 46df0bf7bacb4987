"""What `bitplan audit` prints: the sensitive kinds, layers and units first, in one format, the rest folded.

May import: formats, planner.report, sensitivity.profile.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

from bitplan.formats.sizes import MIB, format_bytes
from bitplan.planner.report.losses import Losses
from bitplan.planner.report.tables import table, with_error

FIRST = 8
"""Layers, and units, that have a row of their own; the others are folded into one."""
BAR = 24
"""Characters of the longest bar."""
NO_BREAK = "\N{NO-BREAK SPACE}"


def audit_text(losses: Losses, every_unit: bool = False) -> str:
    """Nats per token above full precision; with `every_unit`, a row for each unit and a column for each format."""
    profile, formats = losses.profile, losses.formats
    parts = []
    if every_unit:
        found = {unit.name: losses.rows.get(unit.name, {}) for unit in profile.units}
        cells = [(n, *(f"{row[f].cost:.5f}" if f in row else "–" for f in formats)) for n, row in found.items()]
        parts.append(table(("nats per token above full precision", *formats), cells))
    elif formats:
        parts += [_formats(losses), _by_kind(losses), _by_layer(losses), _units(losses)]
    lines = [f"{len(profile.unquantized)} tensors unquantized, {profile.unquantized_bytes:,} bytes"]
    if profile.tier == "weights":
        lines.append(
            "rough: the weights' relative errors alone, without text; --tier curvature predicts nats per token"
        )
    if profile.around:
        lines.append(f"measured one at a time, all other units as in {profile.around}")
    if profile.check:
        rank = "–" if profile.check.spearman is None else f"{profile.check.spearman:.3f}"
        lines.append(
            f"{len(profile.check.rows)} units measured alone: Spearman rank correlation with predictions {rank};"
            f" predictions rescaled by {profile.check.ratio:.3f}, the median of measured over predicted"
        )
    for row in profile.kv_cache:
        lines.append(f"KV cache in {row.format}: KL {with_error(f'{row.kl:.5f}', row.kl_se)}")
    if formats and not every_unit:
        lines.append("losses are nats per token above full precision; --all lists every unit in every format")
    return "\n\n".join([*parts, "\n".join(lines)])


def bar(part: float) -> str:
    """A bar as long as `part` of the longest, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, part)) * BAR * 8)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def _formats(losses: Losses) -> str:
    rows = []
    parameters = losses.profile.provenance.model.parameters
    for format in losses.formats:
        found = losses.total(format)
        if found is None:
            few = sum(format in row for row in losses.rows.values())
            rows.append((format, "", "", f"only {few} of {len(losses.rows)} units"))
        else:
            nbytes, loss = found
            rows.append((format, format_bytes(nbytes), f"{nbytes * 8 / parameters:.3f}", f"{loss:.4g}"))
    return table(("all units in one format", "bytes", "bits/weight", "summed loss"), rows)


def _by_kind(losses: Losses) -> str:
    format = losses.usual

    def row(kind: str, units: Sequence[str]) -> tuple[str, str, str]:
        worst = sorted(units, key=lambda unit: -losses.cost(unit, format))[:3]
        numbers = [str(at) for unit in worst if (at := losses.place[unit].layer) is not None]
        return kind, f"{len(units)}", ", ".join(numbers)

    return _bars(losses, f"kind, in {format}", ("units", "worst layers"), lambda unit: losses.place[unit].kind, row)


def _by_layer(losses: Losses) -> str:
    format = losses.usual

    def row(layer: str, units: Sequence[str]) -> tuple[str, str, str]:
        return layer, f"{len(units)}", losses.place[max(units, key=lambda unit: losses.cost(unit, format))].kind

    def of(unit: str) -> str:
        at = losses.place[unit]
        return at.kind if at.layer is None else f"layer {at.layer}"

    return _bars(losses, f"layer, in {format}", ("units", "worst kind"), of, row, FIRST)


def _bars(
    losses: Losses,
    title: str,
    head: tuple[str, str],
    of: Callable[[str], str],
    row: Callable[[str, Sequence[str]], tuple[str, str, str]],
    first: int | None = None,
) -> str:
    """Units grouped by `of`, the greatest summed loss first; after the `first`, one row for the others."""
    format = losses.usual
    groups: dict[str, list[str]] = defaultdict(list)
    for unit, found in losses.rows.items():
        if format in found:
            groups[of(unit)].append(unit)
    sums = {name: sum(losses.cost(unit, format) for unit in units) for name, units in groups.items()}
    order = sorted(sums, key=lambda name: -sums[name])
    total, longest = sum(sums.values()) or 1.0, max(sums.values()) or 1.0
    rows = [
        (*row(name, groups[name]), f"{sums[name]:.4g}", f"{100 * sums[name] / total:.0f} %", bar(sums[name] / longest))
        for name in order[:first]
    ]
    if first is not None and (rest := order[first:]):
        units, lost = [unit for name in rest for unit in groups[name]], sum(sums[name] for name in rest)
        rows.append((f"{len(rest)} others", f"{len(units)}", "", f"{lost:.4g}", f"{100 * lost / total:.0f} %", ""))
    aligned = [(*cells, bar.ljust(BAR, NO_BREAK)) for *cells, bar in rows]  # the table sets it to the right
    return table((title, *head, "loss", "share", ""), aligned).replace(NO_BREAK, "")


def _units(losses: Losses) -> str:
    format = losses.usual
    units = [unit for unit, row in losses.rows.items() if format in row and losses.saved(unit, format) > 0]
    order = sorted(units, key=lambda unit: -losses.per_mib(unit, format))
    rows = [
        (
            unit,
            f"{losses.cost(unit, format):.4g}",
            f"{losses.saved(unit, format):,}",
            f"{losses.per_mib(unit, format):.4g}",
        )
        for unit in order[:FIRST]
    ]
    if rest := order[FIRST:]:
        lost, saved = sum(losses.cost(u, format) for u in rest), sum(losses.saved(u, format) for u in rest)
        rows.append((f"{len(rest)} others", f"{lost:.4g}", f"{saved:,}", f"{lost / saved * MIB:.4g}"))
    return table((f"unit, in {format}", "loss", "bytes saved", "loss per MiB saved"), rows)
