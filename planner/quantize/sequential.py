"""A plan's codes, chosen block by block: each block is fed what the rounded blocks before it put out.

Per block every unit is rounded in the order of the data flow; then, for `tuned`, the block's codes are learned against
the full-precision block's output. Finished blocks lie in the cache, and an interrupted run goes on after them.
May import: formats, sensitivity, planner.codes/plan, the modules beside it.
"""

import sys
from dataclasses import replace

import torch
from torch import Tensor

from bitplan.planner.codes import codes_folder, missing_codes, unit_path, unquantized_path
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.folding import fold_scales
from bitplan.planner.quantize.judge import Judge
from bitplan.planner.quantize.segment import Segment
from bitplan.sensitivity.gradients import TOKENS, output_gradients
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.session import SEED, Session
from bitplan.sensitivity.store import States, load_tensors, save_tensors
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
        self.chain = replace(session, graph=graph).chain()
        self.judge = Judge(session, self.chain) if any(u.rounding == "tuned" for u in plan.units) else None
        self.unfolded: list[str] = []
        """Units before which awq found nothing to fold a scale into."""
        self.gradients: list[States | None] = [None] * len(self.chain)
        """The loss's at the output of each full-precision segment, where the rounding uses them."""
        self.rounded: dict[str, Tensor] = {}
        """Weights of the first segment's units, which the last may read again (tied heads)."""
        if self.chain.why:
            print(f"{self.chain.why}: the model is rounded as one block", file=sys.stderr)

    def run(self) -> None:
        true: States | None = None
        got: States | None = None
        self.gradients = self._gradients()
        for segment in progress(range(len(self.chain)), desc="rounding", unit="block"):
            true, got = self._segment(segment, true, got)
        if self.unfolded:
            print(
                f"awq: no scale can be folded before {len(self.unfolded)} units, which are only clipped:"
                f" {', '.join(self.unfolded)}",
                file=sys.stderr,
            )

    def segment(self, index: int, true: States | None, got: States | None) -> Segment:
        gradients = self.gradients[index]
        return Segment(
            self.plan, self.session, self.chain, index, true, got, self.rounded, gradients=gradients, judge=self.judge
        )

    def _gradients(self) -> list[States | None]:
        missing = {unit.name for unit in missing_codes(self.plan)}
        if not any(unit.rounding == "yaqa" and unit.name in missing for unit in self.plan.units):
            return self.gradients
        if self.chain.why:
            print("yaqa: errors are spread over columns only", file=sys.stderr)
        ids = self.session.texts.calibration.ids
        return output_gradients(self.chain, ids[: max(1, TOKENS // ids.shape[1])], SEED)

    # One segment ----------------------------------------------------------------------------------------------------

    def _segment(self, segment: int, true: States | None, got: States | None) -> tuple[States | None, States | None]:
        """Round a segment's units, write their codes, and run both models through it."""
        work = self.segment(segment, true, got)
        units = [unit for unit in self.chain.units[segment] if not self.planned[unit.name].is_native]
        found = {unit.name: load_tensors(unit_path(self.folder, unit.name)) for unit in units}
        if all(tensors is not None for tensors in found.values()):
            for unit in units:
                work.put(unit, from_file(found[unit.name]))  # type: ignore[arg-type]
            for name in work.vectors:
                if kept := load_tensors(unquantized_path(self.folder, name)):
                    work.now[name] = kept["tensor"].to(self.device, torch.float32)
        else:
            work.refuse_not_finite(units)
            self.unfolded += fold_scales(work, units) if segment else []
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
        return work.true_outputs, work.outputs(got, work.now)
