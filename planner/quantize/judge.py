"""What a model loses whose first segments are rounded while the others are in full precision.

May import: sensitivity.
"""

from functools import cached_property

from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.forward import after_blocks, through
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import States
from bitplan.sensitivity.texts.text import Blocks

TOKENS = 2048
"""Of the search text, that are judged by."""


class Judge:
    """Compares by KL on the search text, of which `ids`, int64 [blocks, length], are used."""

    def __init__(self, session: Session, chain: Chain):
        search = session.texts.search.ids
        self.ids = search[: max(1, TOKENS // search.shape[1])]
        self._session, self._chain = session, chain

    @cached_property
    def _reference(self) -> Reference:
        return self._session.reference(Blocks(self.ids))

    def kl(self, segment: int, behind: States) -> float:
        """Nats per token, for what a segment that is not the last puts out: float32 [blocks, length, width]."""
        for after in range(segment + 1, len(self._chain) - 1):
            behind = through(self._chain, after, behind, self.ids, self._session.in_memory)
        hidden = behind
        log_q = after_blocks(self._chain, lambda block: hidden[block].unsqueeze(0), self.ids, {})
        return self._reference.compare(log_q).kl
