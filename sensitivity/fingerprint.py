"""What a model is, as hashes: every byte of its weights, its config, and the code that its repository brings.

Hashing weights takes a second for each one or two gigabytes, so the cache remembers each file's hashes by path, size,
times and inode. May import: formats.errors, sensitivity.config/progress/reading/store.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from bitplan.formats.errors import BitplanError, ModelUnreadable, first_line
from bitplan.sensitivity.config import read_config
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.reading import CONFIG_LIMIT, open_regular, parse_json, read_bytes
from bitplan.sensitivity.store import cache_folder, read_row, sha256, write_row

CHUNK = 1 << 24
SETTLED = 2.0
"""Seconds since a file's last change after which its hashes are remembered: file systems round times, so that a change
soon after another can leave the time as it is."""
MOST_DIMENSIONS = 16
BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of a number of each type of safetensors."""
NO_CONTENT = ("transformers_version", "_name_or_path")
"""Keys of config.json that say who wrote it."""


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data begins, and name → dtype, shape, data_offsets. Raises ModelUnreadable where the
    header is no whole one: tensors lie one after the other and fill the file."""
    with open_regular(path, ModelUnreadable) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(CONFIG_LIMIT, size - 8):
            raise ModelUnreadable(f"{path} is not a whole safetensors file: fetch or save it again")
        header = parse_json(file.read(length), f"the header of {path}", ModelUnreadable)
    if not isinstance(header, dict):
        raise ModelUnreadable(f"{path} is not a whole safetensors file (its header is no object): fetch it again")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata or {}, dict) or not all(isinstance(value, str) for value in (metadata or {}).values()):
        raise ModelUnreadable(f"{path} is not a whole safetensors file: its __metadata__ are no texts")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        start_at, stop = _offsets(path, name, entry)
        if start_at != end:
            raise ModelUnreadable(
                f"{path} is not a whole safetensors file: {name[:200]} overlaps another or leaves a gap"
            )
        end = stop
        if (stop - start_at) * 8 != prod(entry["shape"]) * BITS[entry["dtype"]]:
            raise ModelUnreadable(
                f"{path} is not a whole safetensors file: {name[:200]} has {stop - start_at:,} bytes, which is not what"
                f" its shape takes"
            )
    if size != 8 + length + end:
        raise ModelUnreadable(f"{path} is cut short: {size:,} of {8 + length + end:,} bytes; fetch it again")
    return 8 + length, header


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends. Raises ModelUnreadable for an entry that is not as the format has it."""
    try:
        start, stop = entry["data_offsets"]
        right = entry["dtype"] in BITS and type(start) is type(stop) is int and 0 <= start <= stop
        shape = entry["shape"]
        right &= isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
        right &= all(type(size) is int and size >= 0 for size in shape)
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ModelUnreadable(
            f"{path} is not a whole safetensors file: the dtype, shape or data_offsets of {name[:200]} are missing or"
            f" wrong"
        )
    return start, stop


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
    known = read_row(memory)
    if known is not None and known["file"] == facts:
        return known["tensors"]
    tensors = _hashed(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        with suppress(BitplanError):  # a cache that cannot be written costs time here, and complains where it matters
            write_row(memory, {"file": facts, "tensors": tensors})
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
    """sha256 of config.json's content and, where the model runs code of its repository or of another, of that code.

    Raises ModelUnreadable where there is no config.json, it is no JSON object, or the code cannot be fetched.
    """
    content = {key: value for key, value in read_config(folder).items() if key not in NO_CONTENT}
    code: list[bytes | str] = []
    if trust_remote_code and "auto_map" in content:
        for place in (folder, *_other_repositories(content["auto_map"])):
            for path in sorted(place.rglob("*.py")):
                code += [str(path.relative_to(place)), read_bytes(path, CONFIG_LIMIT, ModelUnreadable)]
    return sha256(json.dumps(content, sort_keys=True), *code)


def _other_repositories(auto_map: dict[str, Any]) -> list[Path]:
    """Folders of the code that auto_map takes from elsewhere, as "owner/name--module.Class". On the hub, that is the
    newest commit, whose code is then fetched whole."""
    classes = [name for value in auto_map.values() for name in (value if isinstance(value, list) else [value])]
    names = sorted({name.split("--")[0] for name in classes if isinstance(name, str) and "--" in name})
    return [Path(name) if Path(name).is_dir() else _fetched(name) for name in names]


def _fetched(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.py"]))
    except (OSError, ValueError) as reason:  # the hub's errors are OSErrors; ValueError: no name of a repository
        raise ModelUnreadable(
            f"config.json takes code from {repository[:200]!r}, which cannot be fetched ({first_line(reason)}): save"
            " that code beside the model, or fetch it while the hub can be reached"
        ) from None


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
