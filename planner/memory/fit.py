"""Does it fit: a device's memory against a model in plain formats, and what a mixed plan would have on it.

The model is looked at on torch's meta device, so its config is all that is read: no weight, and no text.
May import: formats, sensitivity, planner.audit/budget/device/plan/room/show/workspace.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from bitplan.formats.errors import BitplanError, ModelUnreadable, first_line
from bitplan.formats.sizes import format_bytes
from bitplan.formats.table import DTYPES, MENU
from bitplan.planner.memory.budget import Room, alike, neediest, reserved, what_fits
from bitplan.planner.memory.device import Device, setting_of
from bitplan.planner.memory.footprint import Needs, foresee, meta_model
from bitplan.planner.plan import KVCache
from bitplan.planner.report.show import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import unit_entry
from bitplan.sensitivity.bank import unit_bytes
from bitplan.sensitivity.graph import Kept, Unit, find_units
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.store import sha256

SHOWN = ("int8", "int4-g128", "int3-g64")
"""Formats of the table, between the checkpoint's own type and the floor of what plans choose from. What a format needs
beside its weights hangs on its kernel and its group, so the neediest of these are the neediest of all."""
HEADERS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types as safetensors' headers name them."""


@dataclass(frozen=True)
class Row:
    """A model in one format on the device. Bytes."""

    format: str
    weights: int
    needs: Needs
    room: Room

    @property
    def workspace(self) -> int:
        return self.needs.workspace + self.room.device.taken

    @property
    def total(self) -> int:
        return self.weights + self.needs.kv_cache + self.workspace + self.room.reserve

    @property
    def spare(self) -> int:
        """What is left of the device; below zero: what it lacks."""
        return self.room.device.memory - self.total

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "weights": self.weights,
            "kv_cache": self.needs.kv_cache,
            "workspace": self.workspace,
            "reserve": self.room.reserve,
            "total": self.total,
            "fits": self.spare >= 0,
        }


@dataclass(frozen=True)
class Fit:
    room: Room
    """What `bitplan plan` would have for weights."""
    native: str
    """The checkpoint's own type, as a format."""
    rows: tuple[Row, ...]
    """By falling bytes."""
    parameters: int
    least: int
    """Bytes of the smallest allocation that `bitplan plan` can choose."""
    way_out: str | None = None
    """What would fit, where nothing does."""

    @property
    def largest(self) -> Row | None:
        """The first of the plain formats that fits."""
        return next((row for row in self.rows if row.spare >= 0), None)

    @property
    def mixed(self) -> int | None:
        """Bytes of weights that a mixed plan has; None where a float type fits, or no plan does."""
        plain = self.largest is not None and self.largest.format in DTYPES.values()
        return None if plain or self.room.weights < self.least else self.room.weights

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
        setting, mixed = self.room.setting, None
        if self.mixed is not None:
            mixed = {"bytes": self.mixed, "bits_per_weight": self.mixed * 8 / self.parameters}
        return {
            "command": self.command(plan),
            "device": {"asked": self.room.device.asked, "bytes": self.room.device.memory},
            "context": setting.context,
            "batch": setting.batch,
            "kv_format": setting.kv_format,
            "prefill_chunk": setting.chunk,
            "parameters": self.parameters,
            "fits": [row.as_dict() for row in self.rows],
            "largest_that_fits": self.largest.format if self.largest else None,
            "mixed": mixed,
        }


def fit(found: Device, reserve: str | None, source: Source, kv_cache: KVCache) -> Fit:
    """The arithmetic of a device. Units are all weights that could take a format: that a few are kept, which only a run
    of the model shows, is not known here. Raises UsageError, ModelUnreadable, BitplanError."""
    setting = setting_of(kv_cache)
    assert setting is not None
    dtype = checkpoint_dtype(source)
    plain = _on_meta(source, dtype)
    units, kept = find_units(plain)
    if not units:
        raise ModelUnreadable(f"{source.model} has no weight that can take a format")
    floor = [min((unit_bytes(unit, name), name) for name in MENU) for unit in units]
    least = sum(size for size, _ in floor) + sum(tensor.nbytes for tensor in kept)
    lowest = tuple(dict.fromkeys(name for _, name in floor))
    names = dict.fromkeys((*SHOWN, *lowest))
    models = alike(source, dtype, [unit_entry(replace(unit, group=unit.name)) for unit in units], names)
    found_needs = [foresee(model, setting, found.on) for model in progress(models, desc="memory", unit="format")]
    room = Room(found, reserved(found, reserve), setting, neediest(found_needs))

    native, needs = DTYPES[dtype], dict(zip((DTYPES[dtype], *names), found_needs, strict=True))
    rows = [Row(native, _bytes(units, kept, native), needs[native], room)]
    if native == "fp32":
        half = _on_meta(source, "bfloat16")
        rows.append(Row("bf16", _bytes(*find_units(half), "bf16"), foresee(half, setting, found.on), room))
    rows += [Row(name, _bytes(units, kept, name), needs[name], room) for name in SHOWN]
    rows.append(Row(",".join(lowest), least, neediest(needs[name] for name in lowest), room))
    fitting = any(row.spare >= 0 for row in rows)
    way_out = None if fitting else what_fits(room, least, models, found_needs)
    return Fit(room, native, tuple(rows), plain.num_parameters(), least, way_out)


def _bytes(units: list[Unit], kept: list[Kept], format: str) -> int:
    return sum(unit_bytes(unit, format) for unit in units) + sum(tensor.nbytes for tensor in kept)


def fit_text(found: Fit) -> str:
    """What fills the device, a row a format."""
    rows = []
    for row in found.rows:
        name = f"{row.format}, as it is" if row.format == found.native else row.format
        name += ", the floor" if row is found.rows[-1] else ""
        terms = (row.weights, row.needs.kv_cache, row.workspace, row.room.reserve, row.total)
        verdict = f"fits, {format_bytes(row.spare)} spare" if row.spare >= 0 else f"{format_bytes(-row.spare)} too much"
        rows.append((name, *(f"{size:,}" for size in terms), verdict))
    head = ("bytes", "weights", "KV cache", "workspace", "reserve", "sum", f"of {found.room.device.memory:,}")
    context = (
        f"; the workspace holds {format_bytes(taken)} of CUDA context" if (taken := found.room.device.taken) else ""
    )
    return "\n".join([f"{found.room.described}{context}", table(head, rows)])


# The model without its weights


def find_shape(model: str, trust_remote_code: bool = False) -> Source:
    """A model by its config: its weights need not be here, and are not fetched; without them its fingerprint is empty.

    Raises ModelUnreadable.
    """
    folder, commit = Path(model), None
    if not folder.is_dir():
        folder = sources.download(model, wanted=("config.json", "*.py"))
        commit = folder.name
    config = folder / "config.json"
    if any(folder.glob("*.safetensors")) or not _is_json(config):
        return replace(sources.find(folder, None, trust_remote_code), model=model, revision=commit)
    return Source(model, folder, commit, "", sha256(config.read_bytes()), trust_remote_code)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def checkpoint_dtype(source: Source) -> str:
    """The type that transformers loads the checkpoint in: the config's, or the first float tensor's. Raises
    ModelUnreadable."""
    sources.refuse_quantized(source)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, error) from error
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
