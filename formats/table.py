"""The formats by name. May import: the format modules beside it, formats.errors."""

import difflib

import torch

from formats.base import Format
from formats.bnb import Int8BnbFormat, Nf4Format
from formats.errors import UnknownFormat
from formats.floats import Float8Format, FloatFormat
from formats.integers import IntegerFormat

ROWS: list[Format] = [
    FloatFormat("fp32", 32, torch.float32),
    FloatFormat("bf16", 16, torch.bfloat16),
    FloatFormat("fp16", 16, torch.float16),
    Float8Format("fp8", 8),
    IntegerFormat("int8", 8, group=0, zero_point="middle", default_rounding="nearest"),
    Int8BnbFormat("int8-bnb", 8),
    Nf4Format("nf4", 4),
    *(IntegerFormat(f"int{bits}-g{group}", bits, group=group) for bits in (6, 5, 4, 3, 2) for group in (128, 64, 32)),
    IntegerFormat("binary-g64", 1, group=64, zero_point="half"),
]
FORMATS: dict[str, Format] = {row.name: row for row in ROWS}
NATIVE = {row.dtype: row.name for row in ROWS if isinstance(row, FloatFormat)}
"""The name of a checkpoint's own float type."""

MENU = (
    *("int8", "int6-g64", "int5-g64", "int4-g128", "int4-g64", "int4-g32"),
    *("int3-g128", "int3-g64", "int3-g32", "int2-g64", "int2-g32"),
)
"""What a plan chooses from unless told otherwise, beside each weight's own float type."""


def format_named(name: str) -> Format:
    """The row called `name`; a name without its group size means groups of 64. Raises UnknownFormat with the nearest
    names."""
    for full in (name, f"{name}-g64"):
        if full in FORMATS:
            return FORMATS[full]
    near = difflib.get_close_matches(name, FORMATS, n=3, cutoff=0.4) or list(FORMATS)
    raise UnknownFormat(f"unknown format {name!r}: did you mean {', '.join(near)}? `bitplan formats` lists them all")
