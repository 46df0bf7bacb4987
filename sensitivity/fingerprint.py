"""What a model is, as hashes: every byte of its weights, its config, and the code that its repository brings.

Hashing weights takes a second for each one or two gigabytes, so the cache remembers each file's hashes by path, size,
times and inode. May import: formats.errors, sensitivity.progress/store.
"""

import hashlib
import json
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitplan.formats.errors import BitplanError, ModelUnreadable
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.store import cache_folder, sha256, write_text

CHUNK = 1 << 24
SETTLED = 2.0
"""Seconds since a file's last change after which its hashes are remembered: file systems round times, so that a change
soon after another can leave the time as it is."""
NO_CONTENT = ("transformers_version", "_name_or_path")
"""Keys of config.json that say who wrote it."""


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data begins, and name → dtype, shape, data_offsets. Raises ModelUnreadable."""
    with open(path, "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        except (struct.error, ValueError, MemoryError, OverflowError):
            raise ModelUnreadable(f"{path} is not a whole safetensors file: fetch or save it again") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if path.stat().st_size != expected:
        raise ModelUnreadable(f"{path} is cut short: {path.stat().st_size:,} of {expected:,} bytes; fetch it again")
    return 8 + length, header


def weights_fingerprint(files: Sequence[Path]) -> str:
    """sha256 over every tensor's name, dtype, shape and all of its bytes, however the files are sharded."""
    tensors: dict[str, str] = {}
    for path in files:
        tensors |= _remembered(path)
    return sha256(*(f"{name} {tensors[name]}" for name in sorted(tensors)))


def _remembered(path: Path) -> dict[str, str]:
    """A file's tensors → sha256, hashed once as long as the file stays as it is."""
    path = path.resolve()
    stat = path.stat()
    # The change time cannot be set back, as the modification time can. An old file under a new name is another file.
    facts = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    memory = cache_folder() / "fingerprints" / f"{sha256(str(path))[:24]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_text())
        if known["file"] == facts:
            return known["tensors"]
    tensors = _hashed(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        with suppress(BitplanError):  # a cache that cannot be written costs time here, and complains where it matters
            write_text(memory, json.dumps({"file": facts, "tensors": tensors}))
    return tensors


def _hashed(path: Path) -> dict[str, str]:
    begin, header = read_header(path)
    tensors = {}
    size = path.stat().st_size
    with (
        open(path, "rb") as file,
        progress(total=size, desc=f"hashing {path.name}", unit="B", unit_scale=True, disable=size < 1 << 30) as bar,
    ):
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
            start, stop = entry["data_offsets"]
            file.seek(begin + start)
            while start < stop:
                chunk = file.read(min(CHUNK, stop - start))
                if not chunk:
                    raise ModelUnreadable(f"{path} has become shorter while it was read: fetch it again")
                digest.update(chunk)
                start += len(chunk)
                bar.update(len(chunk))
            tensors[name] = digest.hexdigest()
    return tensors


def config_fingerprint(folder: Path, trust_remote_code: bool = False) -> str:
    """sha256 of config.json's content and, where the model runs code of its repository, of that code.

    Raises ModelUnreadable where there is no config.json, or it is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        content = {key: value for key, value in config.items() if key not in NO_CONTENT}
    except FileNotFoundError:
        raise ModelUnreadable(
            f"{folder} has no config.json: name the folder of a Hugging Face model or a hub id"
        ) from None
    except (ValueError, AttributeError):
        raise ModelUnreadable(f"{folder}: config.json is no valid JSON: fetch or save it again") from None
    code: list[bytes | str] = []
    if trust_remote_code and "auto_map" in config:
        for path in sorted(folder.rglob("*.py")):
            code += [str(path.relative_to(folder)), path.read_bytes()]
    return sha256(json.dumps(content, sort_keys=True), *code)


# Older plans and profiles know weights by samples, and the config by its file's bytes.

SAMPLE = 4096
"""Bytes hashed at the start and in the middle of every tensor."""


def sampled_fingerprint(files: Sequence[Path]) -> str:
    """The weights' fingerprint as older plans and profiles hold it."""
    parts: dict[str, bytes] = {}
    for path in files:
        begin, header = read_header(path)
        with open(path, "rb") as file:
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                samples = b""
                for at in (start, (start + stop) // 2):
                    file.seek(begin + at)
                    samples += file.read(min(SAMPLE, stop - at))
                parts[name] = f"{name} {entry['dtype']} {entry['shape']} ".encode() + samples
    return sha256(*(parts[name] for name in sorted(parts)))
