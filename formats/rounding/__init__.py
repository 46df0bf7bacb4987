"""The table of roundings, the methods that choose a format's codes.

Each states whether it needs calibration text, which formats it supports, and how it rounds a single weight, if it can.
`planner.quantize.sequential` applies a rounding to a whole model.

May import: formats.base, formats.errors, formats.integers, formats.rounding.gptq.
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
    """A rounding method.

    `alone(weight, format, hessians)` rounds a single float weight [experts * rows, columns] and returns the format's
    stored tensors; None if the method only works on whole blocks. `hessians` holds one Hessian per expert (one for a
    plain weight), and is empty if the rounding needs no text.
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
        Rounding(
            "nearest",
            False,
            lambda format: True,
            lambda weight, format, _: format.quantize_by_rows(weight, weight.device),
        ),
        Rounding("gptq", True, _integer, gptq),
        Rounding("awq", True, _integer),
        Rounding("yaqa", True, _integer),
        Rounding("tuned", True, _integer),
    )
}


def rounding_named(name: str) -> Rounding:
    """The rounding called `name`. Raises UsageError, which lists the available names."""
    if name not in ROUNDINGS:
        raise UsageError(f"unknown rounding {name!r}: there are {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name]


def rounding_for(format: Format, requested: str | None = None) -> str:
    """The rounding of `format` in a plan: `requested` (by default the format's own), or "nearest" if the format does
    not support it. Raises UsageError for an unknown name."""
    name = rounding_named(requested).name if requested else format.default_rounding
    return name if ROUNDINGS[name].fits(format) else "nearest"


def rounding_alone(format: Format, requested: str | None = None) -> str:
    """The rounding with which `format` is scored on a single unit: `rounding_for`, or "gptq" if that rounding only
    works on whole blocks."""
    name = rounding_for(format, requested)
    return name if ROUNDINGS[name].alone else "gptq"


def refuse_misfit(requested: str | None, formats: Sequence[Format]) -> None:
    """Raise UsageError for an unknown rounding, or one that none of `formats` supports."""
    if requested and not any(rounding_named(requested).fits(format) for format in formats):
        names = ", ".join(format.name for format in formats)
        having = [name for name, row in ROUNDINGS.items() if any(row.fits(format) for format in formats)]
        raise UsageError(f"{names} cannot be rounded by {requested!r}, only by {', '.join(having)}: change --rounding")


__all__ = ["ROUNDINGS", "Hessian", "Rounding", "refuse_misfit", "rounding_alone", "rounding_for", "rounding_named"]
