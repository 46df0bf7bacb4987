"""A plan's codes, chosen block by block: each block is fed what the rounded blocks before it put out.

Per block: every unit is rounded in the order of the data flow, on the inputs that it will get, aimed at what the
full-precision model's inputs would have made (Li et al. 2025, GPTAQ); then, for `tuned`, the block's codes are learned
against the full-precision block's output. Finished blocks lie in the cache, and an interrupted run goes on after them.
May import: formats, sensitivity, planner.plan/pretrained/session.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bitplan.formats.base import Tensors
from bitplan.formats.errors import RoundingFailed
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.modules import canonical, is_transposed
from bitplan.formats.rounding.awq import clipped_codes, search_scale
from bitplan.formats.rounding.gptq import Hessian, gptq_codes
from bitplan.formats.rounding.tuned import STEPS, Learned, tune
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import format_named
from bitplan.planner.codes import codes_folder, unit_path, unquantized_path
from bitplan.planner.plan import Plan
from bitplan.sensitivity.chain import BATCH, Chain
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.session import SEED, Session
from bitplan.sensitivity.store import load_tensors, save_tensors, scratch
from bitplan.sensitivity.trace import Trace, Use
from bitplan.sensitivity.weight_cache import for_file, from_file


class Sequence:
    """The state between two segments: hidden states of the full-precision model and of the rounded one, float32
    [blocks, length, width], on the CPU or in a file."""

    def __init__(self, plan: Plan, session: Session):
        self.plan, self.session = plan, session
        self.planned = {unit.name: unit for unit in plan.units}
        self.folder = codes_folder(plan)
        self.device = session.device
        graph = replace(session.graph, units=tuple(u for u in session.graph.units if u.name in self.planned))
        self.chain = Chain(session.model, graph, self.device)
        self.ids = session.texts.calibration.ids
        self.unfolded: list[str] = []
        """Units before which awq found nothing to fold a scale into."""
        self.rounded: dict[str, Tensor] = {}
        """Weights of the first segment's units, which the last may read again (tied heads)."""
        if self.chain.why:
            print(f"{self.chain.why}: the model is rounded as one block", file=sys.stderr)

    def run(self) -> None:
        true: Tensor | None = None
        got: Tensor | None = None
        for segment in progress(range(len(self.chain)), desc="rounding", unit="block"):
            true, got = self._segment(segment, true, got)
        if self.unfolded:
            print(
                f"awq: no scale can be folded before {len(self.unfolded)} units, which are only clipped:"
                f" {', '.join(self.unfolded)}",
                file=sys.stderr,
            )

    # One segment ----------------------------------------------------------------------------------------------------

    def _segment(self, segment: int, true: Tensor | None, got: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Round a segment's units, write their codes, and run both models through it."""
        work = Segment(self, segment, true, got)
        units = [unit for unit in self.chain.units[segment] if not self.planned[unit.name].is_native]
        found = {unit.name: load_tensors(unit_path(self.folder, unit.name)) for unit in units}
        if all(tensors is not None for tensors in found.values()):
            for unit in units:
                work.put(unit, from_file(found[unit.name]))  # type: ignore[arg-type]
            for name in work.vectors:
                if kept := load_tensors(unquantized_path(self.folder, name)):
                    work.now[name] = kept["tensor"].to(self.device, torch.float32)
        else:
            made = work.round(units)
            for name, vector in work.changed.items():
                save_tensors(unquantized_path(self.folder, name), {"tensor": vector})
            for name, tensors in made.items():
                save_tensors(unit_path(self.folder, name), for_file(tensors))
        if segment == 0:
            self.rounded = dict(work.now)
        if segment == len(self.chain) - 1:
            return None, None
        if not any(self.chain.units[segment + 1 :]):  # nothing to come reads the hidden states
            return true, got
        return work.outputs(true, {}), work.outputs(got, work.now)


class Enough(Exception):
    """Ends a pass through a block that has shown all that it was run for."""


class Segment:
    """A segment at work on the device. `now` holds what its units' parameters have become."""

    def __init__(self, sequence: Sequence, index: int, true: Tensor | None, got: Tensor | None):
        self.index, self.true, self.got = index, true, got
        self.unfolded = sequence.unfolded
        self.session, self.chain, self.ids = sequence.session, sequence.chain, sequence.ids
        self.planned, self.device = sequence.planned, sequence.device
        self.module = self.chain.module(index)
        parameters = dict(self.module.named_parameters())
        self.units = self.chain.units[index]
        self.originals = {u.parameter: parameters[self.chain.local(index, u.parameter)].data for u in self.units}
        self.now: dict[str, Tensor] = dict(sequence.rounded) if index == len(self.chain) - 1 else {}
        self.now |= self.originals
        prefix = self.chain.paths[index - 1] + "." if 0 < index <= len(self.chain.paths) else None
        self.vectors = {
            entry.name: entry
            for entry in sequence.plan.unquantized
            if prefix and entry.name.startswith(prefix) and len(entry.shape) == 1
        }
        """Kept tensors of the block into which a scale may be folded."""
        self.changed: dict[str, Tensor] = {}
        self.transposed = {unit.name: is_transposed(self._owner(unit)) for unit in self.units}

    def _owner(self, unit: Unit) -> nn.Module:
        return self.module.get_submodule(self.chain.local(self.index, unit.parameter).rpartition(".")[0])

    def _format(self, unit: Unit) -> IntegerFormat:
        format = format_named(self.planned[unit.name].format)
        assert isinstance(format, IntegerFormat)
        return format

    def _rounding(self, unit: Unit) -> str:
        return self.planned[unit.name].rounding

    # Running --------------------------------------------------------------------------------------------------------

    def _batches(self) -> list[slice]:
        return [slice(i, i + BATCH) for i in range(0, len(self.ids), BATCH)]

    def forward(self, states: Tensor | None, at: slice | Tensor, weights: dict[str, Tensor]) -> Tensor:
        ids = self.ids[at].to(self.device)
        x = ids.new_zeros(0) if states is None else states[at].to(self.device)
        return self.chain.run(self.index, self.module, x, ids, weights)

    @torch.no_grad()
    def outputs(self, states: Tensor | None, weights: dict[str, Tensor]) -> Tensor:
        made: Tensor | None = None
        for at in self._batches():
            out = self.forward(states, at, weights)
            if made is None:
                made = scratch((len(self.ids), *out.shape[1:]))
            made[at] = out.cpu()
            if not out.isfinite().all():
                raise RoundingFailed(
                    f"{self.chain.name(self.index)}: its output holds NaN or infinity; the blocks before it are kept"
                )
        assert made is not None
        return made

    @torch.no_grad()
    def hessians(self, units: list[Unit], cross: bool = True) -> list[Hessian]:
        """The second moments of an input that `units` share, one per expert; with those against the full-precision
        model's inputs, but for experts, whose routing may differ."""
        first = units[0]
        size = (first.experts, first.columns, first.columns)
        moments = torch.zeros(size, device=self.device)
        crossed = torch.zeros(size[1:], device=self.device) if cross and first.experts == 1 else None
        counts = torch.zeros(first.experts, device=self.device)
        uses = 0
        seen: list[Tensor] = []

        def note(use: Use) -> None:
            if use.lookup:
                return
            x = use.input.detach().flatten(0, -2)
            if first.experts > 1:
                moments[use.expert].addmm_(x.T, x)
                counts[use.expert] += len(x)
                return
            seen.append(x)
            if len(seen) == uses:
                raise Enough

        def inputs(states: Tensor | None, at: slice, weights: dict[str, Tensor]) -> list[Tensor]:
            seen.clear()
            with suppress(Enough), Trace({first.parameter: weights[first.parameter]}, note):
                self.forward(states, at, weights)
            return list(seen)

        for at in self._batches():
            now = inputs(self.got, at, self.now)
            uses = uses or len(now)  # the first batch told after how many the rest of the block need not run
            true = now if crossed is None else inputs(self.true, at, self.originals)
            for x, x0 in zip(now, true, strict=True):
                moments[0].addmm_(x.T, x)
                counts += len(x)
                if crossed is not None:
                    crossed.addmm_(x0.T, x)
        moments /= counts.clamp(min=1).view(-1, 1, 1)
        if crossed is not None:
            crossed /= counts.clamp(min=1)
        return [Hessian(moment, crossed) for moment in moments]

    # Rounding -------------------------------------------------------------------------------------------------------

    def put(self, unit: Unit, tensors: Tensors) -> None:
        """Let a unit's stored tensors be what the segment runs on from here."""
        format = format_named(self.planned[unit.name].format)
        self._set(unit, format.dequantize(tensors, unit.columns, torch.float32))

    def _set(self, unit: Unit, weight: Tensor) -> None:
        self.now[unit.parameter] = self._shaped(unit, weight).to(self.device).contiguous()

    def _shaped(self, unit: Unit, weight: Tensor) -> Tensor:
        """A weight [experts * rows, columns] as its parameter holds it."""
        weight = weight.unflatten(0, (unit.experts, unit.rows)) if self.originals[unit.parameter].ndim == 3 else weight
        return weight.transpose(-1, -2) if self.transposed[unit.name] else weight

    def _weight(self, unit: Unit) -> Tensor:
        return canonical(self.now[unit.parameter], self.transposed[unit.name])

    def round(self, units: list[Unit]) -> dict[str, Tensors]:
        """Stored tensors of each unit. Raises RoundingFailed."""
        for unit in units:
            if not self.originals[unit.parameter].isfinite().all():
                raise RoundingFailed(f"{unit.name}: its weights hold NaN or infinity, so no format can hold them")
        if self.index == 0:
            return self._lookups(units)
        self._scale(units)
        made: dict[str, Tensors] = {}
        learned: dict[str, Learned] = {}
        steps: dict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            steps[self.session.graph.readers.get(unit.name, unit.name)].append(unit)
        for together in steps.values():
            to_round = [unit for unit in together if self._rounding(unit) != "nearest"]
            hessians = self.hessians(to_round, cross=self._rounding(to_round[0]) != "awq") if to_round else []
            for unit in together:
                try:
                    made[unit.name] = self._round_one(unit, hessians, learned)
                except RoundingFailed as error:
                    raise RoundingFailed(f"{self.chain.name(self.index)}: {unit.name}: {error}") from error
                self.put(unit, made[unit.name])
        if learned:
            self._tune(learned)
            for name, one in learned.items():
                made[name] = one.tensors()
                self.put(next(unit for unit in units if unit.name == name), made[name])
        return {name: {s: t.cpu() for s, t in tensors.items()} for name, tensors in made.items()}

    def _lookups(self, units: list[Unit]) -> dict[str, Tensors]:
        """What comes before the blocks is rounded on the full-precision model's statistics."""
        made = {}
        if any(self._rounding(unit) != "nearest" for unit in units):
            self.session.gather(self.units)
        for unit in units:
            rounding = "nearest" if self._rounding(unit) == "nearest" else "gptq"
            made[unit.name] = self.session.weight_cache.tensors(
                unit, QuantScheme(self.planned[unit.name].format, rounding)
            )
            self.put(unit, made[unit.name])
        return made

    def _round_one(self, unit: Unit, hessians: list[Hessian], learned: dict[str, Learned]) -> Tensors:
        weight, rounding = self._weight(unit), self._rounding(unit)
        if rounding == "nearest":
            return format_named(self.planned[unit.name].format).quantize(weight)
        format = self._format(unit)
        if rounding == "awq":
            parts = zip(weight.chunk(len(hessians)), hessians, strict=True)
            codes = [clipped_codes(part, format, hessian.matrix.diagonal()) for part, hessian in parts]
            scale, zero = (torch.cat([getattr(grid, name) for _, grid in codes]) for name in ("scale", "zero"))
            return format.store(torch.cat([code for code, _ in codes]), type(codes[0][1])(scale, zero))
        codes_, grid, aimed = gptq_codes(weight, format, hessians)
        if rounding == "tuned":
            learned[unit.name] = Learned(format, aimed, grid)
        return format.store(codes_, grid)

    # Learning -------------------------------------------------------------------------------------------------------

    def _tune(self, learned: dict[str, Learned]) -> None:
        last = self.index == len(self.chain) - 1
        targets = None if last else self.outputs(self.true, {})
        units = {unit.name: unit for unit in self.units}
        generator = torch.Generator().manual_seed(SEED + self.index)

        def loss_at(at: slice | Tensor, weights: dict[str, Tensor]) -> Tensor:
            out = self.forward(self.got, at, weights)
            if targets is not None:
                return (out - targets[at].to(self.device)).square().mean()
            with torch.no_grad():
                aim = self.forward(self.true, at, {}).log_softmax(-1)
            return (aim.exp() * (aim - out.log_softmax(-1))).sum(-1).mean()

        def weights() -> dict[str, Tensor]:
            return self.now | {
                units[name].parameter: self._shaped(units[name], one.weight()) for name, one in learned.items()
            }

        def minibatch(_step: int) -> Tensor:
            return loss_at(torch.randperm(len(self.ids), generator=generator)[:BATCH], weights())

        @torch.no_grad()
        def whole() -> float:
            fixed = weights()
            return sum(float(loss_at(at, fixed)) for at in self._batches()) / len(self._batches())

        tune(list(learned.values()), minibatch, whole, STEPS)

    # Scaling --------------------------------------------------------------------------------------------------------

    def _scale(self, units: list[Unit]) -> None:
        """AWQ's scales, folded into what writes the input, where running the block shows that nothing changes."""
        steps: dict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            if self._rounding(unit) == "awq" and unit.experts == 1:
                steps[self.session.graph.readers.get(unit.name, unit.name)].append(unit)
        for together in steps.values():
            fold = self._find_fold(together)
            if fold is None:
                self.unfolded += [unit.name for unit in together]
                continue
            moment = self.hessians(together, cross=False)[0].matrix
            scale = search_scale([self._weight(u) for u in together], [self._format(u) for u in together], moment)
            self.now |= fold(scale)
            self.changed |= {
                name: self.now[name].to(getattr(torch, entry.dtype)).cpu()
                for name, entry in self.vectors.items()
                if name in self.now
            }
            self.now |= {name: vector.to(self.device, torch.float32) for name, vector in self.changed.items()}

    def _find_fold(self, together: list[Unit]) -> Callable[[Tensor], dict[str, Tensor]] | None:
        """A function from the scale to the changed parameters, tried on a random scale."""
        columns = together[0].columns
        scale = torch.rand(columns, generator=torch.Generator().manual_seed(SEED)).add(0.5).to(self.device)
        sample = slice(0, 1)
        with torch.no_grad():
            expected = self.forward(self.got, sample, self.now)
        width = float(expected.abs().max())
        for fold in self._folds(together, columns):
            with torch.no_grad():
                found = self.forward(self.got, sample, self.now | fold(scale))
            if torch.allclose(found, expected, atol=1e-4 * width, rtol=0):
                return fold
        return None

    def _folds(self, together: list[Unit], columns: int) -> list[Callable[[Tensor], dict[str, Tensor]]]:
        """Ways in which the input of `together` might be divided by a scale: a norm before, or a unit before."""
        local = dict(self.module.named_parameters())

        def vector(name: str) -> Tensor:
            return self.now.get(name, local[self.chain.local(self.index, name)])

        def scaled(scale: Tensor) -> dict[str, Tensor]:
            return {u.parameter: self._shaped(u, self._weight(u) * scale).contiguous() for u in together}

        def norm(name: str, shift: float, scale: Tensor) -> dict[str, Tensor]:
            bias = name.removesuffix("weight") + "bias"
            made = {name: (vector(name) + shift) / scale - shift}
            return scaled(scale) | made | ({bias: vector(bias) / scale} if bias in self.vectors else {})

        def writer(unit: Unit, scale: Tensor) -> dict[str, Tensor]:
            bias = unit.parameter.removesuffix("weight") + "bias"
            weight = self._shaped(unit, self._weight(unit) / scale.unsqueeze(-1)).contiguous()
            made = {unit.parameter: weight}
            return scaled(scale) | made | ({bias: vector(bias) / scale} if bias in self.vectors else {})

        norms = [n for n, entry in self.vectors.items() if n.endswith("weight") and entry.shape == (columns,)]
        before = [u for u in self.units if u.rows == columns and u not in together and u.experts == 1]
        before = [u for u in before if not self.planned[u.name].is_native]
        ways: list[Callable[[Tensor], dict[str, Tensor]]] = [
            partial(norm, name, shift) for name in norms for shift in (0.0, 1.0)
        ]
        return ways + [partial(writer, unit) for unit in before]
