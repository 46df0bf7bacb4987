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
    weights: Callable[[int], dict[str, Tensor]] = lambda segment: {},
) -> list[States | None]:
    """The inputs of segments 0 (which has none) to `segments`, for text int64 [blocks, length]; if they take more than
    `memory` bytes, they lie in files. `check` is called with each block's hidden states [1, length, width]; `weights`
    gives a segment's by its number, as `Chain.run` has them."""
    made: list[States | None] = [None]
    for segment in progress(range(segments), desc="forward", unit="block"):
        made.append(through(chain, segment, made[-1], ids, memory // segments, check, weights(segment)))
    return made


def through(
    chain: Chain,
    segment: int,
    x: States | None,
    ids: Tensor,
    memory: int,
    check: Callable[[Tensor], None] = lambda hidden: None,
    weights: dict[str, Tensor] | None = None,
) -> States:
    """A segment's outputs for its inputs `x`; of more than `memory` bytes, they lie in a file."""
    module = chain.module(segment, own=True)
    out: States | None = None
    for i, row in enumerate(ids.to(chain.device).split(1)):
        hidden = row if x is None else x[i].unsqueeze(0).to(chain.device)
        hidden = chain.run(segment, module, hidden, row, weights or {})
        check(hidden)
        if out is None:
            out = States((len(ids), *hidden.shape[1:]), memory=memory)
        out[i] = hidden[0]
    assert out is not None
    return out


@torch.no_grad()
def predictions(chain: Chain, ids: Tensor, memory: int = IN_MEMORY) -> Callable[[int], Tensor]:
    """Log-probabilities float32 [1, length - 1, vocabulary] by the number of a block of text int64 [blocks, length],
    computed from the last segment's inputs at each call: what is kept is as wide as the model, not the vocabulary."""
    x: States | None = None
    last = len(chain) - 1
    for segment in progress(range(last), desc="forward", unit="block"):
        x = through(chain, segment, x, ids, memory)
    assert x is not None
    hidden = x
    return after_blocks(chain, lambda block: hidden[block].unsqueeze(0), ids, {})


def after_blocks(
    chain: Chain, hidden: Callable[[int], Tensor], ids: Tensor, weights: dict[str, Tensor]
) -> Callable[[int], Tensor]:
    """Log-probabilities float32 [1, length - 1, vocabulary] by the number of a block of text int64 [blocks, length],
    from the last segment's inputs `hidden` [1, length, width] by that number; `weights` are as `Chain.run` has them."""
    last = len(chain) - 1
    module = chain.module(last)

    @torch.no_grad()
    def log_probabilities(block: int) -> Tensor:
        row = ids[block : block + 1].to(chain.device)
        logits = chain.run(last, module, hidden(block).to(chain.device), row, weights)
        return logits[:, :-1].log_softmax(-1)

    return log_probabilities
