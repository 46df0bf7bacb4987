"""The profile file: what each format costs each unit, and where that was measured.

May import: formats, sensitivity.graph/reading/store, bitplan for its version.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

import bitplan
from bitplan.formats.errors import FileInvalid
from bitplan.formats.kv.cache import KV_FORMATS
from bitplan.formats.rounding import ROUNDINGS
from bitplan.formats.table import DTYPES, FORMATS, stored_bytes
from bitplan.sensitivity.graph import ON_REQUEST, Unit, Unquantized
from bitplan.sensitivity.reading import PLAN_LIMIT, parse_json, read_bytes
from bitplan.sensitivity.store import write_text

Bytes = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
Size = Annotated[int, Field(ge=1, lt=1 << 40, strict=True)]
Nats = Annotated[float, Field(ge=-1e100, le=1e100)]
"""A loss whose sums over units stay finite."""
Loss = Annotated[float, Field(ge=0, le=1e100)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Text = Annotated[str, Field(max_length=1 << 16)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$", max_length=512)]
"""An exact dotted module or parameter name, which is also safe as a file name."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(Strict):
    sha256: Sha256
    blocks: Size
    length: Size


class TextFacts(Strict):
    source: Text
    tokens: Size
    """Calibration tokens, as requested: with the files, what is needed to cut the same parts again."""
    calibration: TextPart
    search: TextPart
    heldout: TextPart
    healing: TextPart | None = None
    """None: the calibration text, in files of an older schema."""

    def part(self, name: str) -> TextPart:
        """A text's by its name."""
        found: TextPart | None = getattr(self, name)
        return found or self.calibration


class ModelFacts(Strict):
    id: Text
    revision: Text | None
    config_sha256: Sha256
    weights_sha256: Sha256
    dtype: Text
    parameters: Size

    @field_validator("dtype")
    @classmethod
    def _is_float(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype[:40]!r} is none of {', '.join(DTYPES)}")
        return dtype


class Provenance(Strict):
    model: ModelFacts
    text: TextFacts
    seed: int = Field(ge=0, lt=1 << 63)
    device: Text
    versions: dict[Text, Text] = Field(min_length=1)

    def unknown_format(self, name: str) -> str:
        """What to say of a format that the table lacks: also which bitplan has it, if another one made the file."""
        made, own = self.versions.get("bitplan", bitplan.__version__), bitplan.__version__
        other = f": bitplan {made[:40]} made this file, this is {own}: install that version or a later one"
        return f"unknown format {name[:40]!r}{other if made != own else ''}"


class UnitEntry(Strict):
    name: Name
    kind: Literal["linear", "conv1d", "embedding", "experts", "tied"]
    parameter: Name
    experts: Size
    rows: Size
    columns: Size
    dtype: Text
    tied: tuple[Name, ...] = ()
    group: Name

    @property
    def holders(self) -> list[str]:
        """Names of the parameters that share the unit's weight: its own, and those tied to it."""
        name = self.parameter.rpartition(".")[2]
        return [self.parameter, *(f"{path}.{name}" for path in self.tied)]

    def nbytes(self, format: str) -> int:
        """Bytes of the unit in a format. Raises UnknownFormat."""
        return stored_bytes(format, DTYPES.get(self.dtype, ""), self.experts * self.rows, self.columns)


class UnquantizedEntry(Strict):
    name: Name
    shape: tuple[Annotated[int, Field(ge=0, lt=1 << 40)], ...] = Field(max_length=16)
    dtype: Text
    bytes: Bytes
    reason: Text

    @field_validator("reason")
    @classmethod
    def _renamed(cls, reason: str) -> str:
        """Files made before say `kept`."""
        return ON_REQUEST if reason == "kept on request" else reason


class ProfileRow(Strict):
    unit: Name
    format: Text
    rounding: Text
    bytes: Bytes
    predicted_nll: Loss
    """Nats per token above full precision, from the second moments."""
    measured_nll: Nats | None = None
    """Nats per token above full precision with this unit alone exchanged, on the search text."""
    measured_nll_se: Loss | None = None
    """None too where the search text is one block."""
    measured_kl: Nats | None = None

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

    format: Text
    kl: Nats
    kl_se: Nats | None
    delta_nll: Nats


class CheckRow(Strict):
    """One unit alone in one format, on the search text: what was predicted for it, and what was measured."""

    unit: Name
    format: Text
    rounding: Text
    predicted_nll: Loss
    measured_nll: Nats
    measured_kl: Nats


class Check(Strict):
    """A sample of units that was measured to check the predictions; nats per token."""

    rows: Annotated[tuple[CheckRow, ...], FailFast()]
    spearman: float | None = Field(ge=-1, le=1)
    """Rank correlation of predicted loss and measured KL; None where either is constant."""
    ratio: float = Field(gt=0, le=1e100)
    """The median of measured KL over predicted loss: the factor by which the profile's predictions were rescaled."""


class Profile(Strict):
    schema_version: Literal[3] = 3
    provenance: Provenance
    tier: Literal["curvature", "measured", "weights"] = "curvature"
    """Losses from second moments; each measured alone; or, roughly, from the weights' relative errors."""
    around: Text | None = None
    """The format, or the plan's fingerprint, that all other units were in when each was measured; None: unquantized."""
    check: Check | None = None
    full_precision_nll: Nats | None = None
    """On the search text, where it was run."""
    units: Annotated[tuple[UnitEntry, ...], FailFast()]
    unquantized: Annotated[tuple[UnquantizedEntry, ...], FailFast()]
    rows: Annotated[tuple[ProfileRow, ...], FailFast()]
    kv_cache: Annotated[tuple[CacheRow, ...], FailFast()] = ()

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        """Schema 1 called unquantized tensors kept, and 2 had no healing text."""
        refuse_newer(data, 3)
        if not isinstance(data, dict) or data.get("schema_version") not in (1, 2):
            return data
        old = {"kept": "unquantized"} if data["schema_version"] == 1 else {}
        return {old.get(key, key): value for key, value in data.items()} | {"schema_version": 3}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """Units, rows and unquantized tensors agree with each other and with the table of formats."""
        refuse_untrue_tensors(self.units, self.unquantized)
        _refuse_repeated("row", [f"{row.unit} in {row.format}/{row.rounding}" for row in self.rows])
        _refuse_repeated("KV cache format", [row.format for row in self.kv_cache])
        units = {unit.name: unit for unit in self.units}
        schemes: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for row in self.rows:
            if row.unit not in units:
                raise ValueError(f"a row is of {row.unit}, which is no unit of the profile")
            if row.format not in FORMATS:
                raise ValueError(f"unit {row.unit}: {self.provenance.unknown_format(row.format)}")
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
            raise ValueError(f"the KV cache has an unknown format {unknown[0][:40]!r}")
        return self

    @property
    def unquantized_bytes(self) -> int:
        return sum(entry.bytes for entry in self.unquantized)


def refuse_newer(data: Any, schema: int) -> None:
    """Raises ValueError where a file's content says a schema that a later bitplan reads, and names the one that wrote
    it."""
    found = data.get("schema_version") if isinstance(data, dict) else None
    if type(found) is int and found > schema:
        provenance = data.get("provenance")
        versions = provenance.get("versions") if isinstance(provenance, dict) else None
        made = versions.get("bitplan") if isinstance(versions, dict) else None
        by = f", which bitplan {made[:40]} wrote" if isinstance(made, str) else ""
        raise ValueError(f"schema {found}{by}: bitplan {bitplan.__version__} reads up to {schema}, install a later one")


def _refuse_repeated(kind: str, names: Iterable[Hashable]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{kind} {name} is there more than once")
        seen.add(name)


def refuse_untrue_tensors(units: Sequence[UnitEntry], unquantized: Sequence[UnquantizedEntry]) -> None:
    """Raises ValueError where a tensor is there twice, or its parts do not go together."""
    _refuse_repeated("tensor", [unit.name for unit in units] + [entry.name for entry in unquantized])
    _refuse_repeated("parameter", [name for unit in units for name in unit.holders])
    for unit in units:
        if unit.dtype not in DTYPES:
            raise ValueError(f"unit {unit.name}: unknown dtype {unit.dtype[:40]!r}")
        if unit.parameter not in (unit.name, f"{unit.name}.{unit.parameter.rpartition('.')[2]}"):
            raise ValueError(f"unit {unit.name}: {unit.parameter} is no parameter of its module")
    for entry in unquantized:
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{entry.name}: unknown dtype {entry.dtype[:40]!r}")
        if entry.bytes != (true := prod(entry.shape) * dtype.itemsize):
            raise ValueError(f"{entry.name}: {entry.bytes} bytes, but its shape takes {true}")


def _refuse_untrue(row: ProfileRow, unit: UnitEntry) -> None:
    """Raises ValueError where a row's format, rounding, bytes or measured figures do not go together."""
    if row.rounding not in ROUNDINGS or not ROUNDINGS[row.rounding].fits(FORMATS[row.format]):
        raise ValueError(f"unit {unit.name}: {row.format} has no rounding {row.rounding[:40]!r}")
    if row.bytes != (true := unit.nbytes(row.format)):
        raise ValueError(f"unit {unit.name}: {row.bytes} bytes, but {row.format} takes {true}")
    if (row.measured_nll is None) != (row.measured_kl is None) or (row.measured_nll is None and row.measured_nll_se):
        raise ValueError(f"unit {unit.name}: {row.format} has some of its measured figures, and not the others")


def unit_entry(unit: Unit) -> UnitEntry:
    facts = {name: value for name, value in asdict(unit).items() if name in UnitEntry.model_fields}
    return UnitEntry(**facts | {"dtype": str(unit.dtype).removeprefix("torch.")})


def unquantized_entry(tensor: Unquantized) -> UnquantizedEntry:
    return UnquantizedEntry(
        name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, bytes=tensor.nbytes, reason=tensor.reason
    )


Model = TypeVar("Model", bound=BaseModel)


def read(path: Path, kind: type[Model]) -> Model:
    """Read a plan or profile file. Raises FileInvalid, which names the first thing that is wrong."""
    wrong = f"{path} is no valid {kind.__name__.lower()} file"
    data = parse_json(read_bytes(path, PLAN_LIMIT), f"{wrong}: it", strict=True)
    return validated(data, kind, wrong)


def validated(data: Any, kind: type[Model], wrong: str) -> Model:
    """A plan or profile from parsed JSON. Raises FileInvalid: `wrong`, the field, and what is the matter with it."""
    schema = data.get("schema_version") if isinstance(data, dict) else None
    if schema is not None and type(schema) is not int:  # 3.0 and true equal whole numbers
        raise FileInvalid(f"{wrong} at schema_version: it must be a whole number, not {repr(schema)[:40]}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        reason = first["msg"].removeprefix("Value error, ")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise FileInvalid(f"{wrong}{f' at {where}' if where else ''}: {reason[:1000]}{more}") from None


def write(path: Path, content: BaseModel) -> None:
    write_text(path, content.model_dump_json(indent=1) + "\n")
