"""Text that stands in two sets of texts that should be disjoint.

Every run of WINDOW characters, white space aside, has a polynomial hash modulo 2^64 (Karp and Rabin 1987); looking up
one set's in the other's finds shared runs in time linear in the texts, whatever their language or line breaks.
May import: formats.errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitplan.formats.errors import UsageError

WINDOW = 256
"""A power of two. Headers and phrases that many files share are shorter, documents longer."""
STRIDE = 64
"""One set is looked up at every STRIDEth position, so a shared run of WINDOW + STRIDE - 1 is found wherever it lies."""
FACTOR = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Passage:
    file: str
    text: str
    document: int
    """Passages of one document are not compared."""


def refuse_shared(chosen: Sequence[Passage], heldout: Sequence[Passage]) -> None:
    """Raise UsageError where a passage of `heldout` shares a run of text with one of another document in `chosen`."""
    found = [(_hashes(passage.text)[::STRIDE], passage) for passage in chosen]
    hashes = np.concatenate([h for h, _ in found])
    owners = np.concatenate([np.full(len(h), i) for i, (h, _) in enumerate(found)])
    documents = np.array([passage.document for passage in chosen])
    for passage in heldout:
        own = documents[owners] == passage.document
        shared = np.isin(hashes, _hashes(passage.text)) & ~own
        if shared.any():
            other = chosen[int(owners[int(shared.argmax())])].file
            where = f"{passage.file} and {other} share text" if other != passage.file else f"{other} is in both"
            raise UsageError(
                f"{where}: held-out text must be text that calibrates and chooses nothing; give other held-out text, or"
                " take the shared part out"
            )


def _hashes(text: str) -> NDArray[np.uint64]:
    """A hash of each window of a text, in order; of a shorter text, the one of all of it, filled up with zeros."""
    letters = "".join(text.split())
    codes = np.frombuffer(letters.ljust(WINDOW, "\0").encode("utf-32-le"), np.uint32).astype(np.uint64)
    length = 1
    while length < WINDOW:  # windows twice as long: hash(ab) = hash(a) * FACTOR^length + hash(b)
        codes = codes[:-length] * np.uint64(pow(FACTOR, length, 1 << 64)) + codes[length:]
        length *= 2
    return codes
