"""Formats whose groups' scales are codes: against Python's integers, brute force, and an fp16 scale per group."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bitplan.formats.double_quant import DoubleQuantFormat, nbytes_added, round_up
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.rounding import ROUNDINGS
from bitplan.formats.rounding.descent import descend
from bitplan.formats.rounding.gptq import gptq_codes
from bitplan.formats.table import FORMATS, format_named
from bitplan.planner.export.compressed_tensors import to_compressed
from bitplan.planner.export.gptq_layout import to_gptq
from bitplan.planner.plan import PlannedUnit
from bitplan.testing import RoundingTests
from bitplan.testing.formats import weights
from bitplan.testing.roundings import hessian
from tests.test_gptq_layout import decoded, stream

DOUBLE = [format for format in FORMATS.values() if isinstance(format, DoubleQuantFormat)]


@pytest.fixture(params=DOUBLE, ids=lambda format: format.name)
def format(request):
    return request.param


class TestGptq(RoundingTests):
    @pytest.fixture
    def rounding(self):
        return ROUNDINGS["gptq"]

    @pytest.fixture(params=DOUBLE, ids=lambda format: format.name)
    def format(self, request):
        return request.param


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_of_32_take_fewer_bytes_than_groups_of_64(bits):
    double, plain = format_named(f"int{bits}-g32-s4"), format_named(f"int{bits}-g64")
    for columns in (256, 576, 1536, 4096):
        assert double.nbytes(96, columns) == 96 * (columns * bits // 8 + 2) + 96 * columns // 32 * 6 // 8
        assert double.nbytes(96, columns) < plain.nbytes(96, columns)
    assert nbytes_added(double, 64, 4096) == format_named(f"int{bits}-g32").nbytes(64, 4096) - double.nbytes(64, 4096)
    assert nbytes_added(plain, 64, 4096) == 0


@given(st.integers(0, 2**32 - 1), st.sampled_from(DOUBLE), st.integers(1, 40), st.sampled_from([33, 64, 172]))
def test_every_code_is_read_back(seed, format, rows, columns):
    """(code - zero) * scale, read bit by bit; with fp16 scales and zero points, the values are the same."""
    made = torch.Generator().manual_seed(seed)
    bits, groups = format.code_bits, format.groups(columns)
    lowest = (1 << (bits - 1)) - 2
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=made)
    zero = torch.randint(lowest, lowest + 4, (rows, groups), generator=made)
    row = round_up(torch.rand(rows, 1, generator=made) * 10.0 ** float(torch.randint(-6, 3, (1,), generator=made)))
    level = torch.randint(1, 17, (rows, groups), generator=made)
    tensors = format.store(codes, Grid(row * level / 16, zero.float()))
    value = format.dequantize(tensors, columns, torch.float64)
    at = torch.arange(columns) // 32
    assert torch.equal(value, ((codes - zero[:, at]) * (row * level / 16)[:, at]).double())
    stored = torch.tensor(stream(tensors["_group"].tolist(), 6)[: rows * groups]).view(rows, groups)
    scale = tensors["_scale"].view(torch.float16).double() * (stored % 16 + 1) / 16
    assert torch.equal(value, (codes - (lowest + stored // 16)[:, at]) * scale[:, at])
    plain = IntegerFormat("", bits, group=32)
    assert torch.equal(plain.dequantize(format.with_fp16_scales(tensors, columns), columns, torch.float64), value)


def test_fitted_grids_lose_the_least_of_all_zeros_and_upper_levels(format):
    weight, importance = weights(5, 172), weights(1, 172, 9)[0].square() * 1000
    weight[:, ::50] *= 6  # some to be clipped
    found = format.fitted_grids(weight, importance)
    groups = [part for part in zip(weight.split(32, 1), importance.split(32), strict=True)]
    first, last = format.zeros_range
    for r in range(len(weight)):
        # The row's scale: the largest that a group needs with the best of its zero points, rounded up to 7 bits.
        spans = torch.zeros(len(groups), last - first + 1)
        for (g, (part, _)), zero in product(enumerate(groups), range(first, last + 1)):
            low, high = -float(part[r].min().clamp(max=0)), float(part[r].max().clamp(min=0))
            spans[g, zero - first] = max(low / zero if zero else 1e9 * low, high / max(format.top - zero, 1e-9))
        largest = float(spans.amin(1).max())
        row = float(round_up(torch.tensor(largest)))
        assert largest <= row <= largest * (1 + 2**-6)
        for g, (part, counted) in enumerate(groups):
            losses = []
            for zero in range(first, last + 1):
                top = min(-int(-spans[g, zero - first] / row * 16 // 1), 16)
                for level in range(max(top - 7, 1), top + 1):
                    scale = row * level / 16
                    codes = (part[r] / scale + zero).round().clamp(0, format.top)
                    losses.append(float((((codes - zero) * scale - part[r]).square() * counted).sum()))
            scale, zero = found.scale[r, g], found.zero[r, g]
            codes = (part[r] / scale + zero).round().clamp(0, format.top)
            loss = float((((codes - zero) * scale - part[r]).square() * counted).sum())
            assert loss <= min(losses) * 1.0001 and first <= zero <= last
    assert torch.equal(found.scale, found.scale.half().float())  # exact in fp16: exports are the same weights
    assert torch.equal(format.storable_scale(found.scale), found.scale)


def test_nearest_clips_nothing_of_its_scale(format):
    weight = weights(16, 256)
    grid = format.spanning_grids(weight)
    value = format.dequantize(format.quantize(weight), 256, torch.float32)
    assert ((value - weight).abs() <= format.over_columns(grid.scale, 256) * 0.5001).all()


def test_scales_that_cannot_be_stored_become_the_nearest_that_can(format):
    scale = torch.rand(20, 6, generator=torch.Generator().manual_seed(3)) + 0.2
    stored = format.storable_scale(scale)
    assert torch.equal(format.storable_scale(stored), stored)
    assert ((stored - scale).abs() <= scale.amax(1, keepdim=True) / 16 * (0.5 + 2**-6)).all()
    assert (format.storable_scale(torch.zeros(2, 6)) == 0).all()


def test_codes_are_chosen_with_the_scales_that_are_stored(format):
    """GPTQ's last column takes no error of others: its codes are the nearest on the stored grid."""
    weight, inputs = weights(8, 96), hessian(96)
    codes, grid, aimed = gptq_codes(weight, format, [inputs])
    tensors = format.store(codes, grid)
    wide = format.over_columns(grid.scale, 96), format.over_columns(grid.zero, 96)
    value = format.dequantize(tensors, 96, torch.float32)
    assert torch.equal(value, (codes - wide[1]) * wide[0])
    assert torch.equal(codes, (aimed / wide[0] + wide[1]).round().clamp(0, format.top))


def test_descent_exchanges_scales_only_for_those_that_are_stored(format):
    target, matrix = weights(8, 160, 3), hessian(160).objective
    grid = format.fitted_grids(target, matrix.diagonal())
    grid = Grid(grid.scale.amax(1, keepdim=True).expand_as(grid.scale), grid.zero)  # too large for most groups
    wide = Grid(format.over_columns(grid.scale, 160), format.over_columns(grid.zero, 160))
    codes = format.encode(target, wide)
    found, better, _ = descend(target, codes, grid, matrix, format, 2)

    def lost(codes, grid):
        value = format.dequantize(format.store(codes, grid), 160, torch.float32)
        change = (value - target).double()
        return ((change @ matrix.double()) * change).sum(-1)

    assert (lost(found, better) <= lost(codes, grid) * (1 + 1e-5)).all()
    assert not torch.equal(better.scale, grid.scale)
    assert torch.equal(format.storable_scale(better.scale), better.scale)
    assert torch.equal(better.zero, better.zero.clamp(*format.zeros_range))


@pytest.mark.parametrize("exponent", [-40, -28, -22, -16])
def test_tiny_rows_lose_at_most_the_row(format, exponent):
    weight = weights(4, 64)
    weight = weight / weight.abs().amax() * 2.0**exponent
    value = format.dequantize(format.quantize(weight), 64, torch.float32)
    assert (value - weight).abs().max() <= 2.0 ** (exponent + 1)


def test_exports_have_the_same_values(format):
    """The layouts of GPTQ and of compressed-tensors, with an fp16 scale per group."""
    weight = weights(64, 128)
    tensors, bits = format.quantize(weight), format.code_bits
    value = format.dequantize(tensors, 128, torch.float32)
    assert torch.equal(decoded(to_gptq(tensors, format, 128), bits), value)
    facts = {"name": "a", "kind": "linear", "parameter": "a.weight", "experts": 1, "dtype": "float32", "group": "a"}
    size = format.nbytes(64, 128)
    unit = PlannedUnit(**facts, rows=64, columns=128, format=format.name, rounding="nearest", bytes=size)
    written = to_compressed(tensors, unit)
    codes = torch.tensor([stream(row, bits)[:128] for row in written["weight_packed"].tolist()])
    zero = torch.tensor([stream(column, bits)[:64] for column in written["weight_zero_point"].T.tolist()]).T
    at = torch.arange(128) // 32
    assert_close((codes - zero[:, at]) * written["weight_scale"].float()[:, at], value, rtol=0, atol=0)
