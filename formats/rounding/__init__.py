"""How codes are chosen for a format. A rounding is a row: whether it needs text, what it fits, one function.

May import: formats.base, formats.integers, the modules beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from formats.base import Format, Tensors
from formats.errors import UsageError
from formats.integers import IntegerFormat
from formats.rounding.gptq import Hessian, gptq


@dataclass(frozen=True)
class Rounding:
    """`round(weight [experts * rows, columns], format, hessians)` gives the format's stored tensors.

    `hessians` holds one Hessian per expert (one for a plain weight), and is empty where the rounding needs no text.
    """

    name: str
    needs_text: bool
    fits: Callable[[Format], bool]
    round: Callable[[Tensor, Format, Sequence[Hessian]], Tensors]


ROUNDINGS = {
    row.name: row
    for row in (
        Rounding("nearest", False, lambda format: True, lambda weight, format, _: format.quantize(weight)),
        Rounding("gptq", True, lambda format: isinstance(format, IntegerFormat), gptq),
    )
}


def rounding_named(name: str) -> Rounding:
    """The row called `name`. Raises UsageError with the names there are."""
    if name not in ROUNDINGS:
        raise UsageError(f"unknown rounding {name!r}: there are {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name]


def rounding_for(format: Format, asked: str | None = None) -> str:
    """The rounding `format` gets: the one asked for where it fits, else the format's default, else nearest."""
    name = rounding_named(asked).name if asked else format.default_rounding
    return name if ROUNDINGS[name].fits(format) else "nearest"


__all__ = ["ROUNDINGS", "Hessian", "Rounding", "rounding_for", "rounding_named"]
