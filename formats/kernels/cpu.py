"""CPU kernels for packed integer, ternary, int8-bnb and fp8 weights, compiled by numba.

For a few rows of input (decoding), each row of the weight is dequantized in the processor's cache and multiplied there.
For more (prefill), a tile of rows is dequantized and torch multiplies it. numba is imported when a weight is first
multiplied. May import: formats.base, formats.bnb, formats.double_quant, formats.floats, formats.integers,
formats.packed, formats.kernels.cpu_programs.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitplan.formats.base import Format, Tensors
from bitplan.formats.bnb import Int8BnbFormat
from bitplan.formats.double_quant import DoubleQuantFormat
from bitplan.formats.floats import Float8Format
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.packed import TRITS

FEW = 8
"""Rows of input up to which multiplying each row while dequantizing it is faster than a tile and torch's product.
(Measured on an AMD EPYC, Zen 4: about 12 in float32, fewer in bfloat16.)"""
SAME_GROUP = 4
"""Consecutive ternary codes that always share a scale: divides 20 and all group sizes."""
ONE_THREAD = 1 << 20
"""Number of weights up to which one thread is faster than several."""


WITHOUT_NUMBA = "numba is not installed: pip install 'bitplan[cpu]'"


def _quick_halves() -> set[torch.dtype]:
    """The 16-bit dtypes that torch multiplies faster than float32: those for which oneDNN has native support on this
    CPU. (Without it, the EPYC takes 3.6 times as long in float16.)"""
    if not torch.backends.mkldnn.is_available():
        return set()
    checks = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return {dtype for dtype, supported in checks.items() if supported()}


QUICK_HALVES = _quick_halves()


def unsupported(format: Format, columns: int) -> str | None:
    """The reason why this kernel does not support a weight with `columns` columns, or None if it does."""
    if find_spec("numba") is None:
        return WITHOUT_NUMBA
    if not isinstance(format, IntegerFormat | Float8Format | Int8BnbFormat):
        return "no CPU kernel supports it"
    period = _period(*_fields(format, columns)[:2])
    if columns % period and period != TRITS:  # whose rows are padded to whole words
        return f"{columns} columns do not fill whole runs of {period} codes"
    return None


@cache
def say_slow() -> None:
    """One line, once a process."""
    print(f"products with packed weights take some ten times longer on this CPU, for {WITHOUT_NUMBA}", file=sys.stderr)


def _fields(format: Format, columns: int) -> tuple[str, int, int]:
    """How a format's codes are decoded, their bits, and the number of columns that share a scale."""
    if isinstance(format, DoubleQuantFormat):
        return "double", format.code_bits, format.group
    if isinstance(format, IntegerFormat):
        return "ternary" if format.ternary else format.zero_point, format.code_bits, format.group or columns
    return "fp8" if isinstance(format, Float8Format) else "signed", 8, columns


def linear(format: Format, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
    """x [..., columns] @ weight.T + bias [rows]: [..., rows] in x's dtype, without gradients; `tensors` as stored.

    A few rows of x are multiplied in float32. More are multiplied in x's dtype if torch is faster in it than in float32
    (QUICK_HALVES), with the weight rounded to that dtype.
    """
    fields, rows, count = _fields(format, columns), tensors[""].shape[0], x.numel() // columns
    halves = x.dtype in QUICK_HALVES
    if count > FEW:
        dtype = x.dtype if halves else torch.float32
        inner = in_planes(x.to(dtype), _period(*fields[:2]))
        out = format.by_tiles(
            inner, tensors, columns, bias, lambda part: _cpu_dequantized(*_stored(part), columns, *fields).to(dtype)
        )
        return out.to(x.dtype)
    out = _cpu_product(x.float().reshape(count, columns), *_stored(tensors), *fields)
    return (out if bias is None else out + bias).to(x.dtype).view(*x.shape[:-1], rows)


def in_planes(x: Tensor, period: int) -> Tensor:
    """Permute x [..., columns] so that the values for code k of every run are adjacent: [..., period * runs]. An
    incomplete last run is filled with zeros."""
    if period == 1:
        return x
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % period)) if x.shape[-1] % period else x
    return x.unflatten(-1, (-1, period)).transpose(-1, -2).flatten(-2)


def _stored(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    return tensors[""], tensors["_scale"], tensors.get("_zero", tensors.get("_group"))


def _period(kind: str, bits: int) -> int:
    """The number of codes after which their bit positions inside words repeat."""
    return TRITS if kind == "ternary" else 1 if bits == 8 else 32 // gcd(bits, 32)


@cache
def _groups(kind: str, bits: int, columns: int, group: int) -> Any:
    """The group of each part of a row: uint32 [parts of a run, runs], a part being codes that always share a group."""
    period = _period(kind, bits)
    part = SAME_GROUP if kind == "ternary" else period
    starts = np.arange(0, period, part)[:, None] + np.arange(0, columns, period)
    return (np.minimum(starts, columns - 1) // group).astype(np.uint32)


@cache
def _programs(kind: str, bits: int) -> tuple[Callable, Callable]:
    from bitplan.formats.kernels import cpu_programs

    return cpu_programs.programs(kind, bits, _period(kind, bits))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitplan")


def _by_rows(rows: int, columns: int, work: Callable[[slice], Any]) -> None:
    """Call `work` on slices of the rows, in as many threads as torch uses."""
    threads = torch.get_num_threads() if rows * columns > ONE_THREAD else 1
    if threads == 1:
        work(slice(0, rows))
        return
    step = -(-rows // threads)
    list(_pool(threads).map(work, [slice(i, min(i + step, rows)) for i in range(0, rows, step)]))


# Registered as torch ops, so that torch.compile and meta tensors treat them as opaque.


@torch.library.custom_op("bitplan::cpu_product", mutates_args=(), device_types="cpu")
def _cpu_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, kind: str, bits: int, group: int
) -> Tensor:
    """x float32 [M, columns] @ weight.T: float32 [M, rows]."""
    period, columns = _period(kind, bits), x.shape[1]
    words, scales, zeros = _arrays(codes, scale, zero, kind, bits)
    parts, (_, product) = _groups(kind, bits, columns, group), _programs(kind, bits)
    sums = torch.nn.functional.pad(x, (0, -columns % group)).unflatten(-1, (-1, group)).sum(-1).numpy()
    planes = in_planes(x, period).contiguous().view(len(x), period, parts.shape[1]).numpy()
    out = torch.empty(len(x), len(words))
    made = out.numpy()

    def work(at: slice) -> None:
        zero = zeros[at] if zeros.ndim == 2 else zeros
        product(words[at], scales[at], zero, at.start, planes, sums, made[:, at], group, parts)

    _by_rows(len(words), columns, work)
    return out


@_cpu_product.register_fake
def _(x, codes, scale, zero, kind, bits, group):
    return x.new_empty(len(x), len(codes))


@torch.library.custom_op("bitplan::cpu_dequantized", mutates_args=(), device_types="cpu")
def _cpu_dequantized(
    codes: Tensor, scale: Tensor, zero: Tensor | None, columns: int, kind: str, bits: int, group: int
) -> Tensor:
    """The weight as by its format's `dequantize`, in float32, with its columns in the order of `in_planes`."""
    words, scales, zeros = _arrays(codes, scale, zero, kind, bits)
    parts, (dequantize, _) = _groups(kind, bits, columns, group), _programs(kind, bits)
    out = torch.empty(len(words), _period(kind, bits), parts.shape[1])
    made = out.numpy()

    def work(at: slice) -> None:
        zero = zeros[at] if zeros.ndim == 2 else zeros
        dequantize(words[at], scales[at], zero, at.start, made[at], group, parts)

    _by_rows(len(words), columns, work)
    return out.flatten(1)


@_cpu_dequantized.register_fake
def _(codes, scale, zero, columns, kind, bits, group):
    period = _period(kind, bits)
    return scale.new_empty(len(codes), -(-columns // period) * period, dtype=torch.float32)


def _arrays(codes: Tensor, scale: Tensor, zero: Tensor | None, kind: str, bits: int) -> tuple[Any, Any, Any]:
    """The stored tensors as numpy arrays, as the programs expect them; what is 1-D is one stream of groups' codes."""
    words = codes.numpy().view(np.int8 if kind == "signed" else np.uint8 if bits == 8 else np.uint32)
    scales: Any = scale.numpy().view(np.float32 if kind == "signed" else np.uint16)
    scales = scales / np.float32(127) if kind == "signed" else scales  # as the format's own `dequantize` does
    if zero is None:
        return words, scales, scales
    return words, scales, zero.numpy().view(np.uint32 if zero.ndim == 1 else np.uint16)
