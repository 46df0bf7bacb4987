"""The hidden states in front of each segment of a chain, in one pass forward over some text.

May import: sensitivity.chain/progress/store.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.store import IN_MEMORY, States


@torch.no_grad()
def inputs(
    chain: Chain,
    ids: Tensor,
    segments: int,
    memory: int = IN_MEMORY,
    check: Callable[[Tensor], None] = lambda hidden: None,
) -> list[States | None]:
    """The inputs of segments 0 (which has none) to `segments`, for text int64 [blocks, length]; if they take more than
    `memory` bytes, they lie in files. `check` is called with each block's hidden states [1, length, width]."""
    made: list[States | None] = [None]
    for segment in progress(range(segments), desc="forward", unit="block"):
        module, x = chain.module(segment, own=True), made[-1]
        out: States | None = None
        for i, row in enumerate(ids.to(chain.device).split(1)):
            hidden = row if x is None else x[i].unsqueeze(0).to(chain.device)
            hidden = chain.run(segment, module, hidden, row, {})
            check(hidden)
            if out is None:
                total = 4 * len(ids) * hidden.numel() * segments
                out = States((len(ids), *hidden.shape[1:]), in_memory=total <= memory)
            out[i] = hidden[0]
        made.append(out)
    return made
