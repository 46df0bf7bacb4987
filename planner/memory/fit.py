"""Does it fit: a device's memory against a model in plain formats, and what a mixed plan would have on it.

The model is looked at on torch's meta device, so its config is all that is read: no weight, and no text.
May import: formats, sensitivity, planner.plan, the modules beside it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from bitplan.formats.errors import BitplanError, ModelUnreadable, first_line
from bitplan.formats.table import DEFAULT_FORMATS, DTYPES
from bitplan.planner.memory.budget import DeviceBudget, largest_estimate, meta_models, reserved, what_fits
from bitplan.planner.memory.chunks import keeps_only_tokens
from bitplan.planner.memory.device import Device
from bitplan.planner.memory.footprint import MemoryEstimate, estimate_memory, meta_model
from bitplan.planner.plan import Workload
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.fingerprint import config_fingerprint
from bitplan.sensitivity.graph import Unit, Unquantized, find_units
from bitplan.sensitivity.profile import unit_entry
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.source import Source

SHOWN = ("int8", "int4-g128", "int3-g64")
"""Formats of the table, between the checkpoint's own type and the floor of what plans choose from. What a format needs
beside its weights depends on its kernel and its group, so the most of these is the most of all."""
HEADERS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types as safetensors' headers name them."""


@dataclass(frozen=True)
class FitRow:
    """A model in one format on the device. Bytes."""

    format: str
    weights: int
    estimate: MemoryEstimate
    budget: DeviceBudget

    @property
    def workspace(self) -> int:
        return self.estimate.workspace + self.budget.device.context

    @property
    def total(self) -> int:
        return self.weights + self.estimate.kv_cache + self.workspace + self.budget.reserve

    @property
    def spare(self) -> int:
        """What is left of the device; below zero: what it lacks."""
        return self.budget.device.memory - self.total

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "weights": self.weights,
            "kv_cache": self.estimate.kv_cache,
            "workspace": self.workspace,
            "reserve": self.budget.reserve,
            "total": self.total,
            "fits": self.spare >= 0,
        }


@dataclass(frozen=True)
class Fit:
    budget: DeviceBudget
    """What `bitplan plan` would have for weights."""
    native: str
    """The checkpoint's own type, as a format."""
    rows: tuple[FitRow, ...]
    """By falling bytes."""
    parameters: int
    least: int
    """Bytes of the smallest allocation that `bitplan plan` can choose."""
    way_out: str | None = None
    """What would fit, where nothing does."""

    @property
    def largest(self) -> FitRow | None:
        """The first of the plain formats that fits."""
        return next((row for row in self.rows if row.spare >= 0), None)

    @property
    def mixed(self) -> int | None:
        """Bytes of weights that a mixed plan has; None where a float type fits, or no plan does."""
        plain = self.largest is not None and self.largest.format in DTYPES.values()
        return None if plain or self.budget.weights < self.least else self.budget.weights

    @property
    def format(self) -> str | None:
        """The answer in a word."""
        return "mixed" if self.mixed else self.largest.format if self.largest else None

    @property
    def answer(self) -> str:
        """The answer in a sentence."""
        if self.largest is None:
            return f"nothing fits: {self.way_out}"
        name = self.largest.format
        if name == self.native:
            return f"{name} fits as it is: no quantization is needed"
        if name in DTYPES.values():
            return f"{name} fits, half of {self.native}: load it in that type, no quantization is needed"
        if self.mixed is None:
            return f"{name} is the largest plain format that fits, and a mixed plan has no room"
        bits = self.mixed * 8 / self.parameters
        return (
            f"{name} is the largest plain format that fits; a mixed plan of {self.mixed:,} bytes ({bits:.3f} bits per"
            f" weight) uses what is left for the sensitive layers"
        )

    def command(self, plan: str) -> str | None:
        """The command that makes what fits, where it is a plan; `plan` is `bitplan plan` for this device."""
        if self.mixed is not None:
            return plan
        return f"{plan} --formats {self.format}" if self.format and self.format not in DTYPES.values() else None

    def as_dict(self, plan: str) -> dict[str, Any]:
        workload, mixed = self.budget.workload, None
        if self.mixed is not None:
            mixed = {"bytes": self.mixed, "bits_per_weight": self.mixed * 8 / self.parameters}
        return {
            "command": self.command(plan),
            "device": {"requested": self.budget.device.requested, "bytes": self.budget.device.memory},
            "context": workload.context,
            "batch": workload.batch,
            "kv_format": workload.kv_format,
            "prefill_chunk": workload.prefill_chunk,
            "parameters": self.parameters,
            "fits": [row.as_dict() for row in self.rows],
            "largest_that_fits": self.largest.format if self.largest else None,
            "mixed": mixed,
        }


def fit(device: Device, reserve: str | None, source: Source, workload: Workload) -> Fit:
    """The arithmetic of a device. Units are all weights that could take a format: that a few cannot, which only a run
    of the model shows, is not known here. Raises UsageError, ModelUnreadable, BitplanError."""
    dtype = checkpoint_dtype(source)
    if not keeps_only_tokens(source, dtype):  # only its weights show whether it can
        workload = workload.model_copy(update={"prefill_chunk": None})
    plain = _on_meta(source, dtype)
    units, unquantized = find_units(plain)
    if not units:
        raise ModelUnreadable(f"{source.model} has no weight that can take a format")
    smallest = [min((unit.nbytes(name), name) for name in DEFAULT_FORMATS) for unit in units]
    least = sum(size for size, _ in smallest) + sum(tensor.nbytes for tensor in unquantized)
    lowest = tuple(dict.fromkeys(name for _, name in smallest))
    names = dict.fromkeys((*SHOWN, *lowest))
    models = meta_models(source, dtype, [unit_entry(replace(unit, group=unit.name)) for unit in units], names)
    estimates = [
        estimate_memory(model, workload, device.on) for model in progress(models, desc="memory", unit="format")
    ]
    budget = DeviceBudget(device, reserved(device, reserve), workload, largest_estimate(estimates))

    native, of = DTYPES[dtype], dict(zip((DTYPES[dtype], *names), estimates, strict=True))
    rows = [FitRow(native, _bytes(units, unquantized, native), of[native], budget)]
    if native == "fp32":
        half = _on_meta(source, "bfloat16")
        estimate = estimate_memory(half, workload, device.on)
        rows.append(FitRow("bf16", _bytes(*find_units(half), "bf16"), estimate, budget))
    rows += [FitRow(name, _bytes(units, unquantized, name), of[name], budget) for name in SHOWN]
    rows.append(FitRow(",".join(lowest), least, largest_estimate(of[name] for name in lowest), budget))
    fitting = any(row.spare >= 0 for row in rows)
    way_out = None if fitting else what_fits(budget, least, models, estimates)
    return Fit(budget, native, tuple(rows), plain.num_parameters(), least, way_out)


def _bytes(units: list[Unit], unquantized: list[Unquantized], format: str) -> int:
    return sum(unit.nbytes(format) for unit in units) + sum(tensor.nbytes for tensor in unquantized)


# The model without its weights


def find_shape(model: str, trust_remote_code: bool = False) -> Source:
    """A model by its config: its weights need not be here, and are not fetched; without them `files` is empty.

    Raises ModelUnreadable.
    """
    folder, commit = Path(model), None
    if not folder.is_dir():
        folder = sources.download(model, wanted=("config.json", "*.py"))
        commit = folder.name
    config = folder / "config.json"
    if any(folder.glob("*.safetensors")) or not config.exists():
        return replace(sources.find(folder, None, trust_remote_code), model=model, revision=commit)
    return Source(model, folder, commit, (), config_fingerprint(folder, trust_remote_code), trust_remote_code)


def checkpoint_dtype(source: Source) -> str:
    """The type that transformers loads the checkpoint in: the config's, or the first float tensor's. Raises
    ModelUnreadable."""
    sources.refuse_quantized(source)
    config = sources.transformers_config(source)
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    for path in [] if dtype else sources.weight_files(source.folder)[:1]:
        with safe_open(path, "pt") as file:
            types = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
            dtype = next((HEADERS[name] for name in types if name in HEADERS), None)
    dtype = dtype or "float32"
    if dtype not in DTYPES:
        raise ModelUnreadable(f"{source.model} is in {dtype}: name a checkpoint in {', '.join(DTYPES)}")
    return dtype


def _on_meta(source: Source, dtype: str) -> PreTrainedModel:
    try:
        return meta_model(source, dtype, [])
    except BitplanError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Source, error: Exception) -> ModelUnreadable:
    reason = first_line(error)
    return ModelUnreadable(f"transformers cannot build {source.model} as a causal LM: {reason}")
