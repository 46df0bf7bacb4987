"""Unpacking, dequantization and products of rows of packed weights on a CPU, compiled by numba.

A row [columns] is dequantized into planes [period, runs]: a run is `period` codes, after which their bit positions
inside words repeat, and plane k holds code k of every run. All words of one plane are shifted by the same amount, so
that a loop over them compiles to vector instructions; in the row's own order it does not. Inputs have the same layout.
Imported only if numba is installed. May import: formats.double_quant, formats.packed, numba.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from bitplan.formats.double_quant import GROUP_BITS, LEVELS, ZEROS
from bitplan.formats.packed import TRITS

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""The value of every fp16, by its bits."""

compiled = numba.njit(nogil=True)
summed = numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
"""Allows sums in any order."""
inlined = numba.njit(nogil=True, inline="always")
"""For functions whose call overhead (with the reference counting of arrays) is a third of a row's product."""


def _grid(kind: str, bits: int) -> Callable:
    """grid(scale, zero, n, first, s, z) sets float32 s and z [G] to the scales and zero points of row n.

    scale: fp16 bits [N, G] ([N, 1] for kind "double"), or float32 for kind "signed". zero: fp16 bits [N, G] for kind
    "float_zero"; for "asymmetric" the zero points of all rows of the weight, as one stream of words in which row 0 here
    is row `first`; for "double" such a stream of the groups' codes; unused for other kinds."""
    top = (1 << bits) - 1
    fixed = np.float32({"symmetric": top // 2 + 1, "mid_rise": top / 2, "ternary": 1}.get(kind, 0))
    # Constants at compile time, so that numba drops branches that do not match the arrays' dtypes.
    is_float32, floats, codes, double = (kind == k for k in ("signed", "float_zero", "asymmetric", "double"))
    width = np.uint64(GROUP_BITS if double else bits)
    lowest, step = np.float32((1 << (bits - 1)) - ZEROS // 2), np.float32(1 / LEVELS)

    @(compiled if bits == 8 else inlined)
    def grid(scale, zero, n, first, s, z):
        if not double:
            for g in range(len(s)):
                s[g] = scale[n, g] if is_float32 else HALVES[scale[n, g]]
                z[g] = HALVES[zero[n, g]] if floats else fixed
        if codes or double:
            for g in range(len(s)):
                bit = np.uint64((first + n) * len(s) + g) * width
                word, shift = bit >> np.uint64(5), bit & np.uint64(31)
                code = np.uint64(zero[word]) >> shift
                if shift + width > np.uint64(32):
                    code |= np.uint64(zero[word + np.uint64(1)]) << (np.uint64(32) - shift)
                if double:
                    s[g] = HALVES[scale[n, 0]] * (np.float32(code & np.uint64(LEVELS - 1)) + np.float32(1)) * step
                    z[g] = np.float32((code >> np.uint64(4)) & np.uint64(ZEROS - 1)) + lowest
                else:
                    z[g] = np.float32(code & np.uint64(top))

    return grid


# Each of the next three returns two functions of a packed row (its words or bytes):
# values(row, s, z, group, parts, grids, words, made) sets float32 made [period, runs] to (code - z) s.
# alone(row, s, z, group, parts, grids, words, made, x, sums) returns the product of the row and x [period, runs], whose
# sums over groups are `sums`: Σ_g s (Σ_k∈g code x - z sum), without dequantizing where that is faster for one input.
# parts: the groups of a run's parts, from `cpu._groups`. grids, float32 [2, *parts.shape], and words, uint32
# [width, runs], are scratch space; in `alone`, `made` is too.


def _bytes(kind: str) -> tuple[Callable, Callable]:
    is_float = kind == "fp8"

    @compiled
    def value(code):
        if not is_float:
            return np.float32(code)
        # e4m3's exponent and mantissa moved to those of a float32, whose exponent has the bias 127 instead of 7.
        # Subnormals, below 2^-6, have no leading 1 and steps of 2^-9. The bytes 127 and 255 are NaN: never stored.
        size = np.uint32(code) & np.uint32(127)
        base = np.uint32(120 << 23) if size >= np.uint32(8) else np.uint32(121 << 23)
        one = np.float32(0) if size >= np.uint32(8) else np.float32(2.0**-6)
        made = np.uint32((size << np.uint32(20)) + base).view(np.float32) - one
        sign = np.uint32(code) >> np.uint32(7) << np.uint32(31)
        return np.uint32(np.float32(made).view(np.uint32) | sign).view(np.float32)

    @compiled
    def values(row, s, z, group, parts, grids, words, made):
        for g in range(len(s)):
            codes, out, scale, zero = row[g * group : (g + 1) * group], made[0, g * group : (g + 1) * group], s[g], z[g]
            for i in range(len(out)):
                out[i] = (value(codes[i]) - zero) * scale

    @summed
    def alone(row, s, z, group, parts, grids, words, made, x, sums):
        total = np.float32(0)
        for g in range(len(s)):
            codes, inputs, inside = row[g * group : (g + 1) * group], x[0, g * group : (g + 1) * group], np.float32(0)
            for i in range(len(inputs)):
                inside += value(codes[i]) * inputs[i]
            total += s[g] * (inside - z[g] * sums[g])
        return total

    return values, alone


def _code(k: int, bits: int) -> str:
    """Source code that extracts code k of a run whose words are w0, w1, …"""
    word, shift = divmod(k * bits, 32)
    code = f"(w{word} >> np.uint32({shift}))"
    if shift + bits > 32:
        code = f"({code} | (w{word + 1} << np.uint32({32 - shift})))"
    return f"np.float32(np.int32({code} & np.uint32({(1 << bits) - 1})))"


def _runs(bits: int, period: int) -> Callable:
    """runs(row, x, sums) sets float32 sums [runs] to Σ_k code x of each run, with the codes unpacked in registers. The
    source is generated, because compilers do not unroll loops over this many codes."""
    width = period * bits // 32
    lines = [
        "def runs(row, x, sums):",
        "    for p in range(x.shape[1]):",
        *(f"        w{i} = row[p * {width} + {i}]" for i in range(width)),
        "        total = np.float32(0)",
        *(f"        total += {_code(k, bits)} * x[{k}, p]" for k in range(period)),
        "        sums[p] = total",
    ]
    space: dict[str, Any] = {"np": np}
    exec("\n".join(lines), space)
    return summed(space["runs"])


def _fields(bits: int, period: int) -> tuple[Callable, Callable]:
    width, mask, runs = period * bits // 32, np.uint32((1 << bits) - 1), _runs(bits, period)

    @compiled
    def values(row, s, z, group, parts, grids, words, made):
        count = made.shape[1]
        part, scale, zero = parts[0], grids[0, 0], grids[1, 0]
        for p in range(count):
            scale[p], zero[p] = s[part[p]], z[part[p]]
        if width > 1:
            for p in range(count):
                for i in range(width):
                    words[i, p] = row[p * width + i]
        for k in range(period):
            out, low = made[k], words[k * bits // 32] if width > 1 else row
            high = words[min(k * bits // 32 + 1, width - 1)]
            shift = np.uint32(k * bits % 32)
            if k * bits % 32 + bits <= 32:
                for p in range(count):
                    code = np.uint32(low[p] >> shift) & mask
                    out[p] = (np.float32(np.int32(code)) - zero[p]) * scale[p]
            else:
                for p in range(count):
                    code = np.uint32(np.uint32(low[p] >> shift) | np.uint32(high[p] << (np.uint32(32) - shift))) & mask
                    out[p] = (np.float32(np.int32(code)) - zero[p]) * scale[p]

    @inlined
    def alone(row, s, z, group, parts, grids, words, made, x, sums):
        inner, per, total = made[0], group // period, np.float32(0)
        runs(row, x, inner)
        for g in range(len(s)):
            inside = np.float32(0)
            for value in inner[g * per : (g + 1) * per]:
                inside += value
            total += s[g] * (inside - z[g] * sums[g])
        return total

    return values, alone


@summed
def _dot(weight, x):
    total = np.float32(0)
    for i in range(len(weight)):
        total += weight[i] * x[i]
    return total


def _trits() -> tuple[Callable, Callable]:
    @compiled
    def values(row, s, z, group, parts, grids, words, made):
        # A word w < 3^20 is converted to the fraction w / 3^20 in multiples of 2^-32, rounded up. That adds less than
        # 3^-20, so its first 20 digits in base 3 are those of w. Multiplied by 3^(19 - k), its integer part dropped (by
        # overflow of 32 bits) and multiplied by 3 once more, its integer part is digit k.
        scales, fractions, runs = grids[0], words[0], made.shape[1]
        for j in range(len(parts)):
            part, scale = parts[j], scales[j]
            for p in range(runs):
                scale[p] = s[part[p]]
        for p in range(runs):
            fractions[p] = (np.uint64(row[p]) << np.uint64(32)) // np.uint64(3**TRITS) + np.uint64(1)
        power = np.uint32(1)
        for k in range(TRITS - 1, -1, -1):
            out, scale = made[k], scales[k * len(parts) // TRITS]
            for p in range(runs):
                left = np.uint64(np.uint32(fractions[p] * power))
                out[p] = (np.float32(np.int32((left * np.uint64(3)) >> np.uint64(32))) - np.float32(1)) * scale[p]
            power = np.uint32(power * np.uint32(3))

    @inlined
    def alone(row, s, z, group, parts, grids, words, made, x, sums):
        values(row, s, z, group, parts, grids, words, made)
        return _dot(made.reshape(-1), x.reshape(-1))

    return values, alone


@summed
def _dots(weight, x):
    """`_dot` with four rows of inputs at once, reading the weight once."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    a = b = c = d = np.float32(0)
    for i in range(len(weight)):
        a += weight[i] * x0[i]
        b += weight[i] * x1[i]
        c += weight[i] * x2[i]
        d += weight[i] * x3[i]
    return a, b, c, d


@cache
def programs(kind: str, bits: int, period: int) -> tuple[Callable, Callable]:
    """Two functions of codes [N, W] (uint32 words, or bytes for 8-bit codes):

    dequantize(codes, scale, zero, first, out, group, parts) sets float32 out [N, period, runs] to the values.
    product(codes, scale, zero, first, x, sums, out, group, parts) sets float32 out [M, N] to the product with
    x [M, period, runs], whose sums over groups are `sums` [M, G].
    """
    grid = _grid(kind, bits)
    trits = kind == "ternary"
    width = 1 if trits else period * bits // 32
    values, alone = _bytes(kind) if bits == 8 else _trits() if trits else _fields(bits, period)

    @compiled
    def dequantize(codes, scale, zero, first, out, group, parts):
        count = np.int64(parts[-1, -1]) + 1
        s, z = np.empty(count, np.float32), np.empty(count, np.float32)
        grids, words = np.empty((2, *parts.shape), np.float32), np.empty((width, out.shape[2]), np.uint32)
        for n in range(len(codes)):
            grid(scale, zero, n, first, s, z)
            values(codes[n], s, z, group, parts, grids, words, out[n])

    @compiled
    def product(codes, scale, zero, first, x, sums, out, group, parts):
        count = np.int64(parts[-1, -1]) + 1
        s, z = np.empty(count, np.float32), np.empty(count, np.float32)
        grids, words = np.empty((2, *parts.shape), np.float32), np.empty((width, x.shape[2]), np.uint32)
        made = np.empty(x.shape[1:], np.float32)
        weight, inputs = made.reshape(-1), x.reshape((len(x), -1))
        together = len(x) // 4 * 4
        for n in range(len(codes)):
            grid(scale, zero, n, first, s, z)
            if together > 0:
                values(codes[n], s, z, group, parts, grids, words, made)
            for m in range(0, together, 4):
                out[m, n], out[m + 1, n], out[m + 2, n], out[m + 3, n] = _dots(weight, inputs[m : m + 4])
            for m in range(together, len(x)):
                if together > 0:
                    out[m, n] = _dot(weight, inputs[m])
                else:
                    out[m, n] = alone(codes[n], s, z, group, parts, grids, words, made, x[m], sums[m])

    return dequantize, product
