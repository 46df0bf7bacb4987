"""Sums over the text of what a segment's units see, and the statistics that are made of them.

May import: sensitivity.chain/graph/ranks/resume/shrinkage/statistics/trace.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bitplan.sensitivity import ranks
from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.graph import Graph, Unit
from bitplan.sensitivity.resume import Sums
from bitplan.sensitivity.shrinkage import SecondMoments
from bitplan.sensitivity.statistics import Statistics, pivots
from bitplan.sensitivity.trace import Use


class SegmentSums:
    """Sums over tokens of `units` as one segment uses them. Units that read the same tensor share one second moment,
    which the first of them leads to."""

    def __init__(self, chain: Chain, segment: int, units: Sequence[Unit], graph: Graph):
        self.of: Sums = {}
        self._names = {unit.parameter: unit.name for unit in units}
        self._moments: dict[str, SecondMoments] = {}
        """By the unit whose inputs are added."""
        self._device = chain.device
        zeros = partial(torch.zeros, device=chain.device)
        products, looks_up = chain.products(segment), chain.looks_up(segment)
        leads = graph.leads(unit for unit in units if unit in products)
        for unit in units:
            own = self.of[unit.name] = {}
            if looks_up and unit.kind in ("embedding", "tied"):
                own |= {"frequencies": zeros(unit.rows), "lookup_gradients": zeros(unit.columns)}
            if unit.name in leads:
                if leads[unit.name] == unit.name:
                    self._moments[unit.name] = SecondMoments(unit.experts, unit.columns, chain.device)
                own |= {
                    "moment": self._moments[leads[unit.name]].total,
                    "gradients": zeros(unit.experts, unit.rows),
                    "routed": zeros(unit.experts),
                }

    def add(self, use: Use) -> None:
        """Count a use, and its output's gradient when that comes."""
        name = self._names[use.parameter]
        own = self.of[name]
        if use.lookup:
            if "frequencies" not in own:
                return  # a lookup that runs again before the head, for nothing
            ids = use.input.flatten()
            own["frequencies"].index_add_(0, ids, torch.ones(len(ids), device=self._device))
            squares = own["lookup_gradients"]
        else:
            x = use.input.detach().float().flatten(0, -2)
            if name in self._moments:
                self._moments[name].add(x, use.expert)
            squares = own["gradients"][use.expert]
            if not use.output.requires_grad:
                return  # a pass without gradients (early cycles of some models): those of the others stand for it
            own["routed"][use.expert] += len(x)
        use.output.register_hook(partial(_add_squares, squares))

    def join(self) -> None:
        """Make the ranks' sums one, and shrink the second moments, in place."""
        own = {name: one.variance() for name, one in self._moments.items()}
        ranks.add(tensor for sums in self.of.values() for tensor in sums.values())
        shares = {name: one.shrinkage(own[name]) for name, one in self._moments.items()}
        ranks.add(shares.values())
        for name, one in self._moments.items():
            one.shrink(shares[name])


def statistics(sums: dict[str, Tensor], tokens: int, costs: Tensor | None, whole: bool) -> Statistics:
    """Means over tokens of a unit's sums (its moment is a mean already), and what is kept of them. `costs`: the pivots
    of a unit that reads the same. `whole`: the moment is kept."""
    found = Statistics()
    if "frequencies" in sums:
        found = replace(
            found, frequencies=sums["frequencies"] / tokens, lookup_gradients=sums["lookup_gradients"] / tokens
        )
    if "moment" in sums:
        moment, routed = sums["moment"], sums["routed"]
        gradients = sums["gradients"] / routed.clamp(min=1).unsqueeze(-1)
        found = replace(found, inputs=moment.diagonal(dim1=-2, dim2=-1).clone(), gradients=gradients, routed=routed)
        if costs is None or found.frequencies is not None:
            hessians = found.hessians(moment)
            if found.lookup_gradients is None:
                costs = torch.stack([pivots(hessian) for hessian in hessians])
            else:
                costs = pivots(hessians[0], moment[0]).unsqueeze(0)
                lookups = torch.diag(found.lookup_gradients)
                found = replace(found, lookup_pivots=pivots(hessians[0], lookups))
        found = replace(found, pivots=costs, moment=moment if whole else None)
    return found


def _add_squares(sum_of: Tensor, gradient: Tensor) -> None:
    sum_of += gradient.float().square().flatten(0, -2).sum(0)


__all__ = ["SegmentSums", "statistics"]
