"""CUDA kernels for packed integer and fp8 weights, compiled by Triton.

Products with up to four rows of input (decoding) are memory-bound: each word is loaded once, in wide loads, and
unpacked in registers. For more rows, a tile of the weight is dequantized at a time, for the tensor cores.
Triton is imported when a weight is first multiplied. May import: formats.base, formats.double_quant, formats.floats,
formats.integers, formats.kernels.cuda_programs.
"""

from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor

from bitplan.formats.base import Format, Tensors
from bitplan.formats.double_quant import DoubleQuantFormat
from bitplan.formats.floats import Float8Format
from bitplan.formats.integers import IntegerFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = (8, 0)
"""The lowest compute capability with bfloat16 and asynchronous copies to shared memory."""
FEW = 4
"""Rows of input up to which multiply-adds outside the tensor cores cost less than preparing a tile for them."""
PROGRAMS = 264
"""Program instances that occupy a GPU: two per multiprocessor of an H100 (132). For small weights the columns are split
to reach this number."""

# Maximal rows of x → (rows of x, rows of the weight, runs of 32 columns) per tile, warps, pipeline stages.
# Chosen by reasoning, not measured: small tiles while loads dominate, large ones while products do.
TILES = {
    16: (16, 64, 4, 4, 4),
    32: (32, 64, 4, 4, 4),
    64: (64, 64, 2, 4, 3),
    1 << 62: (128, 128, 2, 8, 3),
}
WIDE_TILE = (32, 64, 1, 4, 2)
"""The tile for float32 inputs, which are multiplied outside the tensor cores."""


def unsupported(format: Format, columns: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """The reason why this kernel does not support a weight with `columns` columns and inputs of `dtype` on a GPU of
    compute capability `capability`, or None if it does."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if capability < OLDEST:
        return "compute capability below {}.{}".format(*OLDEST)
    if dtype not in DTYPES:
        return f"inputs are {str(dtype).removeprefix('torch.')}"
    fits = isinstance(format, Float8Format) or (isinstance(format, IntegerFormat) and not format.ternary)
    return None if fits else "its codes are not bit fields"


def linear(format: Format, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
    """x [..., columns] @ weight.T + bias [rows]: [..., rows] in x's dtype, accumulated in float32, without gradients;
    `tensors` as stored (scales as integer bits)."""
    if isinstance(format, Float8Format):
        return _packed_linear(x, tensors[""], tensors["_scale"], None, bias, columns, 8, 0, "fp8")
    assert isinstance(format, IntegerFormat)
    zero = tensors.get("_zero", tensors.get("_group"))
    kind = "double" if isinstance(format, DoubleQuantFormat) else format.zero_point
    return _packed_linear(x, tensors[""], tensors["_scale"], zero, bias, columns, format.code_bits, format.group, kind)


@cache
def _programs() -> Any:
    from bitplan.formats.kernels import cuda_programs

    return cuda_programs


def _vector_blocks(count: int, rows: int, runs: int, bits: int) -> tuple[int, int, int]:
    """Rows of x, rows of the weight and runs per program instance. Chosen by reasoning, not measured: as many rows
    share the loaded inputs as registers allow while instances stay many; one run per thread, at most four warps."""
    block_m = 1 << (count - 1).bit_length()
    block_n = 2 if rows < 1024 else 4 if rows < 4096 or count > 1 or bits > 4 else 8
    block_r = 128
    while block_r > 32 and -(-runs // block_r) * block_r > 1.25 * -(-runs // (block_r // 2)) * (block_r // 2):
        block_r //= 2
    return block_m, block_n, block_r


def _tile(count: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """The entry of TILES for `count` rows of x."""
    return WIDE_TILE if dtype == torch.float32 else next(tile for most, tile in TILES.items() if count <= most)


# Registered as a torch op: torch.compile and CUDA graphs see one node, and meta tensors do not run it.


@torch.library.custom_op("bitplan::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    columns: int,
    bits: int,
    group: int,
    kind: str,
) -> Tensor:
    flat = x.reshape(-1, columns).contiguous()
    count, rows, runs = len(flat), len(codes), -(-columns // 32)
    out = x.new_empty(count, rows)
    if count == 0:
        return out.view(*x.shape[:-1], rows)
    vector = gcd(bits, 4, codes.shape[1])
    top = (1 << bits) - 1
    common = {
        "bits": bits,
        "kind": kind if kind in ("asymmetric", "float_zero", "fp8", "double") else "fixed",
        "fixed": {"symmetric": top // 2 + 1.0, "mid_rise": top / 2, "double": top // 2 - 1.0}.get(kind, 0.0),
        "runs": group // 32 if group else 1 << 26,  # the whole row is group 0
        "vector": vector,
        "enable_fp_fusion": True,  # products and sums as one instruction: half the arithmetic; Triton's default changes
    }
    groups = -(-columns // group) if group else 1
    sizes = (count, columns, rows, codes.shape[1] // vector, groups, 0 if zero is None else zero.numel())
    grids = (scale, scale if zero is None else zero, None if bias is None else bias.contiguous())
    with torch.cuda.device_of(x):
        if count <= FEW:
            block_m, block_n, block_r = _vector_blocks(count, rows, runs, bits)
            blocks = {"block_m": block_m, "block_n": block_n, "block_r": block_r}
            launch = _programs().vector_program[(-(-rows // block_n),)]
            launch(flat, codes, *grids, out, *sizes, **common, **blocks, num_warps=block_r // 32)
        else:
            block_m, block_n, block_r, warps, stages = _tile(count, x.dtype)
            blocks = {"block_m": block_m, "block_n": block_n, "block_r": block_r}
            grid = (-(-rows // block_n), -(-count // block_m))
            steps = -(-runs // block_r)
            parts = max(1, min(PROGRAMS // (grid[0] * grid[1]), steps // 4))
            part_runs = -(-steps // parts) * block_r
            parts = -(-runs // part_runs)
            into = out if parts == 1 else flat.new_empty(parts, count, rows, dtype=torch.float32)
            launch = _programs().tile_program[(*grid, parts)]
            launch(flat, codes, *grids, into, *sizes, part_runs, **common, **blocks, num_warps=warps, num_stages=stages)
            out = out if parts == 1 else into.sum(0).to(x.dtype)
    return out.view(*x.shape[:-1], rows)


@_packed_linear.register_fake
def _(x, codes, scale, zero, bias, columns, bits, group, kind):
    return x.new_empty(*x.shape[:-1], codes.shape[0])
