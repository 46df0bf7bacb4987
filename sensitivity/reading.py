"""Reading of files that others wrote: nothing is read from what is no regular file, nor without a limit.

Every JSON file, header and text that a person hands in comes through here, so that a pipe, a device, a huge file or
hostile JSON ends in one sentence that names the file. May import: formats.errors/sizes.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from bitplan.formats.errors import BitplanError, FileInvalid, UsageError, first_line
from bitplan.formats.sizes import format_bytes

CONFIG_LIMIT = 64 << 20
"""Bytes of a config, an index of shards or a header; the largest index of a published model has 9 MB."""
PLAN_LIMIT = 128 << 20
"""Bytes of a plan or profile; a profile of 25,000 units in 11 formats has 90 MB."""
TEXT_LIMIT = 1 << 30
MOST_KEYS = 1000
"""Keys of one object in a plan or profile."""
MOST_VALUES = 1 << 22
"""Values in one JSON text, by its commas: each takes far more memory than the few bytes that it is written in. The
profile of 25,000 units has 2.5 million."""
PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Where a person passes a pipe on purpose: bitplan plan … --text <(zcat text.gz)."""

Refused = type[BitplanError]


@contextmanager
def open_regular(path: Path, error: Refused = FileInvalid) -> Iterator[BinaryIO]:
    """A regular file, open for reading. Raises `error` for anything else: opening a pipe would wait for its writer, and
    a device may never end."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as reason:  # ValueError: a zero byte in the name
        raise error(f"cannot read {path}: {getattr(reason, 'strerror', None) or first_line(reason)}") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise error(f"cannot read {path}: it is a folder, pipe or device, and a regular file is needed")
    with os.fdopen(number, "rb") as file:
        yield file


def read_bytes(path: Path, limit: int, error: Refused = FileInvalid) -> bytes:
    """All of a regular file of at most `limit` bytes. Raises `error`."""
    with open_regular(path, error) as file:
        try:
            content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
        except OSError as reason:
            raise error(f"cannot read {path}: {reason.strerror or first_line(reason)}") from None
    if content is None or len(content) > limit:
        raise error(f"cannot read {path}: it has more than {format_bytes(limit)}, the most that is read of such a file")
    return content


def read_json(path: Path, limit: int = CONFIG_LIMIT, error: Refused = FileInvalid) -> Any:
    """The value of a JSON file, as `parse_json` has it. Raises `error`."""
    return parse_json(read_bytes(path, limit, error), path, error)


def parse_json(content: bytes | str, where: object, error: Refused = FileInvalid, strict: bool = False) -> Any:
    """JSON without NaN, integers beyond 64 bits, and nesting that exhausts the stack.

    `strict` is for bitplan's own files: no infinity (transformers writes one into some configs), no key twice, and no
    object of more than MOST_KEYS. `where` names the file, or its line, in messages. Raises `error`.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        if text.count(",") > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        value = json.loads(
            text,
            parse_constant=partial(_constant, strict),
            parse_int=_int64,
            parse_float=partial(_float64, strict),
            object_pairs_hook=_object if strict else None,
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as reason:
        at = f"line {reason.lineno} column {reason.colno}: {reason.msg}"
    except UnicodeDecodeError:
        at = "it is not UTF-8"
    except UnicodeEncodeError:
        at = "it holds half a character, a lone surrogate"
    except RecursionError:
        at = "it is nested too deeply"
    except ValueError as reason:
        at = str(reason)
    raise error(f"{where} is no valid JSON ({at}): fetch or save it again")


def _constant(strict: bool, name: str) -> float:
    if strict or name == "NaN":
        raise ValueError(f"{name} is no number of JSON")
    return float(name)


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= (value := int(digits)) < 1 << 63:
        raise ValueError(f"the number {digits[:24]}{'…' if len(digits) > 24 else ''} does not fit 64 bits")
    return value


def _float64(strict: bool, digits: str) -> float:
    value = float(digits)
    if strict and not isfinite(value):
        raise ValueError(f"the number {digits[:24]} does not fit 64 bits")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_KEYS:
        raise ValueError(f"an object has {len(pairs):,} keys")
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:64]!r} is there twice")
    return found


def read_text(path: Path) -> str:
    """A UTF-8 text file of at most TEXT_LIMIT bytes; also a pipe, where PIPES names it. Raises UsageError."""
    if str(path).startswith(PIPES) and not path.is_file():
        content = _piped(path)
    else:
        content = read_bytes(path, TEXT_LIMIT, UsageError)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: give a plain text file") from None
    if "\0" in text:
        raise UsageError(f"{path} holds zero bytes, so it is not text: give a plain text file")
    return text


@cache  # a pipe can be read once, and a command may ask for its text twice
def _piped(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(TEXT_LIMIT + 1)
    except OSError as reason:
        raise UsageError(f"cannot read {path}: {reason.strerror or first_line(reason)}") from None
    if len(content) > TEXT_LIMIT:
        raise UsageError(f"cannot read {path}: it gives more than {format_bytes(TEXT_LIMIT)}")
    return content
