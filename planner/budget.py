"""What people say → bytes. May import: formats.errors."""

import math
import re

from bitplan.formats.errors import UsageError

SIZES = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}
SIZES["KB"] = SIZES["kB"]


def parse_size(text: str) -> int:
    """Bytes of a size such as 3MiB, 6GB or 1234567B. Raises UsageError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not found:
        raise UsageError(f"{text!r} is no size: write a number and a unit, as 3MiB, 6GB or 1234567B")
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
        raise UsageError(f"{text!r} is no budget: it must be above zero")
    return size


def refuse_unclear(given: dict[str, object]) -> list[str]:
    """The one way in which the budget was said. Raises UsageError for none, or more than one."""
    said = [name for name, value in given.items() if value is not None]
    if len(said) != 1:
        *names, last = given
        raise UsageError(f"say the budget once, by {', '.join(names)} or {last}; given: {', '.join(said) or 'none'}")
    return said


def budget_bytes(size: str | None, bpw: float | None, fraction: float | None, parameters: int) -> tuple[int, str]:
    """The budget in bytes and how it was said; exactly one of the three must be given.

    `bpw` is bits per weight over all parameters, `fraction` a part of 2 bytes per parameter. Raises UsageError.
    """
    said = refuse_unclear({"--budget": size, "--bpw": bpw, "--fraction": fraction})
    if size is not None:
        return parse_size(size), size
    value = bpw if bpw is not None else fraction
    assert value is not None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{said[0]} {value} is no budget: it must be a number above zero")
    if bpw is not None:
        return int(bpw * parameters / 8), f"{bpw:g} bits per weight"
    return int(value * 2 * parameters), f"{value:g} of the bf16 size"


def human(size: int) -> str:
    """Bytes for a reader: 3.14 MiB."""
    value, names = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(names) > 1:
        value, names = value / 1024, names[1:]
    return f"{size} B" if names[0] == "B" else f"{value:.2f} {names[0]}"
