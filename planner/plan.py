"""The plan file: allocation, prediction, measurement, provenance. May import: formats, sensitivity.profile."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, model_validator

from bitplan.formats.kv.cache import KV_FORMATS
from bitplan.formats.rounding import ROUNDINGS
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.sensitivity.profile import (
    Bytes,
    ModelFacts,
    Name,
    Nats,
    Provenance,
    Seconds,
    Sha256,
    Size,
    Strict,
    Text,
    UnitEntry,
    UnquantizedEntry,
    refuse_newer,
    refuse_untrue_tensors,
)


class PlannedUnit(UnitEntry):
    format: Text
    rounding: Text
    bytes: Bytes

    @property
    def is_native(self) -> bool:
        """Whether the unit stays in the checkpoint's own dtype."""
        return DTYPES.get(self.dtype) == self.format

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(self.format, self.rounding)


class Budget(Strict):
    """The budget as requested, and its bytes for weights; for a device, also the terms subtracted from its memory."""

    requested: Text
    weights: Bytes
    device: Bytes | None = None
    kv_cache: Bytes | None = None
    workspace: Bytes | None = None
    reserve: Bytes | None = None


class Workload(Strict):
    """How the model is used: `batch` sequences of `context` tokens, prompts read `prefill_chunk` tokens at a time, keys
    and values cached in `kv_format`. Without a context the memory beside the weights is not budgeted."""

    kv_format: Text = "native"
    context: Size | None = None
    batch: Size = 1
    prefill_chunk: Size | None = None


NATIVE_WORKLOAD = Workload()


class PlanLatency(Strict):
    """A limit on the seconds of one decoded token, and what the plan takes: predicted by a speed table, and measured on
    the plan as it is loaded."""

    requested: Text
    limit: Seconds
    device: Text
    """What it holds for: the processor and its threads, or the GPU."""
    predicted: Seconds
    measured: Seconds | None = None


class KVCacheLoss(Strict):
    """The KV cache's format with full-precision weights, on the held-out text. Nats per token; one block of text has
    no standard error."""

    kl: Nats
    kl_se: Nats | None


class Predicted(Strict):
    """Nats per token above full precision, by the profile; no allocation within the budget has less than `bound`."""

    nll: Nats
    bound: Nats


class TaskMeasured(Strict):
    """A model on the held-out items of a task, beside full precision on the same items."""

    items: Size
    baseline: Nats
    """Full precision's accuracy, or its nats per token where the task is text."""
    quantized: Nats
    difference: Nats
    low: Nats
    high: Nats
    """A 95 % interval of the paired difference."""
    loss: Nats
    """Mean nats an item above full precision, which the search makes least (`sensitivity.score.losses`)."""
    loss_se: Nats


class Measured(Strict):
    """The materialised model on the held-out text, beside the full-precision model. Nats per token; one block
    of text has no standard errors."""

    tokens: Size
    nll: Nats
    ppl: float
    delta_nll: Nats
    delta_nll_se: Nats | None
    kl: Nats
    kl_se: Nats | None
    task: TaskMeasured | None = None

    @property
    def loss(self) -> float:
        """What the better of two plans has less of: the task's loss where there is a task, else KL."""
        return self.task.loss if self.task else self.kl


class Uniform(Strict):
    """The best plan of one format that fits the same bytes."""

    format: Text
    rounding: Text
    bytes: Bytes
    predicted_nll: Nats
    measured: Measured | None = None


class TaskFacts(Strict):
    """The task that a plan was searched for: which items, and how many chose and were reported."""

    name: Text
    kind: Literal["choice", "exact", "text"]
    sha256: Sha256
    search_items: Size
    heldout_items: Size


class Finalist(Strict):
    """An allocation that was finished as the plan is, and what it lost on the search text, which chose among them."""

    name: Text
    bytes: Bytes
    loss: Nats
    loss_se: Nats | None
    """Over blocks of text; null for one block, and for a task."""


class Search(Strict):
    """Losses are KL on the search text in nats per token, or with a task its mean loss on the search half."""

    trials: Size
    best_trial: Annotated[int, Field(ge=0, lt=1 << 40)]
    loss: Nats
    """Of the best trial. Trials are rounded in sequence on a part of the calibration text, and so lose more than
    finalists."""
    first_loss: Nats | None
    """Of the knapsack's own solution; null where it was not finite."""
    task: TaskFacts | None = None
    finalists: tuple[Finalist, ...] = ()
    """By rising loss: the first is the search's plan."""


class PlanOverride(Strict):
    """What a person decided against the search, as it was typed, and the exact units that it named: their groups follow
    it."""

    option: Literal["keep", "set", "at-least"]
    glob: Text
    format: Text | None = None
    units: Annotated[tuple[Name, ...], FailFast()]

    def __str__(self) -> str:
        return f"--{self.option} '{self.glob}{f'={self.format}' if self.format else ''}'"


RENAMED = {
    "budget": {"asked": "requested", "bytes": "weights"},
    "search": {"kl": "loss", "first_kl": "first_loss"},
    "kv_cache": {"format": "kv_format", "chunk": "prefill_chunk"},
}
"""Names within fields of schemas 1 to 3 → today's."""


def _renamed(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in data.items()}


class Plan(Strict):
    schema_version: Literal[6] = 6
    budget: Budget
    bytes: Bytes
    bits_per_weight: float = Field(ge=0, le=1e6)
    shipped: Literal["search", "uniform"]
    """Whose allocation this is: the uniform one's where that did better on the held-out text."""
    units: Annotated[tuple[PlannedUnit, ...], FailFast()] = Field(min_length=1)
    unquantized: Annotated[tuple[UnquantizedEntry, ...], FailFast()]
    overrides: Annotated[tuple[PlanOverride, ...], FailFast()] = ()
    distilled: bool = False
    """Whether scales and unquantized vectors are distilled from the full-precision model after rounding."""
    workload: Workload = NATIVE_WORKLOAD
    kv_cache_loss: KVCacheLoss | None = None
    latency: PlanLatency | None = None
    predicted: Predicted | None = None
    search: Search | None = None
    measured: Measured | None = None
    uniform: Uniform | None = None
    provenance: Provenance

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        """Schemas 1 to 3 had other names, 4 no latency, and 5 no healing text."""
        refuse_newer(data, 6)
        if not isinstance(data, dict) or data.get("schema_version") not in (1, 2, 3, 4, 5):
            return data
        upgraded = data | {"schema_version": 6}
        if data["schema_version"] > 3:
            return upgraded
        upgraded = _renamed(upgraded, {"kept": "unquantized", "healed": "distilled"})
        for field, names in RENAMED.items():
            if isinstance(part := upgraded.get(field), dict):
                upgraded[field] = _renamed(part, names)
        if isinstance(predicted := upgraded.get("predicted"), dict):
            upgraded["predicted"] = {name: value for name, value in predicted.items() if name != "gap"}
        if isinstance(cache := upgraded.pop("kv_cache", None), dict):
            upgraded["workload"] = {name: value for name, value in cache.items() if name not in ("kl", "kl_se")}
            if cache.get("kl") is not None:
                upgraded["kv_cache_loss"] = {"kl": cache["kl"], "kl_se": cache.get("kl_se")}
        return upgraded

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        refuse_untrue_tensors(self.units, self.unquantized)
        if self.workload.kv_format not in KV_FORMATS:
            raise ValueError(f"the KV cache has an unknown format {self.workload.kv_format[:40]!r}")
        formats: dict[Name, str] = {}
        for unit in self.units:
            if unit.format not in FORMATS:
                raise ValueError(f"unit {unit.name}: {self.provenance.unknown_format(unit.format)}")
            if unit.rounding not in ROUNDINGS or not ROUNDINGS[unit.rounding].fits(FORMATS[unit.format]):
                raise ValueError(f"unit {unit.name}: {unit.format} has no rounding {unit.rounding[:40]!r}")
            if formats.setdefault(unit.group, unit.format) != unit.format:
                raise ValueError(
                    f"unit {unit.name}: {unit.format}, but its group {unit.group} has {formats[unit.group]}"
                )
            true = unit.nbytes(unit.format)
            if unit.bytes != true:
                raise ValueError(f"unit {unit.name}: {unit.bytes} bytes, but {unit.format} takes {true}")
        total = sum(unit.bytes for unit in self.units) + sum(entry.bytes for entry in self.unquantized)
        if total != self.bytes:
            raise ValueError(
                f"the plan says {self.bytes} bytes, and its units and unquantized tensors add up to {total}"
            )
        return self

    def for_model(self, facts: ModelFacts) -> Self:
        """The same plan with other facts of its model."""
        return self.model_copy(update={"provenance": self.provenance.model_copy(update={"model": facts})})

    @property
    def packed(self) -> list[PlannedUnit]:
        """Units that have codes."""
        return [unit for unit in self.units if not unit.is_native]

    @property
    def needs_text(self) -> bool:
        """Whether its codes depend on calibration text; they are then computed once and cached."""
        return bool(self.packed) and (self.distilled or any(ROUNDINGS[u.rounding].needs_text for u in self.packed))

    @property
    def research(self) -> list[str]:
        """Its formats that are at research stage."""
        return sorted({unit.format for unit in self.packed if FORMATS[unit.format].is_research})

    @property
    def rounding(self) -> str:
        """The roundings of its units, as text."""
        names = dict.fromkeys(unit.rounding for unit in self.packed)
        return " and ".join(names) + (", distilled" if self.distilled else "") if names else "none"
