"""The gradients of the loss at the outputs of a model's segments: from them, a segment alone gives those at its units.

Labels are drawn from the model's own predictions, as for the statistics. Hidden states and gradients of all segments,
float32 [blocks, length, width] each, lie in files beyond `memory` bytes; hidden states go as the pass back uses them.
May import: sensitivity.chain/forward/progress/store.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from bitplan.sensitivity.chain import Chain
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
        below = States(here.shape, memory=memory // last)
        above = found[segment]
        for i, row in enumerate(ids.to(chain.device).split(1)):
            x = here[i].unsqueeze(0).to(chain.device).requires_grad_()
            backward(chain, segment, module, x, row, None if above is None else above[i].unsqueeze(0), seed, i)
            assert x.grad is not None
            below[i] = x.grad[0]
        states[segment] = None
        found[segment - 1] = below
    return found


def backward(
    chain: Chain,
    segment: int,
    module: nn.Module,
    x: Tensor,
    row: Tensor,
    above: Tensor | None,
    seed: int,
    number: int,
    trace: AbstractContextManager = nullcontext(),  # noqa: B008 (it holds nothing)
    check: Callable[[Tensor], None] = lambda logits: None,
) -> None:
    """Run a segment on hidden states x [1, length, width] of the text block row [1, length], inside `trace`, and back
    from `above`, the loss's gradient at its output [1, length, width]; the last segment starts from the loss, whose
    labels follow from `seed` and the block's `number`, and hands its logits to `check`."""
    if segment == len(chain) - 1:
        _backward_of_loss(chain, module, x, row, seed, number, trace, check)
        return
    assert above is not None
    with torch.enable_grad(), trace:
        out = chain.run(segment, module, x, row, {})
    out.backward(above.to(out))  # type: ignore[no-untyped-call]


def _backward_of_loss(
    chain: Chain,
    module: nn.Module,
    x: Tensor,
    row: Tensor,
    seed: int,
    number: int,
    trace: AbstractContextManager,
    check: Callable[[Tensor], None],
) -> None:
    """Run the last segment on hidden states x [1, length, width] of the text block row [1, length], and the summed loss
    back, some tokens at a time. Labels are drawn from the model's predictions by `seed` and the block's `number`."""
    draws = torch.rand(row.shape[1], generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
    length, last = row.shape[1], len(chain) - 1
    for at in chain.pieces(last, length):
        with torch.enable_grad(), trace:
            part = x[:, at] if chain.paths else x
            logits = chain.run(last, module, part, row[:, at], {})[0]
            check(logits)
            logits = logits[: length - 1 - at.start]  # the last token predicts none of the text
            labels = draw(logits.detach(), draws[at][: len(logits)].to(chain.device))
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]


def draw(logits: Tensor, draws: Tensor) -> Tensor:
    """Labels int64 [n] from the softmax of logits [n, vocabulary], by numbers drawn from [0, 1): one token's label
    follows from its number alone."""
    sums = logits.double().softmax(-1).cumsum(-1)
    return (sums <= draws.double().unsqueeze(-1) * sums[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
