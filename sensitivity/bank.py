"""Rounded weights, one per (unit, format, rounding), made when first asked for.

Roundings that need text are slow, so their codes are kept on disk: an interrupted audit goes on where it was, and a
plan is applied from the very codes that it was chosen with. May import: formats, sensitivity.curvature/graph/store.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitplan.formats.base import Tensors
from bitplan.formats.errors import BitplanError, CodesMissing, RoundingFailed
from bitplan.formats.modules import canonical, is_transposed
from bitplan.formats.rounding import ROUNDINGS, rounding_alone
from bitplan.formats.table import format_named
from bitplan.sensitivity.curvature import StatisticsStore
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.store import cache_folder, load_tensors, save_tensors, sha256

VERSION = "2"
"""Changes when the same inputs would give other codes."""


@dataclass(frozen=True, order=True)
class Choice:
    """What a unit can become."""

    format: str
    rounding: str

    def __str__(self) -> str:
        return self.format if self.rounding == "nearest" else f"{self.format}/{self.rounding}"


def workspace(weights_sha256: str, calibration_sha256: str, seed: int) -> Path:
    """The cache folder of everything that follows from these weights, this text and this seed."""
    return cache_folder() / sha256(VERSION, weights_sha256, calibration_sha256, str(seed))[:24]


def codes_path(folder: Path, unit: str, choice: Choice) -> Path:
    return folder / "codes" / unit / f"{choice.format}.{choice.rounding}.safetensors"


def unit_bytes(unit: Unit, format: str) -> int:
    """Bytes of a unit in a format, which for the checkpoint's own type are those of the plain tensor."""
    if format == unit.native:
        return unit.weights * unit.dtype.itemsize
    return format_named(format).nbytes(unit.experts * unit.rows, unit.columns)


def choices_for(unit: Unit, menu: tuple[str, ...], rounding: str | None = None) -> list[Choice]:
    """The checkpoint's own type, and each format of the menu with the rounding that scores it."""
    names = dict.fromkeys((unit.native, *menu))
    return [Choice(n, "nearest" if n == unit.native else rounding_alone(format_named(n), rounding)) for n in names]


class Bank:
    """`weight(unit)` gives a unit's float32 weight [experts * rows, columns]."""

    def __init__(self, folder: Path, weight: Callable[[Unit], Tensor], statistics: StatisticsStore):
        self.folder = folder
        self.weight = weight
        self.statistics = statistics
        self._hessians: tuple[str, list] = ("", [])

    def tensors(self, unit: Unit, choice: Choice) -> Tensors:
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
        try:
            tensors = rounding.alone(weight, format_named(choice.format), self._hessians[1])
        except BitplanError as error:
            raise type(error)(f"{unit.name}: {error}") from error
        save_tensors(path, for_file(tensors))
        return tensors

    def dequantized(self, unit: Unit, choice: Choice) -> Tensor:
        """A unit's weight in a choice, float32 [experts * rows, columns]."""
        if choice.format == unit.native:
            return self.weight(unit)
        return format_named(choice.format).dequantize(self.tensors(unit, choice), unit.columns, torch.float32)


def for_file(tensors: Tensors) -> Tensors:
    return {"codes" + suffix: tensor for suffix, tensor in tensors.items()}


def from_file(tensors: Tensors) -> Tensors:
    return {name.removeprefix("codes"): tensor for name, tensor in tensors.items()}


class Workbench:
    """A full-precision model whose units' weights can be exchanged and put back."""

    def __init__(self, model: nn.Module, units: tuple[Unit, ...]):
        self.model = model
        self.units = {unit.name: unit for unit in units}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {unit.name: parameters[unit.parameter] for unit in units}
        self._originals = {name: parameter.data for name, parameter in self._parameters.items()}
        self._transposed = {u.name: is_transposed(model.get_submodule(u.parameter.rpartition(".")[0])) for u in units}

    def weight(self, unit: Unit) -> Tensor:
        """The original weight, float32 [experts * rows, columns]."""
        return canonical(self._originals[unit.name], self._transposed[unit.name]).float()

    def exchange(self, unit: Unit, weight: Tensor) -> None:
        """Put a float weight [experts * rows, columns] in the place of the unit's."""
        original = self._originals[unit.name]
        weight = (
            weight.to(original).unflatten(0, (unit.experts, unit.rows)) if original.ndim == 3 else weight.to(original)
        )
        self._parameters[unit.name].data = (
            weight.transpose(-1, -2).contiguous() if self._transposed[unit.name] else weight
        )

    def restore(self, unit: Unit) -> None:
        self._parameters[unit.name].data = self._originals[unit.name]
