"""What a target of `bitplan export` is, and what an export comes out as.

May import: formats, sensitivity, planner.plan.

A target is a format of someone else's in which a plan can be told. It is asked about one unit at a time, native ones
too: what stands against the unit, what the unit is called there, how many bytes it takes there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from bitplan.formats.integers import IntegerFormat
from bitplan.formats.table import FORMATS
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.sensitivity.profile import UnquantizedEntry
from bitplan.sensitivity.source import Source

KINDS = {"tied": "an embedding and the head", "embedding": "an embedding", "experts": "the joined experts of a block"}
"""Why a unit of a kind is no plain matrix product."""


class Target(ABC):
    """A target for one plan. `source` is the plan's model, which only some targets must look at.

    `planner.export.export` makes one, asks `unsayable` of every unit, changes or refuses what is answered, asks `word`
    and `nbytes` of the units as they are then, and at last `text` of that plan.
    """

    name: ClassVar[str]
    readers: ClassVar[str]
    """Who reads it."""
    holds_codes: ClassVar[bool] = False
    """A reader gets the plan's own codes, from a folder with weights; otherwise it rounds the model again itself."""
    joins: ClassVar[bool] = True
    """Its readers join q/k/v and gate/up, which must then be alike."""

    def __init__(self, plan: Plan, source: Source | None):
        self.plan = plan
        self.source = source

    @abstractmethod
    def unsupported(self, unit: PlannedUnit) -> str | None:
        """What stands against a unit, in words that follow its name; None where the target has words for it."""

    @abstractmethod
    def word(self, unit: PlannedUnit) -> str:
        """A sayable unit's format in the target's words."""

    @abstractmethod
    def text(self, plan: Plan) -> str:
        """The file to write for a plan whose units are all sayable."""

    def nbytes(self, unit: PlannedUnit) -> int:
        """Bytes that a sayable unit takes at the readers'."""
        return unit.bytes

    def unquantized_nbytes(self, entry: UnquantizedEntry) -> int:
        """Bytes that a kept tensor takes at the readers'."""
        return entry.bytes

    def like(self, unit: PlannedUnit) -> str:
        """Our format whose predicted loss is nearest to what a reader makes of a sayable unit."""
        return unit.format

    def notes(self, plan: Plan) -> list[str]:
        """What one must know to use the file, in sentences."""
        return []


@dataclass(frozen=True)
class ExportedUnit:
    """One unit: what the plan says, what the target is told, and the bytes of both."""

    unit: str
    planned: str
    format: str
    """Ours, which is another than `planned` where the target has no words for that."""
    word: str
    planned_bytes: int
    bytes: int
    nats: float | None
    """Change of the predicted loss, nats per token; None where no profile tells it."""

    @property
    def is_changed(self) -> bool:
        return self.format != self.planned or self.bytes != self.planned_bytes


@dataclass(frozen=True)
class Exported:
    """A plan in a target's words."""

    target: Target
    plan: Plan
    """As the target is told it: the given one, unless `nearest` changed units."""
    lines: tuple[ExportedUnit, ...]
    text: str
    """The file's contents; for a target that holds codes, its quantization config."""
    planned_bytes: int
    bytes: int
    """Weights at the readers', kept tensors included."""
    notes: tuple[str, ...]

    @property
    def changes(self) -> list[ExportedUnit]:
        return [line for line in self.lines if line.is_changed]

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "target": self.target.name,
            "planned_bytes": self.planned_bytes,
            "bytes": self.bytes,
            "units": [vars(line) for line in self.lines],
            "notes": list(self.notes),
        }


def group_size(unit: PlannedUnit) -> int:
    """Columns that share a scale, as readers say it: -1 where the whole row does."""
    group = getattr(FORMATS[unit.format], "group", 0)
    return group if 0 < group < unit.columns else -1


def uneven(unit: PlannedUnit) -> str | None:
    """What stands against groups that do not divide a unit's columns, which only our own packing has."""
    group = group_size(unit)
    return f"whose {unit.columns} columns are no whole groups of {group}" if unit.columns % max(group, 1) else None


def integer(unit: PlannedUnit) -> IntegerFormat | None:
    """A packed unit's format where it has whole numbers for codes, and a whole or fixed zero point."""
    format = None if unit.is_native else FORMATS[unit.format]
    return format if isinstance(format, IntegerFormat) and format.zero_point in ("asymmetric", "symmetric") else None
