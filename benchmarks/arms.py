"""Allocations that others would choose, for `benchmarks.search` to finish and compare.

May import: everything.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import DEFAULT_FORMATS, format_named
from bitplan.planner.codes import codes_folder, unit_path
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.search.corrections import Allocation
from bitplan.search.knapsack import Options, solve
from bitplan.search.problem import Problem, problem_of
from bitplan.sensitivity import gradients
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.curvature import gather
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.session import SEED, Session
from bitplan.sensitivity.statistics import StatisticsStore
from bitplan.sensitivity.store import load_tensors
from bitplan.sensitivity.weight_cache import from_file


def thresholds(problem: Problem, session: Session, budget: int) -> Iterator[Allocation]:
    """mlx-lm's rule (its `quant/dynamic_quant.py`): the model is rounded to a low format, and a group's sensitivity is

        Σ_units ⟨∂KL/∂W at the low weights, W_low - W_high⟩ / number of its weights

    what a weight's step up to the high format lowers KL by, to first order. Groups whose sensitivity is above a
    threshold get the high format, the lowest threshold within `budget` bytes. The low format is the largest in groups
    of 64 of which a uniform plan fits; there is an allocation for each larger one. Weights are rounded to the nearest,
    as mlx does; that fused groups share a format is bitplan's."""
    every = {scheme: allocation for scheme, allocation in problem.uniform(sys.maxsize) if _of_mlx(scheme.format)}
    schemes = sorted(every, key=lambda scheme: problem.nbytes(every[scheme]))
    fitting = [scheme for scheme in schemes if problem.nbytes(every[scheme]) <= budget]
    if not fitting:
        return
    low, highs = fitting[-1], schemes[len(fitting) :]
    units = {unit.name: unit for unit in session.graph.units}
    gradients = _gradients(session, low)
    for high in highs:
        lowered = {name: float((g * _change(session, units[name], low, high)).sum()) for name, g in gradients.items()}
        sensitivity = {
            group: sum(lowered[name] for name in names) / sum(gradients[name].numel() for name in names)
            for group, names in problem.members.items()
        }
        allocation = dict(every[low])
        for group in sorted(sensitivity, key=lambda group: -sensitivity[group]):
            if problem.nbytes(allocation | {group: high}) > budget:
                break
            allocation[group] = high
        yield allocation


def _of_mlx(format: str) -> bool:
    """mlx's integers in groups of 64; for its 8 bits bitplan's have a scale per row."""
    return format == "int8" or (format.startswith("int") and format.endswith("-g64"))


def _rounded(session: Session, unit: Unit, scheme: QuantScheme) -> Tensor:
    """To the nearest: float32 [experts * rows, columns]."""
    format, weight = format_named(scheme.format), session.swapper.weight(unit)
    return format.dequantize(format.quantize(weight), unit.columns, torch.float32)


def _change(session: Session, unit: Unit, low: QuantScheme, high: QuantScheme) -> Tensor:
    """In the shape of the unit's parameter."""
    return session.swapper.shaped(unit, _rounded(session, unit, low) - _rounded(session, unit, high))


def _gradients(session: Session, low: QuantScheme) -> dict[str, Tensor]:
    """Of KL on the calibration text, summed over tokens, at the model with all units in the low format; by unit."""
    blocks = session.texts.calibration
    reference = Reference(session.model, blocks)
    parameters = dict(session.model.named_parameters(remove_duplicate=False))
    watched = {unit.name: parameters[unit.parameter].requires_grad_() for unit in session.graph.units}
    for unit in session.graph.units:
        session.swapper.exchange(unit, _rounded(session, unit, low))
    for i, row in enumerate(blocks.ids.to(session.device).split(1)):
        logits = session.model(input_ids=row, use_cache=False).logits[:, :-1].float()
        reference.kl(i, logits.log_softmax(-1)).backward()
    found = {}
    for unit in session.graph.units:
        parameter = watched[unit.name]
        assert parameter.grad is not None
        found[unit.name], parameter.grad = parameter.grad, None
        parameter.requires_grad_(False)
        session.swapper.restore(unit)
    return found


def remeasured(problem: Problem, session: Session, plan: Plan, available: int) -> Iterator[tuple[str, Allocation]]:
    """Knapsacks of `available` bytes under losses predicted at a plan's operating point: A and G are gathered again
    from the model with the plan's weights. Labels are drawn from that model, as for a profile, or from the
    full-precision one, so that G is that of KL's gradients there."""
    reference = Reference(session.model, session.texts.calibration)
    for labels in ("own", "full-precision"):
        with tempfile.TemporaryDirectory() as folder:
            both, only = (StatisticsStore(Path(folder) / name, session.device) for name in ("both", "only"))
            _gather_at(plan, session, both, None if labels == "own" else reference)
            for unit in session.graph.units:
                found = both[unit]
                parts = {"gradients": found.gradients, "lookup_gradients": found.lookup_gradients}
                only.write(unit, replace(session.store[unit], **parts))
            scored = {
                "A and G": problem_of(audit(replace(session, store=both), DEFAULT_FORMATS)).options,
                "G": problem_of(audit(replace(session, store=only), DEFAULT_FORMATS)).options,
            }
        scored["mean"] = _mean(problem.options, scored["A and G"])
        for name, options in scored.items():
            yield f"{name}, {labels} labels", solve(options, available).allocation


def _gather_at(plan: Plan, session: Session, store: StatisticsStore, reference: Reference | None) -> None:
    """Statistics of the model with a plan's weights, with labels drawn from the reference where there is one."""
    round_missing(plan, session)
    units = {unit.name: unit for unit in session.graph.units}
    for planned in plan.packed:
        unit, format = units[planned.name], format_named(planned.format)
        tensors = load_tensors(unit_path(codes_folder(plan), unit.name))
        assert tensors is not None
        session.swapper.exchange(unit, format.dequantize(from_file(tensors), unit.columns, torch.float32))
    own = gradients.draw
    blocks = cycle(range(len(session.texts.calibration.ids)))  # a model that is not cut runs them in turn
    other = patch.object(gradients, "draw", lambda logits, draws: own(reference.log_p[next(blocks)], draws))
    with other if reference else nullcontext():
        gather(lambda: session.chain(cut=False), session.graph, units.values(), session.texts.calibration, store, SEED)
    for unit in units.values():
        session.swapper.restore(unit)


def _mean(one: Options, other: Options) -> Options:
    """Geometric, of each option's losses: it is the same whatever the scale of either."""
    losses = {(group, option.scheme): option.loss for group, options in other.items() for option in options}
    return {
        group: [replace(option, loss=(option.loss * losses[group, option.scheme]) ** 0.5) for option in options]
        for group, options in one.items()
    }
