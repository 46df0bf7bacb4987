"""The table of formats. May import: formats.base, formats.bnb, formats.double_quant, formats.errors, formats.floats,
formats.integers."""

import difflib

import torch

from bitplan.formats.base import Format
from bitplan.formats.bnb import Bnb4Format, Int8BnbFormat
from bitplan.formats.double_quant import DoubleQuantFormat
from bitplan.formats.errors import UnknownFormat
from bitplan.formats.floats import Float8Format, FloatFormat
from bitplan.formats.integers import IntegerFormat

GROUPS = (128, 64, 32)
ROWS: list[Format] = [
    FloatFormat("fp32", 32, torch.float32),
    FloatFormat("bf16", 16, torch.bfloat16),
    FloatFormat("fp16", 16, torch.float16),
    Float8Format("fp8", 8),
    IntegerFormat("int8", 8, group=0, zero_point="symmetric", default_rounding="nearest"),
    Int8BnbFormat("int8-bnb", 8),
    Bnb4Format("nf4", 4),
    Bnb4Format("fp4", 4),
    *(
        IntegerFormat(f"int{bits}-{f'g{group}' if group else 'row'}", bits, group=group)
        for bits in (8, 7, 6, 5, 4, 3, 2)
        for group in (0, *GROUPS)
    ),
    *(DoubleQuantFormat(f"int{bits}-g32-s4", bits, group=32) for bits in (4, 3, 2)),
    *(
        IntegerFormat(f"int{bits}-g{group}-z16", bits, group=group, zero_point="float_zero")
        for bits in (4, 3, 2, 1)
        for group in GROUPS
    ),
    *(IntegerFormat(f"ternary-g{group}", 1.6, group=group, zero_point="mid_rise", ternary=True) for group in GROUPS),
    *(IntegerFormat(f"binary-g{group}", 1, group=group, zero_point="mid_rise") for group in GROUPS),
]
FORMATS: dict[str, Format] = {row.name: row for row in ROWS}
NATIVE = {row.dtype: row.name for row in ROWS if isinstance(row, FloatFormat)}
"""The format of a checkpoint's own float dtype: torch.bfloat16 → "bf16"."""
DTYPES = {str(dtype).removeprefix("torch."): name for dtype, name in NATIVE.items()}
"""The same by the dtype's name as config files have it: "bfloat16" → "bf16"."""

DEFAULT_FORMATS = (
    *("int8", "int7-g64", "int6-g64", "int5-g64", "int4-g128", "int4-g64", "int4-g32-s4", "int4-g32"),
    *("int3-g128", "int3-g64", "int3-g32-s4", "int3-g32", "int2-g64", "int2-g32-s4", "int2-g32"),
)
"""The candidate formats of a plan by default, in addition to each weight's own float dtype."""


def format_named(name: str) -> Format:
    """The format called `name`; a name without a group size means groups of 64 (`int1` means `int1-g64-z16`).

    Raises UnknownFormat, which suggests similar names.
    """
    for full in (name, f"{name}-g64", f"{name}-g64-z16"):
        if full in FORMATS:
            return FORMATS[full]
    near = difflib.get_close_matches(name, FORMATS, n=3, cutoff=0.4) or list(FORMATS)
    raise UnknownFormat(f"unknown format {name!r}: did you mean {', '.join(near)}? `bitplan formats` lists them all")


def stored_bytes(format: str, native: str, rows: int, columns: int) -> int:
    """Bytes of a weight [rows, columns] in a format. In `native`, the checkpoint's own format, the tensor is not
    converted. Raises UnknownFormat."""
    row = format_named(format)
    return int(rows * columns * row.bits / 8) if row.name == native else row.nbytes(rows, columns)
