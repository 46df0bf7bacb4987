"""The interface of a format: its name, the exact tensors that store a weight, quantization and dequantization.

Every stored tensor has an integer dtype; floats (such as scales) are stored as their bits, viewed as integers. So
nothing that casts, initialises or trains floats can change them, and a checkpoint that is loaded without bitplan fails
on shapes instead of loading as noise. May import: torch only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

TILE = {"cpu": 1 << 20}
"""Weights rounded or dequantized at a time, by device type: on a CPU, as many as its cache holds."""
LARGE_TILE = 1 << 24
"""The same for other devices, where a launch per operation makes small tiles expensive."""

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Format(ABC):
    """A storage format of 2-D weights.

    A weight has shape [rows, columns]: [out_features, in_features] of a Linear, [vocabulary, width] of an embedding.
    Its stored tensors are named by a suffix to the parameter's name: "" (the codes), "_scale", "_zero".
    """

    name: str
    bits: float
    """Bits of one code, scales not counted."""

    default_rounding = "nearest"

    @property
    def is_research(self) -> bool:
        """Whether the format has fewer than 2 bits, where no rounding preserves a model's quality. Outputs mark it."""
        return self.bits < 2

    @property
    def floats(self) -> dict[str, torch.dtype]:
        """Suffix → dtype of the stored tensors that hold the bits of floats, such as scales. `dequantize` and
        `take_rows` also accept them as float tensors, and are differentiable with respect to those."""
        return {}

    @abstractmethod
    def specs(self, rows: int, columns: int) -> Specs:
        """Suffix → (shape, dtype) of each stored tensor. The first dimension of the codes is `rows`."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> Tensors:
        """Round a float weight [rows, columns] to the nearest codes. Returns tensors as `specs` describes them."""

    def quantize_by_rows(self, weight: Tensor, device: torch.device | str) -> Tensors:
        """`quantize` on `device`, of a weight [rows, columns] of any dtype on any device, some rows at a time: it takes
        little memory beside both."""
        rows, columns = weight.shape
        tensors = self.zeros(rows, columns, device)
        filled = dict.fromkeys(tensors, 0)
        for at in _tiles(rows, columns, torch.device(device).type):
            for suffix, made in self.quantize(weight[at].to(device).float()).items():
                start = filled[suffix]
                filled[suffix] += len(made)
                tensors[suffix][start : filled[suffix]] = made
        return tensors

    @abstractmethod
    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        """The weight [rows, columns] in `dtype`, from its stored tensors."""

    def dequantize_by_rows(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        """`dequantize`, some rows at a time: it takes little memory beside the weight."""
        rows = tensors[""].shape[0]
        weight = torch.empty(rows, columns, dtype=dtype, device=tensors[""].device)
        for at in _tiles(rows, columns, weight.device.type):
            weight[at] = self.dequantize(self.rows_of(tensors, at.start, at.stop, columns), columns, dtype)
        return weight

    @abstractmethod
    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Rows `ids` (int64, any shape) of the weight in `dtype`: [*ids.shape, columns]. Other rows are not read."""

    def rows_of(self, tensors: Tensors, start: int, stop: int, columns: int) -> Tensors:
        """The stored tensors of rows `start` to `stop`, as views. `start` must be a multiple of 32."""
        return {suffix: tensor[start:stop] for suffix, tensor in tensors.items()}

    def linear(self, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
        """x [..., columns] @ weight.T + bias [rows]: [..., rows] in x's dtype, dequantized by tiles of rows."""
        return self.by_tiles(x, tensors, columns, bias, lambda part: self.dequantize(part, columns, x.dtype))

    def by_tiles(
        self,
        x: Tensor,
        tensors: Tensors,
        columns: int,
        bias: Tensor | None,
        dequantize: Callable[[Tensors], Tensor],
    ) -> Tensor:
        """`linear` with weights from `dequantize` (stored tensors of some rows → [rows, columns] in x's dtype). The
        weight is dequantized whole if gradients are required, since autograd would hold every tile anyway."""
        rows, bias = tensors[""].shape[0], None if bias is None else bias.to(x.dtype)
        tiles = _tiles(rows, columns, x.device.type)
        if len(tiles) == 1 or needs_grad(x, tensors):
            return torch.nn.functional.linear(x, dequantize(tensors), bias)
        out = x.new_empty(*x.shape[:-1], rows)
        for at in tiles:
            weight = dequantize(self.rows_of(tensors, at.start, at.stop, columns))
            out[..., at] = torch.nn.functional.linear(x, weight, None if bias is None else bias[at])
        return out

    def unavailable(self) -> str | None:
        """The reason why this machine cannot run the format, or None if it can."""
        return None

    def padding(self, columns: int) -> str | None:
        """A description of what is padded where the columns do not divide evenly, or None if nothing is."""
        return None

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a stored weight [rows, columns]: codes, scales, zero points and padding."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.specs(rows, columns).values())

    def zeros(self, rows: int, columns: int, device: torch.device | str) -> Tensors:
        """Zero tensors of the shapes and dtypes of `specs`, to load a checkpoint into."""
        return {
            suffix: torch.zeros(shape, dtype=dtype, device=device)
            for suffix, (shape, dtype) in self.specs(rows, columns).items()
        }


def _tiles(rows: int, columns: int, device: str) -> list[slice]:
    """Runs of rows that a device rounds or dequantizes at once: multiples of 32, whose zero points fill whole words
    whatever their bits."""
    step = max(TILE.get(device, LARGE_TILE) // columns // 32, 1) * 32
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def needs_grad(x: Tensor, tensors: Tensors) -> bool:
    """Whether autograd would record a product of these tensors."""
    return torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors.values()))


def as_floats(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_bits`: integers viewed as floats of `dtype`. A float tensor is returned unchanged."""
    return bits if bits.is_floating_point() else bits.view(dtype)


def as_bits(values: Tensor) -> Tensor:
    """A float tensor of 1, 2 or 4 bytes an element, viewed as uint8, int16 or int32."""
    return values.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
