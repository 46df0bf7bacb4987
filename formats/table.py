"""The formats by name. May import: the format modules beside it, formats.errors."""

import difflib

import torch

from bitplan.formats.base import Format
from bitplan.formats.bnb import Bnb4Format, Int8BnbFormat
from bitplan.formats.errors import UnknownFormat
from bitplan.formats.floats import Float8Format, FloatFormat
from bitplan.formats.integers import IntegerFormat

GROUPS = (128, 64, 32)
ROWS: list[Format] = [
    FloatFormat("fp32", 32, torch.float32),
    FloatFormat("bf16", 16, torch.bfloat16),
    FloatFormat("fp16", 16, torch.float16),
    Float8Format("fp8", 8),
    IntegerFormat("int8", 8, group=0, zero_point="middle", default_rounding="nearest"),
    Int8BnbFormat("int8-bnb", 8),
    Bnb4Format("nf4", 4),
    Bnb4Format("fp4", 4),
    *(
        IntegerFormat(f"int{bits}-{f'g{group}' if group else 'row'}", bits, group=group)
        for bits in (8, 7, 6, 5, 4, 3, 2)
        for group in (0, *GROUPS)
    ),
    *(
        IntegerFormat(f"int{bits}-g{group}-z16", bits, group=group, zero_point="float")
        for bits in (4, 3, 2, 1)
        for group in GROUPS
    ),
    *(IntegerFormat(f"ternary-g{group}", 1.6, group=group, zero_point="half", ternary=True) for group in GROUPS),
    *(IntegerFormat(f"binary-g{group}", 1, group=group, zero_point="half") for group in GROUPS),
]
FORMATS: dict[str, Format] = {row.name: row for row in ROWS}
NATIVE = {row.dtype: row.name for row in ROWS if isinstance(row, FloatFormat)}
"""The name of a checkpoint's own float type."""
DTYPES = {str(dtype).removeprefix("torch."): name for dtype, name in NATIVE.items()}
"""The same by the dtype's name, as files have it: "bfloat16" → "bf16"."""

DEFAULT_FORMATS = (
    *("int8", "int6-g64", "int5-g64", "int4-g128", "int4-g64", "int4-g32"),
    *("int3-g128", "int3-g64", "int3-g32", "int2-g64", "int2-g32"),
)
"""What a plan chooses from unless told otherwise, beside each weight's own float type."""


def format_named(name: str) -> Format:
    """The row called `name`; a name without its group size means groups of 64 (int1 has only fp16 zeros).

    Raises UnknownFormat with the nearest names.
    """
    for full in (name, f"{name}-g64", f"{name}-g64-z16"):
        if full in FORMATS:
            return FORMATS[full]
    near = difflib.get_close_matches(name, FORMATS, n=3, cutoff=0.4) or list(FORMATS)
    raise UnknownFormat(f"unknown format {name!r}: did you mean {', '.join(near)}? `bitplan formats` lists them all")


def stored_bytes(format: str, native: str, rows: int, columns: int) -> int:
    """Bytes of a weight [rows, columns] in a format; in `native`, the checkpoint's own, the
    tensor is left as it is. Raises UnknownFormat."""
    row = format_named(format)
    return int(rows * columns * row.bits / 8) if row.name == native else row.nbytes(rows, columns)
