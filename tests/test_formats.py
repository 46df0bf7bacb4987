import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bitplan.formats.base import as_bits, as_floats
from bitplan.formats.errors import UnknownFormat, UsageError
from bitplan.formats.integers import SHRINK, SIGN_FACTORS, IntegerFormat
from bitplan.formats.kernels import dispatch
from bitplan.formats.rounding import ROUNDINGS, refuse_misfit, rounding_alone, rounding_for, rounding_named
from bitplan.formats.table import DEFAULT_FORMATS, FORMATS, format_named
from bitplan.testing import FormatTests, RoundingTests
from bitplan.testing.formats import weights

INTEGERS = [f for f in FORMATS.values() if type(f) is IntegerFormat]  # double-quantized ones: test_double_quant


class TestFormats(FormatTests):
    @pytest.fixture(params=FORMATS.values(), ids=FORMATS)
    def format(self, request):
        return request.param

    @pytest.fixture
    def error_bound(self, format):
        mantissa = {"fp32": 24, "bf16": 8, "fp16": 11, "fp8": 4}  # bits of a float's significand, the hidden one too
        if format.name in mantissa:
            return 2.0 ** -mantissa[format.name]
        return 8 / (2**format.bits - 1) / 12**0.5 if format.bits >= 2 else 0.65


class TestNearest(RoundingTests):
    @pytest.fixture
    def rounding(self):
        return ROUNDINGS["nearest"]

    @pytest.fixture(params=["bf16", "fp8", "int8", "nf4", "int3-g32"])
    def format(self, request):
        return FORMATS[request.param]


@pytest.mark.parametrize("name", ["int8-bnb", "nf4", "fp4"])
def test_bitsandbytes_product_is_the_dequantized_layers(name):
    weight, x, bias, format = weights(5, 172), weights(7, 172, 4).view(7, 1, -1), weights(1, 5, 5)[0], FORMATS[name]
    tensors = format.quantize(weight)
    expected = torch.nn.functional.linear(x, format.dequantize(tensors, 172, torch.float32), bias)
    # LLM.int8 rounds its inputs too: 1/127 of the largest, at most.
    tolerance = {"rtol": 0.05, "atol": 0.01} if name == "int8-bnb" else {}
    assert_close(format.multiply(x, tensors, 172, bias), expected, **tolerance)


@pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
def test_nearest_is_the_nearest_of_the_grid(format):
    weight = weights(3, 80)
    tensors = format.quantize(weight)
    value = format.dequantize(tensors, 80, torch.float32)
    for start in range(0, 80, format.group or 80):
        part = slice(start, start + (format.group or 80))
        grid = format.grid(weight[:, part])
        codes = torch.arange(format.top + 1)
        levels = (codes - grid.zero) * grid.scale  # [rows, levels]
        best = (weight[:, part, None] - levels[:, None, :]).abs().amin(-1)
        assert_close((value[:, part] - weight[:, part]).abs(), best, rtol=1e-4, atol=1e-7)


def spread(format: IntegerFormat, values: torch.Tensor, columns: int) -> torch.Tensor:
    """A value per group, for each column."""
    return values[:, torch.arange(columns) // (format.group or columns)]


@pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
def test_fitted_grids_lose_the_least_of_all_clipped_ones(format):
    weight, importance = weights(5, 172), weights(1, 172, 9)[0].square() * 1000
    weight[:, ::50] *= 6  # some to be clipped

    def loss(scale, zero):
        wide, middle = spread(format, scale, 172), spread(format, zero, 172)
        codes = (weight / wide + middle).round().clamp(0, format.top)
        errors = ((codes - middle) * wide - weight).square() * importance
        return torch.stack([part.sum(-1) for part in errors.split(format.group or 172, -1)], -1)

    found = format.fitted_grids(weight, importance)
    losses = []
    for factor in SIGN_FACTORS if format.zero_point == "mid_rise" else SHRINK:
        # Clip every group's range by the factor, and span what is left.
        grids = []
        for part in weight.split(format.group or 172, -1):
            if format.zero_point == "asymmetric":
                low, high = part.amin(-1, True).clamp(max=0) * factor, part.amax(-1, True).clamp(min=0) * factor
                whole = format.grid(part).scale
                assert_close(whole, ((high - low) / factor / format.top).half().float())
                scale = (whole * factor).half().float()
                grids.append((scale, (-low / scale).round().clamp(0, format.top)))
            elif format.zero_point == "float_zero":  # the zero point may lie anywhere: shrunken about the middle
                whole = format.grid(part)
                width, middle = whole.scale * format.top, (format.top / 2 - whole.zero) * whole.scale
                scale = (whole.scale * factor).half().float()
                grids.append((scale, ((factor * width / 2 - middle) / scale).half().float()))
            else:
                whole = format.grid(part)
                grids.append(((whole.scale * factor).half().float(), whole.zero))
        losses.append(loss(*(torch.cat(parts, -1) for parts in zip(*grids, strict=True))))
    # Where zeros are halves too, they round otherwise when they are computed in another order.
    tolerance = 0.02 if format.zero_point == "float_zero" else 1e-4
    assert_close(loss(found.scale, found.zero), torch.stack(losses).amin(0), rtol=tolerance, atol=1e-9)
    assert torch.equal(found.scale, found.scale.half().float())
    if format.zero_point == "asymmetric":
        assert torch.equal(found.zero, found.zero.round().clamp(0, format.top))
    whole = [format.grid(part) for part in weight.split(format.group or 172, -1)]
    spanning = loss(torch.cat([grid.scale for grid in whole], -1), torch.cat([grid.zero for grid in whole], -1))
    assert (loss(found.scale, found.zero) <= spanning * 1.0001).all()
    if format.bits <= 3:
        assert (loss(found.scale, found.zero) < spanning).any()


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.floats], ids=lambda f: f.name)
def test_values_grow_as_their_scales_do(format):
    tensors, step = format.quantize(weights(4, 96)), 1e-2
    scale = as_floats(tensors["_scale"], format.floats["_scale"]).float()
    grown = format.dequantize(tensors | {"_scale": scale * (1 + step)}, 96, torch.float32)
    assert_close(grown, format.dequantize(tensors, 96, torch.float32) * (1 + step), rtol=1e-4, atol=1e-7)


@given(st.integers(0, 1000), st.sampled_from([n for n in DEFAULT_FORMATS if n != "int8" and not n.endswith("-s4")]))
def test_error_is_at_most_half_a_step(seed, name):
    format = format_named(name)
    weight = weights(4, 96, seed)
    value = format.dequantize(format.quantize(weight), 96, torch.float32)
    for part, rounded in zip(weight.split(format.group, 1), value.split(format.group, 1), strict=True):
        step = format.grid(part).scale
        # Half a step, and as much again where the fp16 scale was rounded down at the ends of the range.
        assert ((part - rounded).abs() <= step * 0.5 * 1.01 + step * format.top * 2**-11).all()


def test_more_bits_and_smaller_groups_lose_less():
    weight = weights(16, 256)

    def error(name):
        format = format_named(name)
        return (format.dequantize(format.quantize(weight), 256, torch.float32) - weight).norm()

    assert error("int2-g64") > error("int3-g64") > error("int4-g64") > error("int5-g64") > error("int6-g64")
    assert error("int4-g128") > error("int4-g64") > error("int4-g32")
    assert error("int6-g32") > error("int8") > error("bf16") > error("fp16") > error("fp32") == 0


def test_binary_is_sign_times_mean_magnitude():
    weight = weights(4, 128)
    format = format_named("binary-g64")
    value = format.dequantize(format.quantize(weight), 128, torch.float32)
    parts = weight.unflatten(1, (2, 64))
    expected = (parts.sign() * parts.abs().mean(-1, keepdim=True)).flatten(1)
    assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_fp8_keeps_a_relative_error_below_a_sixteenth():
    weight = weights(8, 64)
    format = format_named("fp8")
    value = format.dequantize(format.quantize(weight), 64, torch.float32)
    normal = weight.abs() > weight.abs().amax(-1, keepdim=True) / 448 * 2**-6
    assert ((value - weight).abs() <= weight.abs() / 16 * 1.01)[normal].all()


@given(st.integers(0, 1000), st.integers(-30, 8), st.sampled_from([16, 62]))
def test_fp8_keeps_small_rows(seed, exponent, columns):
    """Rows below what an fp16 scale can bring to 448 too: no weight clipped, none of more than e4m3's error."""
    weight = weights(4, columns, seed)
    weight = weight / weight.abs().amax(-1, keepdim=True) * 2.0**exponent * 1.9
    format = format_named("fp8")
    tensors = format.quantize(weight)
    value = format.dequantize(tensors, columns, torch.float32)
    scale = tensors["_scale"].view(torch.float16).float()
    assert ((value - weight).abs() <= torch.maximum(weight.abs() / 16 * 1.01, scale * 2**-10)).all()
    assert ((value - weight).abs() <= weight.abs() / 16 * 1.01)[weight.abs() == weight.abs().amax(-1, True)].all()
    x, rows = torch.randn(3, columns), format.take_rows(tensors, torch.arange(4), columns, torch.float32)
    assert torch.equal(rows, value)
    product = dispatch.linear(format, x, tensors, columns, None)
    assert_close(product / 2.0**exponent, x @ value.T / 2.0**exponent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", INTEGERS, ids=lambda f: f.name)
@pytest.mark.parametrize("exponent", [-40, -28, -22, -16])
def test_integer_formats_of_tiny_rows_lose_at_most_the_row(format, exponent):
    """Below fp16's least scale a group becomes zeros, or is clipped: a documented limit, never noise."""
    weight = weights(4, 64)
    weight = weight / weight.abs().amax() * 2.0**exponent
    value = format.dequantize(format.quantize(weight), 64, torch.float32)
    assert (value - weight).abs().max() <= 2.0 ** (exponent + 1)


def test_nf4_is_bitsandbytes_own():
    import bitsandbytes.functional as bnb

    weight = weights(8, 128)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    format = format_named("nf4")
    tensors = format.quantize(weight)
    assert torch.equal(tensors[""].view(torch.uint8).flatten(), codes.flatten())
    assert torch.equal(tensors["_scale"].flatten(), as_bits(state.absmax))
    assert_close(format.dequantize(tensors, 128, torch.float32), bnb.dequantize_4bit(codes, state), rtol=0, atol=0)


def test_int8_bnb_is_bitsandbytes_own():
    import bitsandbytes.functional as bnb

    weight = weights(8, 64)
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors = format_named("int8-bnb").quantize(weight.half().float())
    assert_close(tensors["_scale"].view(torch.float32).flatten(), scale)
    assert (tensors[""].view(torch.int8) - codes).abs().max() <= 1  # ties may round either way
    assert ((tensors[""].view(torch.int8) != codes).float().mean()) < 0.02


def test_bytes_by_an_independent_formula():
    rows, columns = 48, 4096
    assert format_named("int4-g128").nbytes(rows, columns) == rows * (columns // 2 + 32 * 2) + rows * 32 // 2
    assert format_named("int3-g64").nbytes(rows, columns) == rows * (columns * 3 // 8 + 64 * 2) + rows * 64 * 3 // 8
    assert format_named("int8").nbytes(rows, columns) == rows * (columns + 2)
    assert format_named("nf4").nbytes(rows, columns) == rows * (columns // 2 + 64 * 4)
    assert format_named("binary-g64").nbytes(rows, columns) == rows * (columns // 8 + 64 * 2)


def test_names():
    assert format_named("int4") is FORMATS["int4-g64"]
    assert format_named("binary") is FORMATS["binary-g64"]
    with pytest.raises(UnknownFormat, match="int4-g64"):
        format_named("int4-g46")
    with pytest.raises(UsageError, match="nearest, gptq, awq, yaqa, tuned"):
        rounding_named("best")


def test_roundings_of_a_format():
    assert rounding_for(FORMATS["fp8"], "gptq") == rounding_for(FORMATS["nf4"], "tuned") == "nearest"
    assert rounding_for(FORMATS["int4-g64"]) == rounding_alone(FORMATS["int4-g64"]) == "gptq"
    assert rounding_for(FORMATS["int8"]) == rounding_alone(FORMATS["int8"]) == "nearest"
    # Those that need a block are scored on a unit alone as gptq is.
    for name in ("awq", "yaqa", "tuned"):
        assert rounding_for(FORMATS["int8"], name) == name
        assert rounding_alone(FORMATS["int8"], name) == "gptq"
        assert rounding_alone(FORMATS["nf4"], name) == "nearest"
    for name, row in ROUNDINGS.items():
        assert row.needs_text == (name != "nearest")
    refuse_misfit(None, [FORMATS["nf4"]])
    refuse_misfit("tuned", [FORMATS["nf4"], FORMATS["int8"]])
    with pytest.raises(UsageError, match="fp8, nf4 cannot be rounded by 'awq', only by nearest: change --rounding"):
        refuse_misfit("awq", [FORMATS["fp8"], FORMATS["nf4"]])
    with pytest.raises(UsageError, match="unknown rounding 'best'"):
        refuse_misfit("best", [FORMATS["int8"]])


def test_padding_is_said():
    assert format_named("int4-g64").padding(172) == "last group has 44 of 64 columns"
    assert format_named("nf4").padding(172) == "rows padded from 172 to 192 codes"
    assert format_named("int4-g64").padding(192) is None
