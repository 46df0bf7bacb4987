"""The choice of the kernel that multiplies a packed weight, with its reason; and the product itself.

The choice depends only on the format, the number of columns, the dtype and the machine. So `bitplan show` can report it
for a machine that is not present, and memory can be estimated on meta tensors (`as_if_on`).
May import: formats.base, formats.bnb, formats.errors, formats.floats, formats.kernels.cpu, formats.kernels.cuda.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitplan.formats.base import LARGE_TILE, TILE, Format, Tensors, needs_grad
from bitplan.formats.bnb import Bnb4Format, Int8BnbFormat
from bitplan.formats.errors import UsageError
from bitplan.formats.floats import FP8, Float8Format, FloatFormat
from bitplan.formats.kernels import cpu as cpu_kernel
from bitplan.formats.kernels import cuda as cuda_kernel

FP8_ROWS = 16
"""Rows of input above which fp8 weights are multiplied by fp8 inputs, if the GPU supports it."""


@dataclass(frozen=True)
class Machine:
    """A device type, `cpu` or `cuda`, with the compute capability of a CUDA device."""

    kind: str
    capability: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return (
            self.kind
            if self.kind == "cpu"
            else f"{self.kind} (compute capability {'.'.join(map(str, self.capability))})"
        )


@dataclass(frozen=True)
class Kernel:
    """A kernel's name and the reason for choosing it."""

    name: str
    why: str


@cache
def machine(device: str) -> Machine:
    """The machine of a device of this process."""
    kind = torch.device(device).type
    return Machine(kind, torch.cuda.get_device_capability(device) if kind == "cuda" else (0, 0))


def named_machine(name: str) -> Machine:
    """The machine called `name`: cpu, cuda, cuda:N (a device of this machine) or cuda:M.m (a compute capability).
    Without a CUDA device, cuda means compute capability 9.0. Raises UsageError."""
    found = re.fullmatch(r"cpu|cuda(?::(\d+)(?:\.(\d+))?)?", name)
    if not found:
        raise UsageError(f"unknown device {name!r}: cpu, cuda, cuda:0, or cuda:8.0 for a compute capability")
    major, minor = found.groups()
    if minor is not None:
        return Machine("cuda", (int(major), int(minor)))
    if name == "cuda" and not torch.cuda.is_available():
        return Machine("cuda", (9, 0))
    if major is not None and int(major) >= torch.cuda.device_count():
        raise UsageError(f"there is no device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return machine(name)


_ASSUMED = [Machine("cpu")]
_ASSUMING = threading.RLock()
"""Held while a machine is assumed: what is assumed holds for the whole process."""


@contextmanager
def as_if_on(assumed: Machine) -> Iterator[None]:
    """A context in which meta tensors are dispatched as tensors on `assumed` would be."""
    with _ASSUMING:
        before = _ASSUMED[0], TILE.get("meta", LARGE_TILE)
        _ASSUMED[0], TILE["meta"] = assumed, TILE.get(assumed.kind, LARGE_TILE)
        try:
            yield
        finally:
            _ASSUMED[0], TILE["meta"] = before


@cache
def choose(format: Format, columns: int, dtype: torch.dtype, on: Machine) -> Kernel:
    """The kernel for a weight with `columns` columns and inputs of `dtype` on machine `on`."""
    if isinstance(format, FloatFormat):
        return Kernel("torch", "a plain product")
    return _on_cpu(format, columns) if on.kind == "cpu" else _on_cuda(format, columns, dtype, on)


def _on_cpu(format: Format, columns: int) -> Kernel:
    if isinstance(format, Bnb4Format):
        return Kernel("bitsandbytes", "its dequantizer, a tile at a time")
    if reason := cpu_kernel.unsupported(format, columns):
        return Kernel("dequantize", reason)
    return Kernel("numba", "codes unpacked in cache, a row or a tile at a time")


def _on_cuda(format: Format, columns: int, dtype: torch.dtype, on: Machine) -> Kernel:
    if isinstance(format, Bnb4Format):
        return Kernel("bitsandbytes", "its own format")
    if isinstance(format, Int8BnbFormat):
        return Kernel("bitsandbytes", "its own format; inputs are rounded to int8 too")
    if reason := cuda_kernel.unsupported(format, columns, dtype, on.capability):
        return Kernel("dequantize", reason)
    if isinstance(format, Float8Format) and on.capability >= (8, 9) and columns % 16 == 0:
        return Kernel("scaled_mm", f"fp8 units; up to {FP8_ROWS} rows of input by triton, with unrounded inputs")
    return Kernel("triton", "codes unpacked in registers")


def linear(format: Format, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
    """x [..., columns] @ weight.T + bias [rows]: [..., rows] in x's dtype, computed by the chosen kernel. If gradients
    are required, the weight is dequantized instead."""
    on, kernel = _chosen(format, columns, x.dtype, x.device)
    trained = needs_grad(x, tensors) or any(tensors[suffix].is_floating_point() for suffix in format.floats)
    if trained or kernel in ("torch", "dequantize") or (kernel, on.kind) == ("bitsandbytes", "cpu"):
        return format.linear(x, tensors, columns, bias)
    if kernel == "numba":
        return cpu_kernel.linear(format, x, tensors, columns, bias)
    if isinstance(format, Bnb4Format | Int8BnbFormat):
        return format.multiply(x, tensors, columns, bias)
    few, rows = x.numel() // columns, tensors[""].shape[0]
    if kernel == "scaled_mm" and few > FP8_ROWS and rows % 16 == 0:
        return _scaled_mm(x, tensors, bias)
    return cuda_kernel.linear(format, x, tensors, columns, bias)


@torch.compiler.assume_constant_result
def _chosen(format: Format, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Machine, str]:
    on = _ASSUMED[0] if device.type == "meta" else machine(str(device))
    kernel = choose(format, columns, dtype, on)
    if kernel.why == cpu_kernel.WITHOUT_NUMBA and device.type == "cpu":
        cpu_kernel.say_slow()
    return on, kernel.name


def _scaled_mm(x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
    """fp8 times fp8: each row of x [..., columns] is scaled to e4m3's range and rounded, as LLM.int8 does with int8."""
    flat = x.reshape(-1, x.shape[-1])
    limit = torch.finfo(FP8).max
    scale = flat.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / limit
    rounded = (flat.float() / scale).clamp(-limit, limit).to(FP8)
    one = torch.ones((), device=x.device)
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    codes = tensors[""].view(torch.uint8).view(FP8)
    product = torch._scaled_mm(rounded, codes.t(), scale_a=one, scale_b=one, out_dtype=wide)
    out = product.float() * scale * tensors["_scale"].view(torch.float16).float().t()
    return (out if bias is None else out + bias).to(x.dtype).unflatten(0, x.shape[:-1])
