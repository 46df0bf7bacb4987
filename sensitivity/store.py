"""Files written whole or not at all, and the cache that lets long work resume: each of its entries has a checksum.

The cache lies in $BITPLAN_CACHE, or else in bitplan/ under $XDG_CACHE_HOME or ~/.cache. Deleting it costs only time.
May import: formats.errors/sizes.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitplan.formats.errors import UsageError, WriteFailed, first_line, printable
from bitplan.formats.sizes import format_bytes

LARGER = "set TMPDIR and BITPLAN_CACHE to folders on a larger disk, or give fewer --tokens"
IN_MEMORY = 1 << 30
"""Bytes above which a tensor of hidden states or probabilities lies in a file."""


def cache_folder() -> Path:
    if chosen := os.environ.get("BITPLAN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitplan"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises WriteFailed, one sentence with the path, where what is done inside cannot write there."""
    try:
        yield
    except Exception as error:
        # tokenizers' writer raises nothing narrower than Exception.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        hint = "; set BITPLAN_CACHE to a folder with room that can be written" if cache_folder() in path.parents else ""
        raise WriteFailed(f"cannot write {path}: {reason}{hint}") from None


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename; of a symbolic link, what it points to is replaced. Raises WriteFailed where the file
    cannot be written; the old one is then as it was."""
    target, part = Path(os.path.realpath(path)), None
    with writing(path):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=target.parent, prefix=target.name, suffix=".part", delete=False
            ) as file:
                part = Path(file.name)
                file.write(text)
            part.chmod(0o644)
            os.replace(part, target)
        finally:
            if part is not None:
                part.unlink(missing_ok=True)


def refuse_overwrite(path: Path | None, force: bool) -> None:
    """Raises UsageError where `path` exists and `force` was not given, or cannot be written; asked before any work."""
    if path is not None:
        above = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UsageError(f"cannot write {path}: {above} is no folder that can be written")
    if path is not None and path.exists() and not force:
        raise UsageError(f"{path} exists: give --force to replace it, or another name")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file beside, under a name of its own, and rename. Raises WriteFailed, as for a full disk."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_full_disk(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, part, {CHECKSUM: checksum(whole)})
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def refuse_full_disk(folder: Path, size: int) -> None:
    """Raises WriteFailed where the disk of an existing folder has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        prune = "; `bitplan cache` lists what can go" if cache_folder() in (folder, *folder.parents) else ""
        sizes = f"{format_bytes(free)} free, {format_bytes(size)} are needed"
        raise WriteFailed(f"the disk of {folder} has {sizes}{prune}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes the cache's entry at `path`; the others wait, and then find it. The lock is a file
    beside it, on a network volume too. Raises WriteFailed where the file system cannot lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that makes {path}", file=sys.stderr)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise WriteFailed(f"cannot lock {path}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    try:
        yield
    finally:
        lock.release()


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor] | None:
    """The tensors of a file that `save_tensors` wrote, or None where there is no whole one. Its time becomes now's, by
    which `bitplan cache` tells what has not been used for long."""
    if not is_whole(path):
        return None
    try:
        tensors = load_file(path, device=device)
    except (OSError, SafetensorError):  # it was deleted just now
        return None
    with suppress(OSError):  # of another user
        os.utime(path)
        _WHOLE.add(_identity(path))
    return tensors


_WHOLE: set[tuple[str, int, int, int]] = set()
"""Files whose checksum this process has found right."""


def _identity(path: Path) -> tuple[str, int, int, int]:
    facts = path.stat()
    return str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns


def is_whole(path: Path) -> bool:
    """Whether a file that `save_tensors` wrote is there and has its checksum; one that has not is deleted, and said. It
    is read for that once in a process, as long as it stays as it is."""
    try:
        identity = _identity(path)
        if identity not in _WHOLE:
            with safe_open(path, "pt") as file:
                written = (file.metadata() or {}).get(CHECKSUM)
            if written != checksum(load_file(path)):
                drop_damaged(path)
                return False
            _WHOLE.add(identity)
        return True
    except FileNotFoundError:
        return False
    except (OSError, SafetensorError):
        drop_damaged(path)
        return False


CHECKSUM = "sha256"


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def drop_damaged(path: Path) -> None:
    """Delete an entry of the cache that is not what was written, so that it is made again, and say so."""
    print(printable(f"{path} is damaged, or an older bitplan wrote it: it is made again"), file=sys.stderr)
    with suppress(OSError):
        path.unlink()


def write_row(path: Path, row: Any) -> None:
    """Write a JSON value with its checksum, for `read_row`. Raises WriteFailed."""
    write_text(path, checked_json(row))


def append_row(path: Path, row: Any) -> None:
    """Add a line with a JSON value and its checksum, for `unchecked_json`. Raises WriteFailed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:  # the line break goes first: a line may be cut before its own
            file.write("\n" + checked_json(row))


def checked_json(row: Any) -> str:
    """One line of JSON: the value, and the checksum of its text."""
    text = json.dumps(row)
    return f'{{"{CHECKSUM}": "{sha256(text)}", "row": {text}}}'


def unchecked_json(line: str) -> Any | None:
    """The value of a line that `checked_json` gave, or None where it is not as it was written."""
    try:
        entry = json.loads(line)
        return entry["row"] if sha256(json.dumps(entry["row"])) == entry[CHECKSUM] else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_row(path: Path) -> Any | None:
    """The value of a file that `write_row` wrote, or None where there is none, or its checksum is not right: then the
    file is deleted, and said."""
    try:
        row = unchecked_json(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    if row is None:
        drop_damaged(path)
    return row


class States:
    """Float32 hidden states or gradients of each text block, written and read a block at a time: in memory where
    they take at most `memory` bytes and no path is given, else in a file (there, or a temporary one), which takes none
    of the process's memory."""

    def __init__(self, shape: tuple[int, ...], path: Path | None = None, memory: int = 0):
        self.shape = shape
        """[blocks, length, width]."""
        self.path = path
        size = 4 * prod(shape)
        self._tensor = torch.empty(shape) if path is None and size <= memory else None
        self._file: IO[bytes] | None = None
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (as long as the states are)
        elif self._tensor is None:
            try:
                refuse_full_disk(Path(tempfile.gettempdir()), size)
            except WriteFailed as error:
                raise WriteFailed(f"{error}: {LARGER}") from None
            self._file = tempfile.TemporaryFile(prefix="bitplan-")  # noqa: SIM115

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return 0 if self._tensor is None else self._tensor.nbytes

    def __getitem__(self, block: int | slice | Tensor) -> Tensor:
        """A block [length, width], or several [blocks, length, width] by a slice or their numbers, int64 [blocks]."""
        if self._tensor is not None:
            return self._tensor[block].clone()
        assert self._file is not None
        if not isinstance(block, int):
            numbers = range(self.shape[0])[block] if isinstance(block, slice) else block.tolist()
            return torch.stack([self[number] for number in numbers])
        size = 4 * prod(self.shape[1:])
        self._file.seek(block * size)
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=torch.float32).view(self.shape[1:])

    def __setitem__(self, block: int, value: Tensor) -> None:
        value = value.detach().float().cpu().contiguous()
        if self._tensor is not None:
            self._tensor[block] = value
            return
        assert self._file is not None
        try:
            self._file.seek(block * 4 * prod(self.shape[1:]))
            self._file.write(value.numpy().tobytes())
            self._file.flush()
        except OSError as error:
            where = self.path.parent if self.path else tempfile.gettempdir()
            need = 4 * prod(self.shape)
            raise WriteFailed(
                f"cannot keep hidden states or probabilities in {where} ({need:,} bytes): {error.strerror}; {LARGER}"
            ) from None


def sha256(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()
