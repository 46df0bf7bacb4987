"""A quantization scheme: a format, and the rounding that chooses its codes. May import: the modules beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitplan.formats.rounding import rounding_alone
from bitplan.formats.table import format_named


@dataclass(frozen=True, order=True)
class QuantScheme:
    """What a unit can become: `int4-g64/gptq`, or `fp8` where nearest codes are meant."""

    format: str
    rounding: str

    def __str__(self) -> str:
        return self.format if self.rounding == "nearest" else f"{self.format}/{self.rounding}"


def schemes_for(native: str, formats: Sequence[str], rounding: str | None = None) -> list[QuantScheme]:
    """The checkpoint's own format `native`, and each of the formats with the rounding that scores it alone."""
    names = dict.fromkeys((native, *formats))
    return [QuantScheme(n, "nearest" if n == native else rounding_alone(format_named(n), rounding)) for n in names]
