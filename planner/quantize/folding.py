"""AWQ's scales (Lin et al. 2024), folded into a norm or a unit before.

May import: formats, sensitivity, planner.quantize.segment.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bitplan.formats.rounding.awq import search_scale
from bitplan.planner.quantize.segment import Segment
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.session import SEED


def fold_scales(segment: Segment, units: list[Unit]) -> list[str]:
    """Fold AWQ's scales into what writes the units' inputs, where running the block shows that nothing changes. Returns
    the units before which nothing takes a scale."""
    unfolded: list[str] = []
    steps: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if segment.rounding(unit) == "awq" and not unit.routed:
            steps[segment.session.graph.reads(unit)].append(unit)
    for together in steps.values():
        fold = _find_fold(segment, together)
        if fold is None:
            unfolded += [unit.name for unit in together]
            continue
        moment = segment.hessians(together, cross=False)[0].matrix
        scale = search_scale([segment.weight(u) for u in together], [segment.format(u) for u in together], moment)
        segment.now |= fold(scale)
        segment.changed |= {
            name: segment.now[name].to(getattr(torch, entry.dtype)).cpu()
            for name, entry in segment.vectors.items()
            if name in segment.now
        }
        segment.now |= {name: vector.to(segment.device, torch.float32) for name, vector in segment.changed.items()}
    return unfolded


def _find_fold(segment: Segment, together: list[Unit]) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """A function from the scale to the changed parameters, tried on a random scale."""
    columns = together[0].columns
    scale = torch.rand(columns, generator=torch.Generator().manual_seed(SEED)).add(0.5).to(segment.device)
    sample = slice(0, 1)
    with torch.no_grad():
        expected = segment.forward(segment.got, sample, segment.now)
    width = float(expected.abs().max())
    for fold in _folds(segment, together, columns):
        with torch.no_grad():
            found = segment.forward(segment.got, sample, segment.now | fold(scale))
        if torch.allclose(found, expected, atol=1e-4 * width, rtol=0):
            return fold
    return None


def _folds(segment: Segment, together: list[Unit], columns: int) -> list[Callable[[Tensor], dict[str, Tensor]]]:
    """Ways in which the input of `together` might be divided by a scale: a norm before, or a unit before."""
    local = dict(segment.module.named_parameters())

    def vector(name: str) -> Tensor:
        return segment.now.get(name, local[segment.chain.local(segment.index, name)])

    def scaled(scale: Tensor) -> dict[str, Tensor]:
        return {u.parameter: segment.shaped(u, segment.weight(u) * scale).contiguous() for u in together}

    def norm(name: str, shift: float, scale: Tensor) -> dict[str, Tensor]:
        bias = name.removesuffix("weight") + "bias"
        made = {name: (vector(name) + shift) / scale - shift}
        return scaled(scale) | made | ({bias: vector(bias) / scale} if bias in segment.vectors else {})

    def writer(unit: Unit, scale: Tensor) -> dict[str, Tensor]:
        bias = unit.parameter.removesuffix("weight") + "bias"
        weight = segment.shaped(unit, segment.weight(unit) / scale.unsqueeze(-1)).contiguous()
        made = {unit.parameter: weight}
        return scaled(scale) | made | ({bias: vector(bias) / scale} if bias in segment.vectors else {})

    norms = [n for n, entry in segment.vectors.items() if n.endswith("weight") and entry.shape == (columns,)]
    before = [u for u in segment.units if u.rows == columns and u not in together and not u.routed]
    before = [u for u in before if not segment.planned[u.name].is_native]
    ways: list[Callable[[Tensor], dict[str, Tensor]]] = [
        partial(norm, name, shift) for name in norms for shift in (0.0, 1.0)
    ]
    return ways + [partial(writer, unit) for unit in before]
