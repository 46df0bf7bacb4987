"""Packed integer weights multiplied on a CPU, straight from their words, in code that numba compiles.

A few rows of input (decoding) are multiplied as the codes are unpacked, in registers; for more of them (prefill) the
weight is dequantized a tile at a time. numba is imported when a weight is first run. May import: formats.base/integers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.base import Tensors
from formats.integers import IntegerFormat

FEW = 4
"""Rows of input up to which unpacking in registers is quicker than a dequantized tile and a BLAS product."""
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""The value of every fp16, by its bits."""
ALONE = 1 << 20
"""Weights below which one thread is quicker than several."""


def unsupported(format: IntegerFormat, columns: int) -> str | None:
    """Why this kernel cannot take a weight of so many columns, or None."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'bitplan[cpu]'"
    if format.ternary:
        return "its codes are no bit fields"
    if columns % _period(format.code_bits):
        return f"{columns} columns do not fill whole runs of {_period(format.code_bits)} codes"
    return None


def _period(bits: int) -> int:
    """Codes after which the positions inside words repeat; at least 16, so that a vector register is filled."""
    return 1 if bits == 8 else max(16, 32 // gcd(bits, 32))


def _code(k: int, bits: int) -> str:
    """Source of code k of a run whose words are w0, w1, …"""
    word, shift = divmod(k * bits, 32)
    code = f"(w{word} >> np.uint32({shift}))"
    if shift + bits > 32:
        code = f"({code} | (w{word + 1} << np.uint32({32 - shift})))"
    return f"np.float32(np.int32({code} & np.uint32({(1 << bits) - 1})))"


def _compiled(source: str, fastmath: bool) -> Callable:
    import numba

    space: dict[str, Any] = {"np": np, "halves": HALVES}
    exec(source, space)
    return numba.njit(nogil=True, fastmath=fastmath)(space["kernel"])


def _zero(bits: int, zero_point: str) -> list[str]:
    """Source that sets z, the zero of row n, group g: `zero` holds all rows' codes as one stream of words, or the bits
    of an fp16 value for each; or nothing is stored."""
    top = (1 << bits) - 1
    if zero_point == "integer":
        return [
            f"bit = ((first + n) * scale.shape[1] + g) * {bits}",
            "code = zero[bit >> 5] >> np.uint32(bit & 31)",
            f"if (bit & 31) + {bits} > 32:",
            "    code |= zero[(bit >> 5) + 1] << np.uint32(32 - (bit & 31))",
            f"z = np.float32(np.int32(code & np.uint32({top})))",
        ]
    if zero_point == "float":
        return ["z = halves[zero[first + n, g]]"]
    return [f"z = np.float32({top / 2 if zero_point == 'half' else top // 2 + 1})"]


@cache
def _product(bits: int, zero_point: str) -> Callable:
    """kernel(words, scale, zero, first, x, sums, out, per): out[m, n] = Σ_g s (Σ_k∈g code x[m, k] - z sums[m, g]), s
    and z those of row n and group g, `per` runs to a group. uint32 words [N, W] (uint8 codes [N, K] for 8 bits) and
    scale, fp16 bits [N, G], begin at row `first`; zero, of all rows, at the first. x float32 [M, period, runs] has code
    k of every run beside each other; sums [M, G] are x's."""
    period = _period(bits)
    width = period * bits // 32
    if bits == 8:
        runs = []
        group = ["codes = row[g * per : (g + 1) * per]", "values = planes[0, g * per : (g + 1) * per]"]
        group += ["for p in range(codes.shape[0]):", "    inside += np.float32(codes[p]) * values[p]"]
    else:
        runs = [
            "for p in range(x.shape[2]):",
            *(f"    w{i} = row[p * {width} + {i}]" for i in range(width)),
            "    acc = np.float32(0)",
            *(f"    acc += {_code(k, bits)} * planes[{k}, p]" for k in range(period)),
            "    part[p] = acc",
        ]
        group = ["for value in part[g * per : (g + 1) * per]:", "    inside += value"]
    lines = [
        "def kernel(words, scale, zero, first, x, sums, out, per):",
        "    part = np.empty(x.shape[2], np.float32)",
        "    for n in range(words.shape[0]):",
        "        row = words[n]",
        "        for m in range(x.shape[0]):",
        "            planes = x[m]",
        *(f"            {line}" for line in runs),
        "            total = np.float32(0)",
        "            for g in range(scale.shape[1]):",
        "                inside = np.float32(0)",
        *(f"                {line}" for line in group),
        *(f"                {line}" for line in _zero(bits, zero_point)),
        "                total += halves[scale[n, g]] * (inside - z * sums[m, g])",
        "            out[m, n] = total",
    ]
    return _compiled("\n".join(lines), fastmath=True)


@cache
def _dequantizer(bits: int, zero_point: str) -> Callable:
    """kernel(words, scale, zero, first, out, group): out[n, k] = (code - z) s, rounded as `dequantize` does; the rest
    as `_product` has it, but that `words` are bytes where codes do not straddle them."""
    period, width = (8 // bits, 1) if 8 % bits == 0 else (_period(bits), _period(bits) * bits // 32)
    if 8 % bits == 0:
        codes = [f"np.float32((w0 >> np.uint8({k * bits})) & np.uint8({(1 << bits) - 1}))" for k in range(period)]
    else:
        codes = [_code(k, bits) for k in range(period)]
    lines = [
        "def kernel(words, scale, zero, first, out, group):",
        f"    width = group // {period} * {width}",
        "    for n in range(words.shape[0]):",
        "        for g in range(scale.shape[1]):",
        "            o = out[n, g * group : (g + 1) * group]",
        "            w = words[n, g * width : (g + 1) * width]",
        "            s = halves[scale[n, g]]",
        *(f"            {line}" for line in _zero(bits, zero_point)),
        f"            for p in range(o.shape[0] // {period}):",
        *(f"                w{i} = w[p * {width} + {i}]" for i in range(width)),
        *(f"                o[p * {period} + {k}] = ({code} - z) * s" for k, code in enumerate(codes)),
    ]
    return _compiled("\n".join(lines), fastmath=False)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitplan")


def _by_rows(rows: int, columns: int, work: Callable[[slice], Any]) -> None:
    """Call `work` on slices of the rows, on as many threads as torch uses."""
    threads = torch.get_num_threads() if rows * columns > ALONE else 1
    if threads == 1:
        work(slice(0, rows))
        return
    step = -(-rows // threads)
    list(_pool(threads).map(work, [slice(i, min(i + step, rows)) for i in range(0, rows, step)]))


# Ops of torch's own, so that torch.compile and meta tensors go round them.


@torch.library.custom_op("bitplan::cpu_product", mutates_args=(), device_types="cpu")
def _cpu_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, zero_point: str
) -> Tensor:
    period, columns = _period(bits), x.shape[1]
    words, scales, zeros = _arrays(codes, scale, zero, np.uint8 if bits == 8 else np.uint32)
    sums = torch.nn.functional.pad(x, (0, -columns % group)).unflatten(-1, (-1, group)).sum(-1).numpy()
    planes = x.unflatten(-1, (-1, period)).transpose(-1, -2).contiguous().numpy()
    out = torch.empty(len(x), len(words))
    made, kernel = out.numpy(), _product(bits, zero_point)

    def work(at: slice) -> None:
        kernel(words[at], scales[at], zeros, at.start, planes, sums, made[:, at], group // period)

    _by_rows(len(words), columns, work)
    return out


@_cpu_product.register_fake
def _(x, codes, scale, zero, bits, group, zero_point):
    return x.new_empty(len(x), len(codes))


@torch.library.custom_op("bitplan::cpu_dequantized", mutates_args=(), device_types="cpu")
def _cpu_dequantized(
    codes: Tensor, scale: Tensor, zero: Tensor | None, columns: int, bits: int, group: int, zero_point: str
) -> Tensor:
    words, scales, zeros = _arrays(codes, scale, zero, np.uint8 if 8 % bits == 0 else np.uint32)
    out = torch.empty(len(words), columns)
    made, kernel = out.numpy(), _dequantizer(bits, zero_point)
    _by_rows(len(words), columns, lambda at: kernel(words[at], scales[at], zeros, at.start, made[at], group))
    return out


@_cpu_dequantized.register_fake
def _(codes, scale, zero, columns, bits, group, zero_point):
    return scale.new_empty(len(codes), columns, dtype=torch.float32)


def _arrays(codes: Tensor, scale: Tensor, zero: Tensor | None, kind: Any) -> tuple[Any, Any, Any]:
    """What is stored, as the kernels take it."""
    scales = scale.numpy().view(np.uint16)
    if zero is None:
        return codes.numpy().view(kind), scales, scales
    return codes.numpy().view(kind), scales, zero.numpy().view(np.uint32 if zero.ndim == 1 else np.uint16)


def product(format: IntegerFormat, x: Tensor, tensors: Tensors) -> Tensor:
    """x float32 [M, columns] times the weight's transpose: float32 [M, rows], by unpacking in registers."""
    stored = (tensors[""], tensors["_scale"], tensors.get("_zero"))
    return _cpu_product(x, *stored, format.code_bits, format.group or x.shape[1], format.zero_point)


def dequantized(format: IntegerFormat, tensors: Tensors, columns: int) -> Tensor:
    """The weight as `format.dequantize` gives it, float32 [rows, columns]."""
    stored = (tensors[""], tensors["_scale"], tensors.get("_zero"))
    return _cpu_dequantized(*stored, columns, format.code_bits, format.group or columns, format.zero_point)
