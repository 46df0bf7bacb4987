"""Whole second moments of units' inputs, in one pass forward: what GPTQ needs to round a unit alone.

Only moments of one decoder block are in memory at a time; each is yielded as soon as the text has gone through its
block. May import: sensitivity.chain/graph/shrinkage/store/trace.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.graph import Graph, Unit
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.shrinkage import SecondMoments
from bitplan.sensitivity.store import IN_MEMORY, States
from bitplan.sensitivity.trace import Trace, Use


@torch.no_grad()
def moments(
    chain: Chain, graph: Graph, units: Sequence[Unit], ids: Tensor, memory: int = IN_MEMORY
) -> Iterator[tuple[Unit, Tensor]]:
    """(unit, A float32 [experts, columns, columns]) of each of `units`, which have products, over text int64 [blocks,
    length]; A is a mean over all tokens, shrunk, as the statistics are. Units that read the same tensor get the same
    A. Each comes once: a tied embedding from the head, not from its lookups."""
    seen_in = [[unit for unit in chain.products(segment) if unit in units] for segment in range(len(chain))]
    highest = max((segment for segment in range(len(chain)) if seen_in[segment]), default=-1)
    states: States | None = None

    def through(segment: int, states: States | None) -> tuple[States | None, dict[Unit, Tensor]]:
        """The hidden states behind a segment, but for the highest, and its units' second moments."""
        module = chain.module(segment, own=True)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        leads = graph.leads(seen_in[segment])
        by_parameter = {unit.parameter: unit for unit in seen_in[segment] if leads[unit.name] == unit.name}
        sums = {u.name: SecondMoments(u.experts, u.columns, chain.device) for u in by_parameter.values()}

        def add(use: Use) -> None:
            if not use.lookup:
                x = use.input.float().flatten(0, -2)
                sums[by_parameter[use.parameter].name].add(x, use.expert)

        trace = Trace({p: parameters[chain.local(segment, p)] for p in by_parameter}, add)
        made: States | None = None
        for i, row in enumerate(ids.to(chain.device).split(1)):
            x = row if states is None else states[i].unsqueeze(0).to(chain.device)
            for at in chain.pieces(segment, row.shape[1]):
                with trace:
                    out = chain.run(segment, module, x[:, at], row[:, at], {})
            if segment < highest:
                made = made or States((len(ids), *out.shape[1:]), memory=memory // 2)
                made[i] = out[0]
        means = {name: moments.means(ids.numel())[0] for name, moments in sums.items()}
        return made, {unit: means[leads[unit.name]] for unit in seen_in[segment]}

    for segment in progress(range(highest + 1), desc="second moments", unit="block"):
        states, found = through(segment, states)
        for unit in seen_in[segment]:
            yield unit, found.pop(unit)  # none is kept here
