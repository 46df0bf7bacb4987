"""The interface of an export target, and the result of an export.

A target is another tool's format for plans. It states for each unit, native ones included, whether it is supported,
the name of its format in that tool, and its size there. May import: formats, sensitivity, planner.plan.
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
"""Unit kinds that are not plain linear layers → their description in messages."""


class Target(ABC):
    """A target for one plan. `source` is the plan's model, which only some targets require.

    `planner.export.export` calls `unsupported` for every unit, changes or refuses unsupported ones, then calls `word`
    and `nbytes` for each unit of the lowered plan, and finally `text`.
    """

    name: ClassVar[str]
    readers: ClassVar[str]
    """The tools that read it."""
    holds_codes: ClassVar[bool] = False
    """Whether the export is a checkpoint folder with the plan's own codes. Otherwise its reader rounds the model."""
    joins: ClassVar[bool] = True
    """Whether its readers fuse q/k/v and gate/up, which then need the same format."""

    def __init__(self, plan: Plan, source: Source | None):
        self.plan = plan
        self.source = source

    @abstractmethod
    def unsupported(self, unit: PlannedUnit) -> str | None:
        """The reason why a unit is not supported, phrased to follow its name in a message; None if it is supported."""

    @abstractmethod
    def word(self, unit: PlannedUnit) -> str:
        """The target's name for the format of a supported unit."""

    @abstractmethod
    def text(self, plan: Plan) -> str:
        """The file's contents, for a plan whose units are all supported."""

    def nbytes(self, unit: PlannedUnit) -> int:
        """Bytes of a supported unit in the target."""
        return unit.bytes

    def unquantized_nbytes(self, entry: UnquantizedEntry) -> int:
        """Bytes of an unquantized tensor in the target."""
        return entry.bytes

    def like(self, unit: PlannedUnit) -> str:
        """The format here whose predicted loss is nearest to that of a supported unit in the target."""
        return unit.format

    def notes(self, plan: Plan) -> list[str]:
        """Sentences on how to use the file."""
        return []


@dataclass(frozen=True)
class ExportedUnit:
    """A unit's format and bytes in the plan and in the target."""

    unit: str
    planned: str
    format: str
    """The exported format, which differs from `planned` if the target does not support that."""
    word: str
    """The target's name of `format`."""
    planned_bytes: int
    bytes: int
    nats: float | None
    """Change of the predicted loss in nats per token; None if unknown."""

    @property
    def is_changed(self) -> bool:
        return self.format != self.planned or self.bytes != self.planned_bytes


@dataclass(frozen=True)
class Exported:
    """The result of `planner.export.export`."""

    target: Target
    plan: Plan
    """The exported plan: the given one, unless `nearest` changed units."""
    lines: tuple[ExportedUnit, ...]
    text: str
    """The file's contents; for a target that holds codes, its quantization config."""
    planned_bytes: int
    bytes: int
    """Total in the target, unquantized tensors included."""
    notes: tuple[str, ...]

    @property
    def changes(self) -> list[ExportedUnit]:
        return [line for line in self.lines if line.is_changed]

    def as_dict(self) -> dict[str, object]:
        """The data of `--json`."""
        return {
            "target": self.target.name,
            "planned_bytes": self.planned_bytes,
            "bytes": self.bytes,
            "units": [vars(line) for line in self.lines],
            "notes": list(self.notes),
        }


def group_size(unit: PlannedUnit) -> int:
    """The number of columns that share a scale; -1, by these tools' convention, if the whole row does."""
    group = getattr(FORMATS[unit.format], "group", 0)
    return group if 0 < group < unit.columns else -1


def uneven(unit: PlannedUnit) -> str | None:
    """The reason against a unit whose group size does not divide its columns, which only bitplan's packing supports."""
    group = group_size(unit)
    return f"whose {unit.columns} columns are not a multiple of {group}" if unit.columns % max(group, 1) else None


def integer(unit: PlannedUnit) -> IntegerFormat | None:
    """The format of a packed unit if its codes and zero points are integers, else None."""
    format = None if unit.is_native else FORMATS[unit.format]
    return format if isinstance(format, IntegerFormat) and format.zero_point in ("asymmetric", "symmetric") else None
