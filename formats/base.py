"""What a format is: a name, exact tensors for a shape, and the way from a weight to them and back.

Every stored tensor is of an integer type, float values included (their bits, viewed as integers). So nothing that
casts, initialises or trains floats can touch them, and a checkpoint read without bitplan fails on shapes
instead of loading as noise. May import: torch only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

TILE = {"cpu": 1 << 20}
"""Weights dequantized at a time for a product, by the kind of device: on a CPU what its cache holds."""
LARGE_TILE = 1 << 24
"""The same elsewhere, where each operation costs its launch."""

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Format(ABC):
    """One row of the table. A weight is [rows, columns]: outputs by inputs, or vocabulary by width.

    Tensors are named by a suffix to the parameter they replace: "" (the codes), "_scale", "_zero".
    """

    name: str
    bits: float
    """Bits of one code, scales not counted."""

    default_rounding = "nearest"

    @property
    def is_research(self) -> bool:
        """Below 2 bits no rounding keeps a model near full precision: outputs say so."""
        return self.bits < 2

    @property
    def floats(self) -> dict[str, torch.dtype]:
        """Stored tensors that hold the bits of floats, scales and such: suffix → the floats' type. `dequantize` and
        `take_rows` also take them as float tensors, and are differentiable in them."""
        return {}

    @abstractmethod
    def specs(self, rows: int, columns: int) -> Specs:
        """Shape and dtype of every stored tensor; the first dimension of the codes is `rows`."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> Tensors:
        """Round a float weight [rows, columns] to the nearest codes."""

    @abstractmethod
    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        """The weight [rows, columns] in `dtype`."""

    @abstractmethod
    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Rows `ids` (int64, any shape) of the weight: [*ids.shape, columns], no other row dequantized."""

    def rows_of(self, tensors: Tensors, start: int, stop: int, columns: int) -> Tensors:
        """The stored tensors of rows `start` to `stop` (views); `start` is a multiple of 32."""
        return {suffix: tensor[start:stop] for suffix, tensor in tensors.items()}

    def linear(self, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias in x's dtype: dequantize, then multiply, a tile of the rows at a time."""
        return self.by_tiles(x, tensors, columns, bias, lambda part: self.dequantize(part, columns, x.dtype))

    def by_tiles(
        self,
        x: Tensor,
        tensors: Tensors,
        columns: int,
        bias: Tensor | None,
        dequantize: Callable[[Tensors], Tensor],
    ) -> Tensor:
        """The product in x's dtype, `dequantize` giving the weights of some rows. Whole where gradients are asked for,
        which would keep every tile."""
        rows, bias = tensors[""].shape[0], None if bias is None else bias.to(x.dtype)
        step = max(TILE.get(x.device.type, LARGE_TILE) // columns // 32, 1) * 32
        if rows <= step or needs_grad(x, tensors):
            return torch.nn.functional.linear(x, dequantize(tensors), bias)
        out = x.new_empty(*x.shape[:-1], rows)
        for start in range(0, rows, step):
            at = slice(start, min(start + step, rows))
            weight = dequantize(self.rows_of(tensors, at.start, at.stop, columns))
            out[..., at] = torch.nn.functional.linear(x, weight, None if bias is None else bias[at])
        return out

    def unavailable(self) -> str | None:
        """Why this machine cannot run the format, or None."""
        return None

    def padding(self, columns: int) -> str | None:
        """What is padded where the columns do not divide, in words, or None."""
        return None

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a stored weight, scales, zeros and padding included."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.specs(rows, columns).values())

    def zeros(self, rows: int, columns: int, device: torch.device | str) -> Tensors:
        """Tensors of the right shapes and dtypes to load into."""
        return {
            suffix: torch.zeros(shape, dtype=dtype, device=device)
            for suffix, (shape, dtype) in self.specs(rows, columns).items()
        }


def needs_grad(x: Tensor, tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors.values()))


def as_floats(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_bits`; a float tensor is handed on as it is."""
    return bits if bits.is_floating_point() else bits.view(dtype)


def as_bits(values: Tensor) -> Tensor:
    """Float tensor viewed as integers of the same width."""
    return values.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
