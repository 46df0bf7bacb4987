"""A profile's losses as its tables, its CSV and its page need them.

May import: formats, search, sensitivity.profile, planner.report.places.
"""

import csv
import io
from collections import defaultdict
from dataclasses import dataclass
from math import isfinite

from bitplan.formats.sizes import MIB
from bitplan.formats.table import DTYPES
from bitplan.planner.report.places import Place, places
from bitplan.sensitivity.profile import Profile, ProfileRow


@dataclass(frozen=True)
class Losses:
    """`rows`: unit → format → its row, the checkpoint's own types left out; of several roundings, the least loss."""

    profile: Profile
    rows: dict[str, dict[str, ProfileRow]]
    place: dict[str, Place]
    whole: dict[str, int]
    """Unit → bytes as the checkpoint has it."""

    @property
    def formats(self) -> list[str]:
        """By falling bytes of all units together; only those that some unit can take."""
        sizes: dict[str, list[int]] = defaultdict(list)
        for row in self.rows.values():
            for format, found in row.items():
                sizes[format].append(found.bytes)
        return sorted(sizes, key=lambda format: (-len(sizes[format]), -sum(sizes[format])))

    @property
    def usual(self) -> str:
        """The format to show first: the nearest to four bits, scales counted."""
        weights = {u.name: u.experts * u.rows * u.columns for u in self.profile.units}

        def distance(format: str) -> float:
            units = [unit for unit, row in self.rows.items() if format in row]
            bits = 8 * sum(self.rows[u][format].bytes for u in units) / sum(weights[u] for u in units)
            return abs(bits - 4.25) + len(self.rows) - len(units)

        return min(self.formats, key=distance)

    @property
    def costs(self) -> dict[str, dict[str, float]]:
        """Unit → format → nats per token above full precision."""
        return {unit: {format: row.cost for format, row in rows.items()} for unit, rows in self.rows.items()}

    def cost(self, unit: str, format: str) -> float:
        return self.rows[unit][format].cost

    def saved(self, unit: str, format: str) -> int:
        """Bytes that a format saves against the checkpoint."""
        return self.whole[unit] - self.rows[unit][format].bytes

    def per_mib(self, unit: str, format: str) -> float:
        """Nats per token for each MiB saved; infinite where nothing is saved."""
        saved = self.saved(unit, format)
        return self.cost(unit, format) / saved * MIB if saved > 0 else float("inf")

    def total(self, format: str) -> tuple[int, float] | None:
        """Bytes of the whole model and summed loss with every unit in a format; None where one cannot take it."""
        if any(format not in row for row in self.rows.values()):
            return None
        rows = [row[format] for row in self.rows.values()]
        return self.profile.unquantized_bytes + sum(row.bytes for row in rows), sum(row.cost for row in rows)


def losses_of(profile: Profile) -> Losses:
    """Raises nothing: a profile without rows beside the checkpoint's own types has no formats."""
    native = {unit.name: DTYPES.get(unit.dtype) for unit in profile.units}
    rows: dict[str, dict[str, ProfileRow]] = {unit.name: {} for unit in profile.units}
    whole = {}
    for row in profile.rows:
        if row.format == native[row.unit]:
            whole[row.unit] = row.bytes
        elif row.format not in rows[row.unit] or row.cost < rows[row.unit][row.format].cost:
            rows[row.unit][row.format] = row
    return Losses(profile, {unit: row for unit, row in rows.items() if row}, places(rows), whole)


def profile_csv(losses: Losses) -> str:
    """A line for each unit and format."""
    out = io.StringIO()
    writer = csv.writer(out)
    head = ("unit", "kind", "layer", "group", "format", "rounding", "bytes", "bytes_saved", "predicted_nll")
    writer.writerow((*head, "measured_nll", "measured_nll_se", "measured_kl", "nats_per_mib_saved"))
    groups = {unit.name: unit.group for unit in losses.profile.units}
    for unit, rows in losses.rows.items():
        at = losses.place[unit]
        for row in rows.values():
            price = losses.per_mib(unit, row.format)
            own = (unit, at.kind, at.layer, groups[unit], row.format, row.rounding, row.bytes)
            lost = (row.predicted_nll, row.measured_nll, row.measured_nll_se, row.measured_kl)
            writer.writerow((*own, losses.saved(unit, row.format), *lost, price if isfinite(price) else None))
    return out.getvalue()
