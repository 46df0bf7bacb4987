"""The profile file: what each format costs each unit, and where that was measured.

May import: formats, sensitivity.graph/store.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitplan.formats.errors import FileInvalid, first_line
from bitplan.formats.kv.cache import KV_FORMATS
from bitplan.formats.rounding import ROUNDINGS
from bitplan.formats.table import DTYPES, FORMATS, stored_bytes
from bitplan.sensitivity.graph import Unit, Unquantized
from bitplan.sensitivity.store import write_text

Bytes = Annotated[int, Field(ge=0, strict=True)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$", max_length=512)]
"""An exact dotted module or parameter name, which is also safe as a file name."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(Strict):
    sha256: Sha256
    blocks: int = Field(ge=1)
    length: int = Field(ge=2)


class TextFacts(Strict):
    source: str
    tokens: int = Field(ge=1)
    """Calibration tokens that were asked for: with the files, what is needed to cut the same parts again."""
    calibration: TextPart
    search: TextPart
    heldout: TextPart


class ModelFacts(Strict):
    id: str
    revision: str | None
    config_sha256: Sha256
    weights_sha256: Sha256
    dtype: str
    parameters: int = Field(ge=1)


class Provenance(Strict):
    model: ModelFacts
    text: TextFacts
    seed: int
    device: str
    versions: dict[str, str]


class UnitEntry(Strict):
    name: Name
    kind: Literal["linear", "conv1d", "embedding", "experts", "tied"]
    parameter: Name
    experts: int = Field(ge=1)
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    dtype: str
    tied: tuple[Name, ...] = ()
    group: Name

    def nbytes(self, format: str) -> int:
        """Bytes of the unit in a format. Raises UnknownFormat."""
        return stored_bytes(format, DTYPES.get(self.dtype, ""), self.experts * self.rows, self.columns)


class UnquantizedEntry(Strict):
    name: Name
    shape: tuple[int, ...]
    dtype: str
    bytes: Bytes
    reason: str


class ProfileRow(Strict):
    unit: Name
    format: str
    rounding: str
    bytes: Bytes
    predicted_nll: float = Field(ge=0)
    """Nats per token above full precision, from the second moments."""
    measured_nll: float | None = None
    """Nats per token above full precision with this unit alone exchanged, on the search text."""
    measured_nll_se: float | None = Field(default=None, ge=0)
    """None too where the search text is one block."""
    measured_kl: float | None = None

    @property
    def delta_nll(self) -> float:
        """The measured loss where there is one, else the predicted."""
        return self.predicted_nll if self.measured_nll is None else self.measured_nll

    @property
    def cost(self) -> float:
        """What a plan minimises: never negative, and KL where it was measured, for it is less noisy than nats."""
        return self.predicted_nll if self.measured_kl is None else max(0.0, self.measured_kl)


class CacheRow(Strict):
    """A KV cache in a format, with full-precision weights, on the search text. Nats per token; one block of text has
    no standard error."""

    format: str
    kl: float
    kl_se: float | None
    delta_nll: float


class CheckRow(Strict):
    """One unit alone in one format, on the search text: what was predicted for it, and what was measured."""

    unit: Name
    format: str
    rounding: str
    predicted_nll: float = Field(ge=0)
    measured_nll: float
    measured_kl: float


class Check(Strict):
    """A sample of units that was measured to check the predictions; nats per token."""

    rows: tuple[CheckRow, ...]
    spearman: float | None = Field(ge=-1, le=1)
    """Rank correlation of predicted loss and measured KL; None where either is constant."""
    ratio: float = Field(gt=0)
    """The median of measured KL over predicted loss: the factor by which the profile's predictions were rescaled."""


class Profile(Strict):
    schema_version: Literal[2] = 2
    provenance: Provenance
    tier: Literal["curvature", "measured", "weights"] = "curvature"
    """Losses from second moments; each measured alone; or, roughly, from the weights' relative errors."""
    around: str | None = None
    """The format, or the plan's fingerprint, that all other units were in when each was measured; None: unquantized."""
    check: Check | None = None
    full_precision_nll: float | None = None
    """On the search text, where it was run."""
    units: tuple[UnitEntry, ...]
    unquantized: tuple[UnquantizedEntry, ...]
    rows: tuple[ProfileRow, ...]
    kv_cache: tuple[CacheRow, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        """Schema 1 called unquantized tensors kept."""
        if not isinstance(data, dict) or data.get("schema_version") != 1:
            return data
        renamed = {"unquantized" if key == "kept" else key: value for key, value in data.items()}
        return renamed | {"schema_version": 2}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """Units, rows and unquantized tensors agree with each other and with the table of formats."""
        _refuse_repeated("tensor", [unit.name for unit in self.units] + [entry.name for entry in self.unquantized])
        _refuse_repeated("row", [f"{row.unit} in {row.format}/{row.rounding}" for row in self.rows])
        _refuse_repeated("KV cache format", [row.format for row in self.kv_cache])
        for entry in self.unquantized:
            dtype = getattr(torch, entry.dtype, None)
            if isinstance(dtype, torch.dtype) and entry.bytes != (true := prod(entry.shape) * dtype.itemsize):
                raise ValueError(f"{entry.name}: {entry.bytes} bytes, but its shape takes {true}")
        units = {unit.name: unit for unit in self.units}
        for unit in self.units:
            if unit.dtype not in DTYPES:
                raise ValueError(f"unit {unit.name}: unknown dtype {unit.dtype!r}")
        schemes: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for row in self.rows:
            if row.unit not in units:
                raise ValueError(f"a row is of {row.unit}, which is no unit of the profile")
            _refuse_untrue(row, units[row.unit])
            schemes[row.unit].add((row.format, row.rounding))
        groups: dict[str, set[tuple[str, str]]] = {}
        for unit in self.units:
            if unit.name not in schemes:
                raise ValueError(f"unit {unit.name} has no row")
            groups[unit.group] = groups.get(unit.group, schemes[unit.name]) & schemes[unit.name]
            if not groups[unit.group]:
                raise ValueError(f"unit {unit.name} has no format that its group {unit.group} shares")
        if unknown := [row.format for row in self.kv_cache if row.format not in KV_FORMATS]:
            raise ValueError(f"the KV cache has an unknown format {unknown[0]!r}")
        return self

    @property
    def unquantized_bytes(self) -> int:
        return sum(entry.bytes for entry in self.unquantized)


def _refuse_repeated(kind: str, names: Iterable[Hashable]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{kind} {name} is there more than once")
        seen.add(name)


def _refuse_untrue(row: ProfileRow, unit: UnitEntry) -> None:
    """Raises ValueError where a row's format, rounding, bytes or measured figures do not go together."""
    if row.format not in FORMATS:
        raise ValueError(f"unit {unit.name}: unknown format {row.format!r}")
    if row.rounding not in ROUNDINGS or not ROUNDINGS[row.rounding].fits(FORMATS[row.format]):
        raise ValueError(f"unit {unit.name}: {row.format} has no rounding {row.rounding!r}")
    if row.bytes != (true := unit.nbytes(row.format)):
        raise ValueError(f"unit {unit.name}: {row.bytes} bytes, but {row.format} takes {true}")
    if (row.measured_nll is None) != (row.measured_kl is None) or (row.measured_nll is None and row.measured_nll_se):
        raise ValueError(f"unit {unit.name}: {row.format} has some of its measured figures, and not the others")


def unit_entry(unit: Unit) -> UnitEntry:
    facts = {name: value for name, value in asdict(unit).items() if name in UnitEntry.model_fields}
    return UnitEntry(**facts | {"dtype": str(unit.dtype).removeprefix("torch.")})


def unquantized_entry(kept: Unquantized) -> UnquantizedEntry:
    return UnquantizedEntry(name=kept.name, shape=kept.shape, dtype=kept.dtype, bytes=kept.nbytes, reason=kept.reason)


Model = TypeVar("Model", bound=BaseModel)


def read(path: Path, kind: type[Model]) -> Model:
    """Read a plan or profile file. Raises FileInvalid, which names the first thing that is wrong."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FileInvalid(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        place = f" at {where}" if where else ""
        raise FileInvalid(f"{path} is no valid {kind.__name__.lower()} file{place}: {first['msg']}{more}") from None


def write(path: Path, content: BaseModel) -> None:
    write_text(path, content.model_dump_json(indent=1) + "\n")
