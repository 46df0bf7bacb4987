"""Rounded weights, one per (unit, format, rounding), made when first asked for.

Roundings that need text are slow, so their codes are kept on disk: an interrupted audit goes on where it was, and a
plan is applied from the very codes that it was chosen with. May import: formats, sensitivity.curvature/graph/store.
"""

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bitplan.formats.base import Tensors
from bitplan.formats.errors import BitplanError, CodesMissing, RoundingFailed
from bitplan.formats.rounding import ROUNDINGS
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import format_named
from bitplan.sensitivity.curvature import StatisticsStore
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.store import cache_folder, load_tensors, locked, save_tensors, sha256, write_text

VERSION = "3"
"""Changes when the same inputs would give other codes."""
MARKER = "workspace.json"


def workspace(
    weights_sha256: str, config_sha256: str, calibration_sha256: str, seed: int, kept: Sequence[str] = ()
) -> Path:
    """The cache folder of everything that follows from a model, as this transformers runs it, from this text and this
    seed; `kept`: parameters that were kept on request, which shape the units."""
    model = (weights_sha256, config_sha256, version("transformers"))
    return cache_folder() / sha256(VERSION, *model, calibration_sha256, str(seed), *sorted(kept))[:24]


def mark_workspace(folder: Path, model: str) -> None:
    """Note in a workspace whose it is, for `bitplan cache`."""
    if not (folder / MARKER).exists():
        write_text(folder / MARKER, json.dumps({"model": model}))


def codes_path(folder: Path, unit: str, choice: QuantScheme) -> Path:
    return folder / "codes" / unit / f"{choice.format}.{choice.rounding}.safetensors"


class WeightCache:
    """`weight(unit)` gives a unit's float32 weight [experts * rows, columns]."""

    def __init__(self, folder: Path, weight: Callable[[Unit], Tensor], statistics: StatisticsStore):
        self.folder = folder
        self.weight = weight
        self.statistics = statistics
        self._hessians: tuple[str, list] = ("", [])

    def tensors(self, unit: Unit, choice: QuantScheme) -> Tensors:
        """Stored tensors of a unit in a choice. Raises RoundingFailed, CodesMissing."""
        rounding, path = ROUNDINGS[choice.rounding], codes_path(self.folder, unit.name, choice)
        if rounding.needs_text and (kept := load_tensors(path)):
            return from_file(kept)
        weight = self.weight(unit)
        if not weight.isfinite().all():
            raise RoundingFailed(f"{unit.name}: its weights hold NaN or infinity, so no format can hold them")
        assert rounding.alone is not None, choice
        if not rounding.needs_text:
            return rounding.alone(weight, format_named(choice.format), [])
        if unit not in self.statistics:
            raise CodesMissing(f"{unit.name}: {choice} needs calibration text")
        if self._hessians[0] != unit.name:
            self._hessians = (unit.name, self.statistics[unit].hessians())
        with locked(self.folder / "locks" / unit.name):
            if kept := load_tensors(path):
                return from_file(kept)  # another process has made it
            try:
                tensors = rounding.alone(weight, format_named(choice.format), self._hessians[1])
            except BitplanError as error:
                raise type(error)(f"{unit.name}: {error}") from error
            save_tensors(path, for_file(tensors))
        return tensors

    def dequantized(self, unit: Unit, choice: QuantScheme) -> Tensor:
        """A unit's weight in a choice, float32 [experts * rows, columns]."""
        if choice.format == unit.native:
            return self.weight(unit)
        return format_named(choice.format).dequantize(self.tensors(unit, choice), unit.columns, torch.float32)


def for_file(tensors: Tensors) -> Tensors:
    return {"codes" + suffix: tensor for suffix, tensor in tensors.items()}


def from_file(tensors: Tensors) -> Tensors:
    return {name.removeprefix("codes"): tensor for name, tensor in tensors.items()}
