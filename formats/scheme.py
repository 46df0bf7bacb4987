"""A quantization scheme: a format and the rounding that chooses its codes.

May import: formats.rounding, formats.table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bitplan.formats.rounding import rounding_alone
from bitplan.formats.table import format_named


@dataclass(frozen=True, order=True)
class QuantScheme:
    """A format with a rounding, written `int4-g64/gptq`, or just `fp8` if the rounding is `nearest`."""

    format: str
    rounding: str

    def __str__(self) -> str:
        return self.format if self.rounding == "nearest" else f"{self.format}/{self.rounding}"


def schemes_for(native: str, formats: Sequence[str], rounding: str | None = None) -> list[QuantScheme]:
    """Schemes of `native` (the checkpoint's own format, listed first) and of each of `formats`.

    Each format is combined with the rounding that scores it on a single unit, see `rounding_alone`. Raises
    UnknownFormat, and UsageError for an unknown rounding.
    """
    names = dict.fromkeys((native, *formats))
    return [QuantScheme(n, "nearest" if n == native else rounding_alone(format_named(n), rounding)) for n in names]
