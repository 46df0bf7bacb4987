"""How codes are chosen for a format. A rounding is a row: whether it needs text, what it fits, and how it rounds one
weight alone, where it can; planner.sequence rounds whole models.

May import: formats.base, formats.integers, the modules beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bitplan.formats.base import Format, Tensors
from bitplan.formats.errors import UsageError
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.rounding.gptq import Hessian, gptq


@dataclass(frozen=True)
class Rounding:
    """`alone(weight [experts * rows, columns], format, hessians)` gives the format's stored tensors.

    `hessians` holds one Hessian per expert (one for a plain weight), and is empty where the rounding needs no text.
    """

    name: str
    needs_text: bool
    fits: Callable[[Format], bool]
    alone: Callable[[Tensor, Format, Sequence[Hessian]], Tensors] | None = None


def _integer(format: Format) -> bool:
    return isinstance(format, IntegerFormat)


ROUNDINGS = {
    row.name: row
    for row in (
        Rounding("nearest", False, lambda format: True, lambda weight, format, _: format.quantize(weight)),
        Rounding("gptq", True, _integer, gptq),
        Rounding("awq", True, _integer),
        Rounding("tuned", True, _integer),
    )
}


def rounding_named(name: str) -> Rounding:
    """The row called `name`. Raises UsageError with the names there are."""
    if name not in ROUNDINGS:
        raise UsageError(f"unknown rounding {name!r}: there are {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name]


def rounding_for(format: Format, requested: str | None = None) -> str:
    """The rounding `format` gets in a plan: the one asked for where it fits, else the format's default."""
    name = rounding_named(requested).name if requested else format.default_rounding
    return name if ROUNDINGS[name].fits(format) else "nearest"


def rounding_alone(format: Format, requested: str | None = None) -> str:
    """The rounding that scores `format` on a unit alone: the one that a plan would use, or gptq in its place."""
    name = rounding_for(format, requested)
    return name if ROUNDINGS[name].alone else "gptq"


def refuse_misfit(requested: str | None, formats: Sequence[Format]) -> None:
    """Raises UsageError for a rounding that there is not, or that none of `formats` has."""
    if requested and not any(rounding_named(requested).fits(format) for format in formats):
        names = ", ".join(format.name for format in formats)
        having = [name for name, row in ROUNDINGS.items() if any(row.fits(format) for format in formats)]
        raise UsageError(f"{names} cannot be rounded by {requested!r}, only by {', '.join(having)}: change --rounding")


__all__ = ["ROUNDINGS", "Hessian", "Rounding", "refuse_misfit", "rounding_alone", "rounding_for", "rounding_named"]
