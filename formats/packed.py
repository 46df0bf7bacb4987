"""Packing of 1 to 8-bit and ternary codes into int32 words, one little-endian bit stream per row.

Code k of a row occupies the row's bits k*b to k*b+b-1, lowest first; a code may straddle two words. For 2, 4 and
8 bits, and for 3 bits in runs of 32, this is the order inside a word that GPTQ checkpoints use (along another axis).
May import: torch only.
"""

from math import gcd

import torch
from torch import Tensor

TRITS = 20
"""Ternary codes that one int32 word holds: 3**20 < 2**32."""


def words_per_row(count: int, bits: int) -> int:
    """int32 words that `count` codes of `bits` bits need."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n], each below 2**bits, into int32 words [..., ceil(n * bits / 32)]."""
    count = codes.shape[-1]
    period = 32 // gcd(bits, 32)
    runs = -(-count // period)
    padded = torch.nn.functional.pad(codes, (0, runs * period - count)).unflatten(-1, (runs, period))
    words = torch.zeros(*padded.shape[:-1], period * bits // 32, dtype=torch.int32, device=codes.device)
    for k in range(period):
        word, shift = divmod(k * bits, 32)
        code = padded[..., k].int()
        words[..., word] |= code << shift
        if shift + bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    return words.flatten(-2)[..., : words_per_row(count, bits)].contiguous()


def unpack(words: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack`: int32 words [..., m] → uint8 codes [..., count]."""
    period = 32 // gcd(bits, 32)
    runs, width = -(-count // period), period * bits // 32
    padded = torch.nn.functional.pad(words, (0, runs * width - words.shape[-1])).unflatten(-1, (runs, width))
    codes = torch.empty(*padded.shape[:-1], period, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for k in range(period):
        word, shift = divmod(k * bits, 32)
        # An arithmetic shift fills with the sign bit: masked out below, and first where the code straddles two words.
        code = padded[..., word] >> shift
        if shift + bits > 32:
            low = 32 - shift
            code = (code & ((1 << low) - 1)) | (padded[..., word + 1] << low)
        codes[..., k] = (code & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count]


def pack_trits(codes: Tensor) -> Tensor:
    """Pack uint8 codes 0, 1, 2 [..., n] into int32 words [..., ceil(n / 20)]; code k of a word has the place value
    3**k."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TRITS)).unflatten(-1, (-1, TRITS)).long()
    values = (padded * _powers(codes.device)).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).int()


def unpack_trits(words: Tensor, count: int) -> Tensor:
    """The inverse of `pack_trits`: int32 words [..., m] → uint8 codes [..., count]."""
    values = (words.long() & 0xFFFFFFFF).unsqueeze(-1)
    return (values // _powers(words.device) % 3).to(torch.uint8).flatten(-2)[..., :count]


def _powers(device: torch.device) -> Tensor:
    return 3 ** torch.arange(TRITS, device=device)


def unpack_at(words: Tensor, positions: Tensor, bits: int) -> Tensor:
    """The codes at int64 `positions` (any shape) of one packed row, int32 words [m]: uint8, shaped like `positions`."""
    bit = positions * bits
    word, shift = bit // 32, bit % 32
    low = words[word].long() & 0xFFFFFFFF
    high = words[(word + 1).clamp(max=len(words) - 1)].long() & 0xFFFFFFFF
    return (((low | (high << 32)) >> shift) & ((1 << bits) - 1)).to(torch.uint8)
