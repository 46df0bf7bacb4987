"""One segment of a model while its units are rounded: on the inputs that they will get, aimed at what the
full-precision model's inputs would have made (Li et al. 2025, GPTAQ). May import: formats, sensitivity, planner.plan.
"""

from collections import defaultdict
from contextlib import suppress
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from bitplan.formats.base import Tensors
from bitplan.formats.errors import RoundingFailed
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.modules import canonical, is_transposed
from bitplan.formats.rounding.awq import clipped_codes
from bitplan.formats.rounding.gptq import Hessian, gptq_codes
from bitplan.formats.rounding.tuned import FEW, FROM_WEIGHTS, STEPS, Learned, tune
from bitplan.formats.rounding.yaqa import yaqa_codes
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import format_named
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.judge import Judge
from bitplan.planner.quantize.mixed import mixed_precision
from bitplan.sensitivity.chain import BATCH, Chain
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.session import SEED, Session
from bitplan.sensitivity.shrinkage import SecondMoments
from bitplan.sensitivity.store import States
from bitplan.sensitivity.trace import Trace, Use


class Enough(Exception):
    """Ends a pass through a block that has shown all that it was run for."""


class Segment:
    """A segment on the device: `true` and `got` are the hidden states that the full-precision model and the rounded one
    give it; `now` holds what its units' parameters have become. `rounded` are the weights of the first segment, which
    the last may read again (tied heads). `true_inputs`, a dict that several segments share, keeps the full-precision
    inputs of their units, so that they are computed once. `gradients` are the loss's at the full-precision segment's
    output, of some of the text's blocks. `judge`, without which no unit can be `tuned`, chooses between learned codes;
    hidden states are then of the calibration text and of the judge's."""

    def __init__(
        self,
        plan: Plan,
        session: Session,
        chain: Chain,
        index: int,
        true: States | None,
        got: States | None,
        rounded: dict[str, Tensor],
        true_inputs: dict[tuple[str, int], list[Tensor]] | None = None,
        gradients: States | None = None,
        judge: Judge | None = None,
    ):
        self.true_inputs, self.gradients = true_inputs, gradients
        self.index, self.true, self.got = index, true, got
        self.session, self.chain, self.judge = session, chain, judge
        self.ids = session.texts.calibration.ids
        self.blocks = len(self.ids)
        """Of the text, those that units are rounded on: the judge's come after them."""
        if judge:
            self.ids = torch.cat([self.ids, judge.ids])
        self.planned, self.device = {unit.name: unit for unit in plan.units}, session.device
        self.module = self.chain.module(index)
        parameters = dict(self.module.named_parameters())
        self.units = self.chain.units[index]
        self.originals = {u.parameter: parameters[self.chain.local(index, u.parameter)].data for u in self.units}
        self.now: dict[str, Tensor] = dict(rounded) if index == len(self.chain) - 1 else {}
        self.now |= self.originals
        prefix = self.chain.paths[index - 1] + "." if 0 < index <= len(self.chain.paths) else None
        self.vectors = {
            entry.name: entry
            for entry in plan.unquantized
            if prefix and entry.name.startswith(prefix) and len(entry.shape) == 1
        }
        """Unquantized vectors of the block, into which a scale may be folded."""
        self.changed: dict[str, Tensor] = {}
        self.transposed = {unit.name: is_transposed(self._owner(unit)) for unit in self.units}

    def _owner(self, unit: Unit) -> nn.Module:
        return self.module.get_submodule(self.chain.local(self.index, unit.parameter).rpartition(".")[0])

    def format(self, unit: Unit) -> IntegerFormat:
        format = format_named(self.planned[unit.name].format)
        assert isinstance(format, IntegerFormat)
        return format

    def rounding(self, unit: Unit) -> str:
        return self.planned[unit.name].rounding

    # Running --------------------------------------------------------------------------------------------------------

    def _batches(self) -> list[slice]:
        """Of the calibration text."""
        return _slices(0, self.blocks)

    def forward(self, states: States | None, at: slice | Tensor, weights: dict[str, Tensor]) -> Tensor:
        ids = self.ids[at].to(self.device)
        x = ids.new_zeros(0) if states is None else states[at].to(self.device)
        return self.chain.run(self.index, self.module, x, ids, weights)

    @cached_property
    def true_outputs(self) -> States:
        """The full-precision segment's."""
        return self.outputs(self.true, {})

    @torch.no_grad()
    def outputs(self, states: States | None, weights: dict[str, Tensor], first: int = 0) -> States:
        """The segment's for the text's blocks from the first on, in memory where those of all segments may be."""
        made: States | None = None
        for at in _slices(first, len(self.ids)):
            out = self.forward(states, at, weights)
            if made is None:
                made = States((len(self.ids) - first, *out.shape[1:]), memory=self.session.in_memory // len(self.chain))
            for i, hidden in enumerate(out.cpu(), at.start - first):
                made[i] = hidden
            if not out.isfinite().all():
                raise RoundingFailed(
                    f"{self.chain.name(self.index)}: its output holds NaN or infinity; the blocks before it are kept"
                )
        assert made is not None
        return made

    @torch.no_grad()
    def hessians(self, units: list[Unit], cross: bool = True) -> list[Hessian]:
        """The second moments of an input that `units` share, one per expert, shrunk; with those against the
        full-precision model's inputs, but for experts, whose routing may differ."""
        first = units[0]
        cross = cross and not first.routed
        moments = SecondMoments(first.experts, first.columns, self.device, cross)
        uses = 0
        seen: list[Tensor] = []

        def note(use: Use) -> None:
            if use.lookup:
                return
            x = use.input.detach().flatten(0, -2)
            if first.experts > 1:
                moments.add(x, use.expert)
                return
            seen.append(x)
            if len(seen) == uses:
                raise Enough

        def inputs(states: States | None, at: slice, weights: dict[str, Tensor]) -> list[Tensor]:
            seen.clear()
            with suppress(Enough), Trace({first.parameter: weights[first.parameter]}, note):
                self.forward(states, at, weights)
            return list(seen)

        for at in self._batches():
            now = inputs(self.got, at, self.now)
            uses = uses or len(now)  # the first batch showed after how many the rest of the block need not run
            true: list[Tensor] | list[None]
            if not cross:
                true = [None] * len(now)
            elif self.true_inputs is None:
                true = inputs(self.true, at, self.originals)
            else:
                key = (first.name, at.start)
                if key not in self.true_inputs:
                    self.true_inputs[key] = inputs(self.true, at, self.originals)
                true = self.true_inputs[key]
            for x, x0 in zip(now, true, strict=True):
                moments.add(x, true=x0)
        means, crossed = moments.means()
        return [Hessian(mean, crossed) for mean in means]

    def output_moments(self, units: list[Unit]) -> dict[str, Hessian]:
        """Unit → E[g g^T] over the loss's gradients g at its outputs in the full-precision model, shrunk, float32
        [rows, rows]; none where `gradients` are missing, and none for experts."""
        units = [unit for unit in units if not unit.routed]
        if self.gradients is None or self.true is None or not units:
            return {}
        sums = {unit.parameter: SecondMoments(1, unit.rows, self.device) for unit in units}

        def seen(use: Use) -> None:
            use.output.register_hook(partial(add, use.parameter))

        def add(parameter: str, gradient: Tensor) -> None:
            sums[parameter].add(gradient.detach().float().flatten(0, -2))

        for i in range(self.gradients.shape[0]):
            x = self.true[i].unsqueeze(0).to(self.device).requires_grad_()
            with torch.enable_grad(), Trace({name: self.originals[name] for name in sums}, seen):
                out = self.chain.run(self.index, self.module, x, self.ids[i : i + 1].to(self.device), {})
            out.backward(self.gradients[i].unsqueeze(0).to(out))  # type: ignore[no-untyped-call]
        means = {parameter: moments.means()[0][0] for parameter, moments in sums.items()}
        return {unit.name: Hessian(means[unit.parameter]) for unit in units}

    # Rounding -------------------------------------------------------------------------------------------------------

    def put(self, unit: Unit, tensors: Tensors) -> None:
        """Let a unit's stored tensors be what the segment runs on from here."""
        format = format_named(self.planned[unit.name].format)
        self._set(unit, format.dequantize_by_rows(tensors, unit.columns, torch.float32))

    def _set(self, unit: Unit, weight: Tensor) -> None:
        self.now[unit.parameter] = self.shaped(unit, weight).to(self.device).contiguous()

    def shaped(self, unit: Unit, weight: Tensor) -> Tensor:
        """A weight [experts * rows, columns] as its parameter holds it."""
        weight = weight.unflatten(0, (unit.experts, unit.rows)) if self.originals[unit.parameter].ndim == 3 else weight
        return weight.transpose(-1, -2) if self.transposed[unit.name] else weight

    def weight(self, unit: Unit) -> Tensor:
        return canonical(self.now[unit.parameter], self.transposed[unit.name])

    def refuse_not_finite(self, units: list[Unit]) -> None:
        """Raises RoundingFailed for weights that no format can hold."""
        for unit in units:
            if not self.originals[unit.parameter].isfinite().all():
                raise RoundingFailed(f"{unit.name}: its weights hold NaN or infinity, so no format can hold them")

    def round(self, units: list[Unit]) -> dict[str, Tensors]:
        """Stored tensors of each unit. Raises RoundingFailed."""
        if self.index == 0:
            return self._lookups(units)
        made: dict[str, Tensors] = {}
        learned: dict[str, Learned] = {}
        near = self._near(units)
        outputs = self.output_moments([unit for unit in units if self.rounding(unit) == "yaqa"])
        steps: dict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            steps[self.session.graph.reads(unit)].append(unit)
        for together in steps.values():
            to_round = [unit for unit in together if self.rounding(unit) != "nearest"]
            hessians = self.hessians(to_round, cross=self.rounding(to_round[0]) != "awq") if to_round else []
            for unit in together:
                try:
                    made[unit.name] = self._round_one(unit, hessians, outputs.get(unit.name), learned)
                except RoundingFailed as error:
                    raise RoundingFailed(f"{self.chain.name(self.index)}: {unit.name}: {error}") from error
                self.put(unit, made[unit.name])
        if learned:
            made |= self._learn(made, [learned, *near])
            for unit in units:
                self.put(unit, made[unit.name])
        return {name: {s: t.cpu() for s, t in tensors.items()} for name, tensors in made.items()}

    def _lookups(self, units: list[Unit]) -> dict[str, Tensors]:
        """What comes before the blocks is rounded on the full-precision model's statistics."""
        made = {}
        if any(self.rounding(unit) != "nearest" for unit in units):
            self.session.gather(self.units)
        for unit in units:
            rounding = "nearest" if self.rounding(unit) == "nearest" else "gptq"
            made[unit.name] = self.session.weight_cache.tensors(
                unit, QuantScheme(self.planned[unit.name].format, rounding)
            )
            self.put(unit, made[unit.name])
        return made

    def _round_one(
        self, unit: Unit, hessians: list[Hessian], outputs: Hessian | None, learned: dict[str, Learned]
    ) -> Tensors:
        weight, rounding = self.weight(unit), self.rounding(unit)
        if rounding == "nearest":
            return format_named(self.planned[unit.name].format).quantize_by_rows(weight, self.device)
        format = self.format(unit)
        if rounding == "awq":
            parts = zip(weight.chunk(len(hessians)), hessians, strict=True)
            codes = [clipped_codes(part, format, hessian.matrix.diagonal()) for part, hessian in parts]
            scale, zero = (torch.cat([getattr(grid, name) for _, grid in codes]) for name in ("scale", "zero"))
            return format.store(torch.cat([code for code, _ in codes]), type(codes[0][1])(scale, zero))
        if rounding == "yaqa":
            return format.store(*yaqa_codes(weight, format, hessians, outputs))
        codes_, grid, aimed = gptq_codes(weight, format, hessians)
        if rounding == "tuned":
            learned[unit.name] = Learned(format, aimed, grid)
        return format.store(codes_, grid)

    def _near(self, units: list[Unit]) -> list[dict[str, Learned]]:
        """The block's `tuned` units once more, to be learned from their weights: where the text has few outputs for
        each of them."""
        tuned = [unit for unit in units if self.rounding(unit) == "tuned"]
        weights = sum(self.originals[unit.parameter].numel() for unit in tuned)
        width = self.true.shape[-1] if self.true is not None else 0
        text = self.blocks * self.ids.shape[1]
        if not tuned or self.index == len(self.chain) - 1 or text * width >= FEW * weights:
            return []
        found = {}
        for unit in tuned:
            weight = self.weight(unit).float()
            grid = self.format(unit).fitted_grids(weight, weight.new_ones(unit.columns))
            found[unit.name] = Learned(self.format(unit), weight, grid, FROM_WEIGHTS)
        return [found]

    # Learning -------------------------------------------------------------------------------------------------------

    def _learn(self, made: dict[str, Tensors], starts: list[dict[str, Learned]]) -> dict[str, Tensors]:
        """Of GPTQ's codes and what is learned from each start, that with which the model loses least on the search
        text; after the blocks, what is learned."""
        last = self.index == len(self.chain) - 1
        found = [{name: made[name] for name in starts[0]}]
        for start in starts:
            self._tune(start, None if last else self.true_outputs)
            found.append({name: one.tensors() for name, one in start.items()})
        return found[1] if last else min(found, key=self._loss)

    def _loss(self, tensors: dict[str, Tensors]) -> float:
        """KL of the model, rounded as far as this, with a block's units as they would be stored."""
        for unit in self.units:
            if unit.name in tensors:
                self.put(unit, tensors[unit.name])
        assert self.judge
        return self.judge.kl(self.index, self.outputs(self.got, self.now, self.blocks))

    def _tune(self, learned: dict[str, Learned], targets: States | None) -> None:
        """Learn, aimed at `targets` or at the full-precision model's logits."""
        units = {unit.name: unit for unit in self.units}
        generator = torch.Generator().manual_seed(SEED + self.index)

        def loss_at(at: slice | Tensor, weights: dict[str, Tensor]) -> Tensor:
            out = self.forward(self.got, at, weights).float()
            if targets is not None:
                return (out - targets[at].to(self.device)).square().mean()
            with torch.no_grad():
                aim = self.forward(self.true, at, {}).log_softmax(-1)
            return (aim.exp() * (aim - out.log_softmax(-1))).sum(-1).mean()

        def weights() -> dict[str, Tensor]:
            return self.now | {
                units[name].parameter: self.shaped(units[name], one.weight()) for name, one in learned.items()
            }

        def minibatch(_step: int) -> Tensor:
            at = torch.randperm(self.blocks, generator=generator)[:BATCH]
            with mixed_precision(self.device):
                return loss_at(at, weights())

        @torch.no_grad()
        def whole() -> float:
            fixed = weights()
            return sum(float(loss_at(at, fixed)) for at in self._batches()) / len(self._batches())

        tune(list(learned.values()), minibatch, whole, STEPS)


def _slices(first: int, stop: int) -> list[slice]:
    """Of text blocks that run at once."""
    return [slice(i, min(i + BATCH, stop)) for i in range(first, stop, BATCH)]
