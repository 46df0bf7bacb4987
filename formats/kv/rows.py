"""The formats of the KV cache. Each key or value of one head is stored as a row of bytes, quantized once.

A row has its own scales and zero points, so adding a token reads no other token and costs the same at any length, and
no window of full precision is needed. Keys lose more by that than values, since some of their channels are large at
every token. KIVI (Liu et al. 2024) shares scales along the tokens of a channel instead, and must buffer tokens until
a block is full; here, keys may have more bits than values. The formats of weights would give the same grids, but need
ten times as many kernel launches per decoding step. May import: formats.errors, torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitplan.formats.errors import UnknownFormat

CHUNK = 1 << 16
"""Rows encoded or decoded at a time, which bounds the memory of the float32 intermediates."""


@dataclass(frozen=True)
class RowFormat:
    """A row's codes, then an fp16 scale per group, then, for 4-bit codes, the fp16 value of code 0 per group.

    A row is split into as few groups of at most `group` values as possible, all of one size except the last.
    """

    dtype: torch.dtype
    """A byte of codes is e4m3 (Micikevicius et al. 2022), symmetric int8, or uint8 with two 4-bit codes."""
    group: int

    @property
    def bits(self) -> int:
        return 4 if self.dtype == torch.uint8 else 8

    @property
    def top(self) -> float:
        """The largest code. The smallest is its negative if codes are signed, else 0."""
        return {torch.float8_e4m3fn: 448, torch.int8: 127, torch.uint8: 15}[self.dtype]

    def widths(self, size: int) -> tuple[int, ...]:
        """Bytes of the parts of a row of `size` values: codes, scales, values of code 0."""
        fields = 2 if self.bits == 4 else 1
        return (-(-size * self.bits // 8), *[2 * -(-size // self.group)] * fields)

    def nbytes(self, size: int) -> int:
        """Bytes of a row of `size` values."""
        return sum(self.widths(size))

    def encode(self, states: Tensor) -> Tensor:
        """Float [..., size] → uint8 [..., nbytes(size)]."""
        rows = [self._encode(part) for part in states.detach().flatten(0, -2).split(CHUNK)]
        return torch.cat(rows).unflatten(0, states.shape[:-1])

    def decode(self, rows: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """The inverse: uint8 [..., nbytes(size)] → `dtype` [..., size]. Zero bytes are zeros."""
        flat = rows.flatten(0, -2)
        states = torch.empty(len(flat), size, dtype=dtype, device=rows.device)
        for part, into in zip(flat.split(CHUNK), states.split(CHUNK), strict=True):
            into.copy_(self._decode(part, size))
        return states.unflatten(0, rows.shape[:-1])

    def _encode(self, states: Tensor) -> Tensor:
        size = states.shape[-1]
        values = self._grouped(states.float())
        if self.bits == 4:
            low, high = values.aminmax(dim=-1, keepdim=True)
            floats = [((high - low) / self.top).half(), low.half()]
            values = values - floats[1].float()
        else:
            floats = [(values.abs().amax(-1, keepdim=True) / self.top).half()]
        values = values / floats[0].float().clamp(min=1e-12)  # values far below fp16's least scale become 0
        values = values.clamp(0 if self.bits == 4 else -self.top, self.top).flatten(-2)[..., :size]
        codes = (values if self.dtype.is_floating_point else values.round()).to(self.dtype)
        if self.bits == 4:
            even, odd = torch.nn.functional.pad(codes, (0, size % 2)).unflatten(-1, (-1, 2)).unbind(-1)
            codes = even | odd << 4
        return torch.cat([codes.view(torch.uint8), *(_bytes(each) for each in floats)], -1)

    def _decode(self, rows: Tensor, size: int) -> Tensor:
        codes, *stored = rows.split(self.widths(size), -1)
        # Copied, because a view as a wider dtype requires aligned rows.
        halves = [each.clone(memory_format=torch.contiguous_format).view(torch.float16) for each in stored]
        floats = [each.float().unsqueeze(-1) for each in halves]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :size]
        else:
            codes = codes.view(self.dtype)
        # Converted before the product: with mixed dtypes torch would copy inside it, where memory is not counted.
        values = self._grouped(codes.float()) * floats[0]
        if self.bits == 4:
            values += floats[1]
        return values.flatten(-2)[..., :size]

    def _grouped(self, row: Tensor) -> Tensor:
        """[rows, size] → [rows, groups, values of a group], the last group filled with the row's last value."""
        size = row.shape[-1]
        groups = -(-size // self.group)
        width = -(-size // groups)
        if groups * width > size:
            row = row[:, torch.arange(groups * width, device=row.device).clamp(max=size - 1)]
        return row.unflatten(-1, (groups, width))


def _bytes(halves: Tensor) -> Tensor:
    """fp16 [rows, groups, 1] → uint8 [rows, 2 * groups]."""
    return halves.flatten().view(torch.uint8).view(len(halves), 2 * halves.shape[1])


@dataclass(frozen=True)
class KVFormat:
    """The row formats of keys and of values."""

    keys: RowFormat
    values: RowFormat


FP8 = RowFormat(torch.float8_e4m3fn, group=1 << 16)  # one group: a float's own exponent serves small values
INT8 = RowFormat(torch.int8, group=64)
INT4 = RowFormat(torch.uint8, group=32)
KV_FORMATS: dict[str, KVFormat | None] = {
    "native": None,
    "fp8": KVFormat(FP8, FP8),
    "int8": KVFormat(INT8, INT8),
    "k8v4": KVFormat(INT8, INT4),
    "int4": KVFormat(INT4, INT4),
}
"""None means the model's dtype. Bits per value, scales included, for a head size of 128: 8.125, 8.25, 6.625, 5."""


def kv_format_named(name: str) -> KVFormat | None:
    """The KV cache format called `name`, None for "native". Raises UnknownFormat, which lists the available names."""
    if name not in KV_FORMATS:
        raise UnknownFormat(f"unknown format {name!r} for the KV cache: there are {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name]
