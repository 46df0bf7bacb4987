"""The formats of bitsandbytes (nf4, fp4, LLM.int8), which its kernels run.

bitsandbytes is imported when a weight is first quantized or multiplied. May import: formats.base.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bitplan.formats.base import Format, Specs, Tensors, as_bits, as_floats, needs_grad

BLOCK = 64


def missing() -> str | None:
    """The reason why bitsandbytes cannot be used, or None."""
    return None if find_spec("bitsandbytes") else "bitsandbytes is not installed: pip install bitsandbytes"


@dataclass(frozen=True)
class Bnb4Format(Format):
    """nf4, 4-bit NormalFloat (Dettmers et al. 2023, QLoRA), or fp4: 16 levels and a float32 absmax per 64 columns.

    Rows are padded to whole blocks, so that no block spans two rows. Where 64 divides the columns, codes and absmax
    equal those of `bitsandbytes.nn.Linear4bit` without double quantization.
    """

    @property
    def floats(self) -> dict[str, torch.dtype]:
        return {"_scale": torch.float32}

    def specs(self, rows: int, columns: int) -> Specs:
        blocks = -(-columns // BLOCK)
        return {"": ((rows, blocks * BLOCK // 8), torch.int32), "_scale": ((rows, blocks), torch.int32)}

    def padding(self, columns: int) -> str | None:
        return f"rows padded from {columns} to {columns + -columns % BLOCK} codes" if columns % BLOCK else None

    def unavailable(self) -> str | None:
        return missing()

    def quantize(self, weight: Tensor) -> Tensors:
        import bitsandbytes.functional as bnb

        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK)).contiguous()
        codes, state = bnb.quantize_4bit(padded, blocksize=BLOCK, quant_type=self.name)
        return {"": codes.view(rows, -1).view(torch.int32), "_scale": as_bits(state.absmax.view(rows, -1))}

    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        levels = self._levels(tensors[""].device)
        codes = tensors[""].view(torch.uint8)
        # The first of two codes is in the high 4 bits of the byte.
        codes = torch.stack((codes >> 4, codes & 15), -1).flatten(-2)
        values = levels[codes.int()].unflatten(-1, (-1, BLOCK)) * as_floats(tensors["_scale"], torch.float32).unsqueeze(
            -1
        )
        return values.flatten(-2)[..., :columns].to(dtype)

    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return self.dequantize({suffix: tensor[ids] for suffix, tensor in tensors.items()}, columns, dtype)

    def linear(self, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
        if needs_grad(x, tensors) or tensors["_scale"].is_floating_point():
            return super().linear(x, tensors, columns, bias)
        return self.by_tiles(x, tensors, columns, bias, lambda part: self._unpacked(part, columns, x.dtype))

    def _unpacked(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        """`dequantize`, computed by bitsandbytes."""
        import bitsandbytes.functional as bnb

        state = self._state(tensors, columns, dtype)
        return bnb.dequantize_4bit(tensors[""].view(torch.uint8).view(-1, 1), state)[:, :columns]

    def multiply(self, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
        """`linear`, computed by `bitsandbytes.matmul_4bit`, which on a GPU dequantizes inside the product."""
        import bitsandbytes as bnb

        x = torch.nn.functional.pad(x, (0, -columns % BLOCK)) if columns % BLOCK else x
        codes = tensors[""].view(torch.uint8).view(-1, 1)
        state = self._state(tensors, columns, x.dtype)
        return bnb.matmul_4bit(x, codes.t(), state, bias=None if bias is None else bias.to(x.dtype))

    def _state(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Any:
        import bitsandbytes as bnb

        return bnb.functional.QuantState(
            absmax=as_floats(tensors["_scale"], torch.float32).flatten(),
            shape=torch.Size((tensors[""].shape[0], columns + -columns % BLOCK)),
            code=self._levels(tensors[""].device),
            blocksize=BLOCK,
            quant_type=self.name,
            dtype=dtype,
        )

    def _levels(self, device: torch.device) -> Tensor:
        import bitsandbytes.functional as bnb

        return bnb.get_4bit_type(self.name, device=device)


@dataclass(frozen=True)
class Int8BnbFormat(Format):
    """LLM.int8 (Dettmers et al. 2022): int8 codes and a float32 absmax per row.

    On a GPU, bitsandbytes' product also quantizes the inputs to int8, except for columns with a value above
    `threshold`.
    """

    threshold: float = 6.0

    @property
    def floats(self) -> dict[str, torch.dtype]:
        return {"_scale": torch.float32}

    def specs(self, rows: int, columns: int) -> Specs:
        return {"": ((rows, -(-columns // 4)), torch.int32), "_scale": ((rows, 1), torch.int32)}

    def padding(self, columns: int) -> str | None:
        return f"rows padded from {columns} to {columns + -columns % 4} codes" if columns % 4 else None

    def unavailable(self) -> str | None:
        return missing()

    def quantize(self, weight: Tensor) -> Tensors:
        scale = weight.float().abs().amax(-1, keepdim=True)
        codes = (weight.float() * (127 / scale.clamp(min=1e-30))).round().to(torch.int8)
        padded = torch.nn.functional.pad(codes, (0, -weight.shape[-1] % 4)).contiguous()
        return {"": padded.view(torch.int32), "_scale": as_bits(scale)}

    def dequantize(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> Tensor:
        codes = tensors[""].view(torch.int8)[..., :columns]
        return (codes.float() * (as_floats(tensors["_scale"], torch.float32) / 127)).to(dtype)

    def take_rows(self, tensors: Tensors, ids: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return self.dequantize({suffix: tensor[ids] for suffix, tensor in tensors.items()}, columns, dtype)

    def multiply(self, x: Tensor, tensors: Tensors, columns: int, bias: Tensor | None) -> Tensor:
        """`linear`, computed by `bitsandbytes.matmul`, which also quantizes the inputs."""
        import bitsandbytes as bnb

        codes = tensors[""].view(torch.int8)[..., :columns].contiguous()
        state = bnb.MatmulLtState()
        state.CB, state.SCB = codes, as_floats(tensors["_scale"], torch.float32).flatten()
        state.threshold, state.has_fp16_weights = self.threshold, False
        flat = x.reshape(-1, columns)
        out = bnb.matmul(flat, codes, state=state, bias=None if bias is None else bias.to(x.dtype))
        return out.view(*x.shape[:-1], -1)
