"""Rounded weights, one per (unit, format, rounding), made when first asked for.

Roundings that need text are slow, so their codes are kept on disk: an interrupted audit goes on where it was, and a
plan is applied from the very codes that it was chosen with. May import: formats,
sensitivity.graph/profile/statistics/store.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bitplan.formats.base import Tensors
from bitplan.formats.errors import BitplanError, CodesMissing, RoundingFailed
from bitplan.formats.rounding import ROUNDINGS
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import format_named
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.profile import Provenance
from bitplan.sensitivity.statistics import StatisticsStore
from bitplan.sensitivity.store import (
    cache_folder,
    is_whole,
    load_tensors,
    locked,
    save_tensors,
    sha256,
    write_text,
)

MOMENT_BYTES = 1 << 30
VERSION = "7"
"""Changes when the same inputs would give other codes."""
MARKER = "workspace.json"


def computed_on(device: str) -> str:
    """What keys of the cache say of a device: "cpu", where models run in float32, or "gpu", in their own type."""
    return "cpu" if device == "cpu" else "gpu"


def workspace(
    weights_sha256: str, config_sha256: str, calibration_sha256: str, seed: int, device: str, kept: Sequence[str] = ()
) -> Path:
    """The cache folder of everything that follows from a model, as this transformers runs it, from this text and this
    seed. `kept`: parameters that were left unquantized on request, which shape the units."""
    model = (weights_sha256, config_sha256, version("transformers"), computed_on(device))
    return cache_folder() / sha256(VERSION, *model, calibration_sha256, str(seed), *sorted(kept))[:24]


def workspace_of(facts: Provenance) -> Path:
    """The same, of what a profile or a plan was made from, whatever was kept."""
    model, calibration = facts.model, facts.text.calibration.sha256
    return workspace(model.weights_sha256, model.config_sha256, calibration, facts.seed, facts.device)


def mark_workspace(folder: Path, model: str) -> None:
    """Note in a workspace whose it is, for `bitplan cache`."""
    if not (folder / MARKER).exists():
        write_text(folder / MARKER, json.dumps({"model": model}))


def codes_path(folder: Path, unit: str, scheme: QuantScheme) -> Path:
    return folder / "codes" / unit / f"{scheme.format}.{scheme.rounding}.safetensors"


class WeightCache:
    """`weight(unit)` gives a unit's float32 weight [experts * rows, columns]; `moments(units)` runs the text through
    the model, whose weights must be its own at that time, and yields each unit with its inputs' whole second moment."""

    def __init__(
        self,
        folder: Path,
        weight: Callable[[Unit], Tensor],
        statistics: StatisticsStore,
        moments: Callable[[list[Unit]], Iterable[tuple[Unit, Tensor]]],
        moment_bytes: int = MOMENT_BYTES,
    ):
        self.folder = folder
        self.weight = weight
        self.statistics = statistics
        self.moments = moments
        self.moment_bytes = moment_bytes
        self._moments: dict[str, Tensor] = {}
        """The last second moments, as far as `moment_bytes` go."""

    def prepare(self, wanted: Iterable[tuple[Unit, QuantScheme]]) -> None:
        """Make those codes that need text and are not on disk, with one pass over the text at most. Raises
        RoundingFailed, CodesMissing."""
        missing: dict[Unit, list[QuantScheme]] = defaultdict(list)
        for unit, scheme in wanted:
            needs_text = scheme.format != unit.native and ROUNDINGS[scheme.rounding].needs_text
            if needs_text and not is_whole(codes_path(self.folder, unit.name, scheme)):
                missing[unit].append(scheme)
        for unit, schemes in missing.items():
            if unit not in self.statistics:
                raise CodesMissing(f"{unit.name}: {schemes[0]} needs calibration text")
        for unit, moment in self._with_moments(list(missing)):
            self._make(unit, missing[unit], moment)
            del moment  # before the next is gathered

    def _make(self, unit: Unit, schemes: list[QuantScheme], moment: Tensor | None) -> None:
        hessians, weight = self.statistics[unit].hessians(moment), self._finite(unit)
        with locked(self.folder / "locks" / unit.name):
            for scheme in schemes:
                path = codes_path(self.folder, unit.name, scheme)
                if is_whole(path):
                    continue  # another process has made it
                alone = ROUNDINGS[scheme.rounding].alone
                assert alone is not None, scheme
                try:
                    tensors = alone(weight, format_named(scheme.format), hessians)
                except BitplanError as error:
                    raise type(error)(f"{unit.name}: {error}") from error
                save_tensors(path, for_file(tensors))

    def _with_moments(self, units: list[Unit]) -> Iterator[tuple[Unit, Tensor | None]]:
        """Units with their inputs' second moments (None for lookups), those first of which it is at hand."""
        yield from ((unit, None) for unit in units if unit.kind == "embedding")
        yield from ((unit, self._moments[unit.name]) for unit in units if unit.name in self._moments)
        unseen = [unit for unit in units if unit.kind != "embedding" and unit.name not in self._moments]
        if not unseen:
            return
        for unit, moment in self.moments(unseen):
            distinct = {tensor.data_ptr(): tensor.nbytes for tensor in (*self._moments.values(), moment)}
            if sum(distinct.values()) <= self.moment_bytes:
                self._moments[unit.name] = moment
            yield unit, moment
            del moment

    def _finite(self, unit: Unit) -> Tensor:
        weight = self.weight(unit)
        if not weight.isfinite().all():
            raise RoundingFailed(f"{unit.name}: its weights hold NaN or infinity, so no format can hold them")
        return weight

    def tensors(self, unit: Unit, scheme: QuantScheme) -> Tensors:
        """Stored tensors of a unit in a scheme. Raises RoundingFailed, CodesMissing."""
        rounding = ROUNDINGS[scheme.rounding]
        if not rounding.needs_text:
            assert rounding.alone is not None, scheme
            return rounding.alone(self._finite(unit), format_named(scheme.format), [])
        path = codes_path(self.folder, unit.name, scheme)
        if (kept := load_tensors(path)) is None:
            self.prepare([(unit, scheme)])
            kept = load_tensors(path)
        if kept is None:
            raise CodesMissing(f"{unit.name}: its codes have gone from the cache: run the same command again")
        return from_file(kept)

    def dequantized(self, unit: Unit, scheme: QuantScheme) -> Tensor:
        """A unit's weight in a scheme, float32 [experts * rows, columns]."""
        if scheme.format == unit.native:
            return self.weight(unit)
        return format_named(scheme.format).dequantize_by_rows(self.tensors(unit, scheme), unit.columns, torch.float32)


def for_file(tensors: Tensors) -> Tensors:
    return {"codes" + suffix: tensor for suffix, tensor in tensors.items()}


def from_file(tensors: Tensors) -> Tensors:
    return {name.removeprefix("codes"): tensor for name, tensor in tensors.items()}
