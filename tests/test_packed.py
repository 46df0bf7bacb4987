import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitplan.formats.packed import pack, unpack, unpack_at, words_per_row

BITS = st.integers(1, 8)


@st.composite
def coded(draw):
    bits = draw(BITS)
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    codes = draw(hnp.arrays("uint8", (rows, count), elements=st.integers(0, (1 << bits) - 1)))
    return bits, torch.from_numpy(codes)


def as_one_number(row: torch.Tensor, width: int) -> int:
    return sum((int(value) & ((1 << width) - 1)) << (width * i) for i, value in enumerate(row))


@given(coded())
def test_words_are_one_little_endian_bit_stream(case):
    bits, codes = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (len(codes), words_per_row(codes.shape[1], bits))
    for row, packed in zip(codes, words, strict=True):
        assert as_one_number(packed, 32) == as_one_number(row, bits)


@given(coded())
def test_unpack_inverts_pack(case):
    bits, codes = case
    assert torch.equal(unpack(pack(codes, bits), codes.shape[1], bits), codes)


@given(coded(), st.randoms(use_true_random=False))
def test_unpack_at_reads_single_codes(case, random):
    bits, codes = case
    positions = torch.tensor([[random.randrange(codes.shape[1]) for _ in range(3)] for _ in range(2)])
    assert torch.equal(unpack_at(pack(codes, bits)[0], positions, bits), codes[0][positions])


def test_no_bits_are_wasted_where_words_fill():
    assert all(words_per_row(4096, bits) * 32 == 4096 * bits for bits in range(1, 9))
