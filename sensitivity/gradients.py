"""The gradients of the loss at the outputs of a model's segments: from them, a segment alone gives those at its units.

Labels are drawn from the model's own predictions, as for the statistics. Hidden states and gradients of all segments,
float32 [blocks, length, width] each, lie in files beyond `memory` bytes; hidden states go as the pass back uses them.
May import: sensitivity.chain/curvature/forward/progress/store.
"""

import torch
from torch import Tensor

from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.curvature import backward_of_loss
from bitplan.sensitivity.forward import inputs
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.store import IN_MEMORY, States

TOKENS = 8192
"""Of the calibration text."""


def output_gradients(chain: Chain, ids: Tensor, seed: int = 0, memory: int = IN_MEMORY) -> list[States | None]:
    """At the output of each segment, for text int64 [blocks, length]; None for the last segment, which ends in the
    logits, and for all of a model that is not cut."""
    last = len(chain) - 1
    found: list[States | None] = [None] * len(chain)
    if not chain.paths:
        return found
    states = inputs(chain, ids, last, memory)
    for segment in progress(range(last, 0, -1), desc="gradients", unit="block"):
        module, here = chain.module(segment, own=True), states[segment]
        assert here is not None
        below = States(here.shape, in_memory=4 * ids.numel() * here.shape[-1] * last <= memory)
        above = found[segment]
        for i, row in enumerate(ids.to(chain.device).split(1)):
            x = here[i].unsqueeze(0).to(chain.device).requires_grad_()
            if segment == last:
                backward_of_loss(chain, module, x, row, seed, i)
            else:
                assert above is not None
                with torch.enable_grad():
                    out = chain.run(segment, module, x, row, {})
                out.backward(above[i].unsqueeze(0).to(out))  # type: ignore[no-untyped-call]
            assert x.grad is not None
            below[i] = x.grad[0]
        states[segment] = None
        found[segment - 1] = below
    return found
