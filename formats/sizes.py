"""Parsing and formatting of sizes in bytes. May import: formats.errors."""

import re

from bitplan.formats.errors import UsageError

SIZES = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}
SIZES["KB"] = SIZES["kB"]
MIB = SIZES["MiB"]


def parse_size(text: str) -> int:
    """Bytes of a size such as 3MiB, 6GB or 1234567B. Raises UsageError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not found:
        raise UsageError(f"{text!r} is not a size: write a number and a unit, for example 3MiB, 6GB or 1234567B")
    number, unit = found.groups()
    if unit not in SIZES:
        fitting = [name for name in SIZES if name.lower() == unit.lower()]
        if fitting:
            both = " or ".join(
                f"{number}{name}" for name in fitting[:1] + [n for n in ("GiB", "MiB") if n[0] == fitting[0][0]]
            )
            raise UsageError(f"{text!r} could mean bits or bytes: write {both} for bytes")
        raise UsageError(f"{text!r} has no unit of bytes: write {number}B, {number}MiB or {number}GiB")
    size = int(float(number) * SIZES[unit]) if "." in number else int(number) * SIZES[unit]
    if size <= 0:
        raise UsageError(f"{text!r} is not a valid size: it must be above zero")
    return size


def format_bytes(size: int) -> str:
    """Bytes as text with a binary unit, such as 3.14 MiB."""
    value, names = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(names) > 1:
        value, names = value / 1024, names[1:]
    return f"{size} B" if names[0] == "B" else f"{value:.2f} {names[0]}"
