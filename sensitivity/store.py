"""Files written whole or not at all, and the cache that lets long work resume.

The cache lies in $BITPLAN_CACHE, or else in bitplan/ under $XDG_CACHE_HOME or ~/.cache. Deleting it costs only time.
May import: formats.errors.
"""

import hashlib
import os
import tempfile
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitplan.formats.errors import BitplanError, UsageError, first_line

IN_MEMORY = 1 << 30
"""Bytes above which a tensor of hidden states or probabilities lies in a file."""


def cache_folder() -> Path:
    if chosen := os.environ.get("BITPLAN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitplan"


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename; of a symbolic link, what it points to is replaced. Raises BitplanError where the file
    cannot be written; the old one is then as it was."""
    target, part = Path(os.path.realpath(path)), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=target.name, suffix=".part", delete=False
        ) as file:
            part = Path(file.name)
            file.write(text)
        part.chmod(0o644)
        os.replace(part, target)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise BitplanError(f"cannot write {path}: {error.strerror or first_line(error)}") from None


def refuse_overwrite(path: Path | None, force: bool) -> None:
    """Raises UsageError where `path` exists and `force` was not given, or cannot be written; asked before any work."""
    if path is not None:
        above = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UsageError(f"cannot write {path}: {above} is no folder that can be written")
    if path is not None and path.exists() and not force:
        raise UsageError(f"{path} exists: give --force to replace it, or another name")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, path)


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor] | None:
    """The tensors of a file that `save_tensors` wrote, or None where there is no whole one."""
    return load_file(path, device=device) if is_whole(path) else None


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and as long as its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def scratch(shape: tuple[int, ...]) -> Tensor:
    """An empty float32 tensor on the CPU; a large one lies in a temporary file, which goes when the tensor does."""
    size = prod(shape)
    if 4 * size <= IN_MEMORY:
        return torch.empty(shape)
    file = tempfile.NamedTemporaryFile(prefix="bitplan-")  # noqa: SIM115 (unlinked below; the mapping stays)
    made = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32).view(shape)
    file.close()
    return made


def sha256(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()
