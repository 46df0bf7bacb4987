"""What lies on disk while a pass goes back through a chain, so that an interrupted one goes on: the gradient at the
input of the segment that was finished last, and the sums of tied heads, whose lookups are still to come.

Each rank has its own. May import: sensitivity.ranks/store.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitplan.sensitivity import ranks
from bitplan.sensitivity.store import States, load_tensors, save_tensors, write_text

Sums = dict[str, dict[str, Tensor]]
"""By a unit's name and the kind of sum."""


@dataclass(frozen=True)
class Finished:
    """A pass that was interrupted: `segment` is done, as are all after it."""

    segment: int
    gradient: States
    """At the segment's input."""
    heads: Sums


class Back:
    """The files of this rank's pass in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.prefix = folder, f"back-{ranks.rank()}-of-{ranks.world()}"
        self.done, self.flat = folder / f"{self.prefix}-done.txt", folder / f"{self.prefix}-heads.safetensors"

    def path(self, segment: int) -> Path:
        """Of the gradient at a segment's input."""
        return self.folder / f"{self.prefix}-{segment}.raw"

    def keep_heads(self, heads: Sums) -> None:
        flat = {f"{name} {kind}": tensor for name, sums in heads.items() for kind, tensor in sums.items()}
        save_tensors(self.flat, flat | {"": torch.zeros(0)})

    def keep(self, segment: int, above: States | None) -> None:
        """Note that a segment and all after it are done; the gradient at its output, `above`, is not needed again."""
        write_text(self.done, str(segment))
        if above is not None and above.path is not None:
            above.path.unlink(missing_ok=True)

    def finished(self, ids: Tensor, device: str) -> Finished | None:
        """What an interrupted pass over text int64 [blocks, length] left, if it is whole."""
        tensors = load_tensors(self.flat, device)
        if not self.done.exists() or tensors is None:
            return None
        segment = int(self.done.read_text(encoding="utf-8"))
        path = self.path(segment)
        if not path.exists():
            return None
        heads: Sums = {}
        for key, tensor in tensors.items():
            name, _, kind = key.partition(" ")
            heads.setdefault(name, {})[kind] = tensor
        count, length = ids.shape
        return Finished(segment, States((count, length, path.stat().st_size // (4 * count * length)), path), heads)

    def clear(self) -> None:
        for path in self.folder.glob(f"{self.prefix}*"):
            path.unlink()
