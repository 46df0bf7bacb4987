"""fp32, bf16, fp16 and fp8. May import: formats.base."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitplan.formats.base import Format, Specs, Tensors, as_bits, as_floats

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class FloatFormat(Format):
    """A plain float type, kept as bytes [rows, columns * itemsize].

    A unit whose checkpoint already has this type is left as it is; these bytes are for the others. The matrix
    product runs in the wider of the weight's and the input's type, so fp32 in a bf16 model computes in fp32.
    """

    dtype: torch.dtype

    def specs(self, rows: int, columns: int) -> Specs:
        return {"": ((rows, columns * self.dtype.itemsize), torch.uint8)}

    def quantize(self, weight: Tensor) -> Tensors:
        return {"": weight.to(self.dtype).contiguous().view(torch.uint8)}

    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        return tensors[""].view(self.dtype).to(dtype)

    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return tensors[""].view(self.dtype)[ids].to(dtype)

    def linear(self, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(x.dtype, self.dtype)
        return super().linear(x.to(wide), tensors, columns, bias).to(x.dtype)


@dataclass(frozen=True)
class Float8Format(Format):
    """e4m3 (1 sign, 4 exponent, 3 mantissa bits; Micikevicius et al. 2022), one fp16 scale per row.

    The row's largest magnitude maps to 448, the largest e4m3 value, or to less where fp16 has no scale that small. With
    the least, 2^-24, weights above 2^-30 keep e4m3's precision, and those above 2^-33 are its subnormals.
    Four codes share an int32 word.
    """

    @property
    def floats(self) -> dict[str, torch.dtype]:
        return {"_scale": torch.float16}

    def specs(self, rows: int, columns: int) -> Specs:
        return {"": ((rows, -(-columns // 4)), torch.int32), "_scale": ((rows, 1), torch.int16)}

    def quantize(self, weight: Tensor) -> Tensors:
        limit = torch.finfo(FP8).max
        largest = weight.float().abs().amax(-1, keepdim=True)
        scale = (largest / limit).half()
        # fp16's subnormals are coarse: where the scale rounds down so far that the largest weight is beyond what still
        # rounds to 448 (half of e4m3's last step of 32 above it), the next larger fp16 is the scale.
        larger = (scale.view(torch.int16) + 1).view(torch.float16)
        scale = torch.where(scale.float() * (limit + 16) < largest, larger, scale)
        codes = (weight.float() / scale.float().clamp(min=1e-12)).clamp(-limit, limit).to(FP8).view(torch.uint8)
        padded = torch.nn.functional.pad(codes, (0, -weight.shape[-1] % 4))
        return {"": padded.contiguous().view(torch.int32), "_scale": as_bits(scale)}

    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        # torch's own conversion of float8 is slow on a CPU. In an fp16's places the bits are 2^-8 times the value, as
        # its exponent counts from -15 instead of -7. (The bytes 127 and 255, no numbers, would be ±480: `quantize`
        # makes them only of weights that are not finite, and then the scale is not either.)
        codes = tensors[""].view(torch.uint8)[..., :columns].to(torch.int16)
        values = (((codes & 128) << 8) | ((codes & 127) << 7)).view(torch.float16).float() * 256
        return (values * as_floats(tensors["_scale"], torch.float16).float()).to(dtype)

    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return self.dequantize({suffix: tensor[ids] for suffix, tensor in tensors.items()}, columns, dtype)

    def padding(self, columns: int) -> str | None:
        return f"rows padded from {columns} to {columns + -columns % 4} codes" if columns % 4 else None
