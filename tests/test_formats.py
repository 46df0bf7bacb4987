import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from formats.base import as_bits
from formats.errors import UnknownFormat, UsageError
from formats.integers import IntegerFormat
from formats.rounding import ROUNDINGS, Hessian, rounding_for, rounding_named
from formats.table import FORMATS, MENU, format_named

SHAPES = [(8, 64), (5, 172), (3, 33), (2, 256)]
CASES = [(f, r) for f in FORMATS.values() for r in ROUNDINGS.values() if r.fits(f)]
NAMES = [f"{f.name}-{r.name}" for f, r in CASES]


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def hessian(columns: int) -> Hessian:
    x = weights(4 * columns, columns, 1) @ weights(columns, columns, 2) + weights(4 * columns, columns, 3)
    return Hessian(x.T @ x / len(x))


@pytest.mark.parametrize(("format", "rounding"), CASES, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES)
class TestEveryFormat:
    def test_tensors_are_as_specified_and_integers(self, format, rounding, shape):
        tensors = rounding.round(weights(*shape), format, [hessian(shape[1])])
        assert {s: (tuple(t.shape), t.dtype) for s, t in tensors.items()} == format.specs(*shape)
        assert sum(t.nbytes for t in tensors.values()) == format.nbytes(*shape)
        assert not any(t.is_floating_point() for t in tensors.values())
        assert tensors[""].shape[0] == shape[0]
        assert tensors[""].shape != shape  # read as a plain weight it must fail on shapes

    def test_rows_are_taken_as_they_are_dequantized(self, format, rounding, shape):
        tensors = rounding.round(weights(*shape), format, [hessian(shape[1])])
        whole = format.dequantize(tensors, shape[1], torch.float32)
        ids = torch.tensor([[0, shape[0] - 1], [1, 0]])
        assert torch.equal(format.take_rows(tensors, ids, shape[1], torch.float32), whole[ids])

    def test_product_is_the_dequantized_layers(self, format, rounding, shape):
        tensors = rounding.round(weights(*shape), format, [hessian(shape[1])])
        whole = format.dequantize(tensors, shape[1], torch.float32)
        x, bias = weights(7, shape[1], 4).view(7, 1, -1), weights(1, shape[0], 5)[0]
        expected = torch.nn.functional.linear(x, whole, bias)
        # LLM.int8 rounds its inputs too: 1/127 of the largest, at most.
        tolerance = {"rtol": 0.05, "atol": 0.01} if format.name == "int8-bnb" else {}
        assert_close(format.linear(x, tensors, shape[1], bias), expected, **tolerance)


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if isinstance(f, IntegerFormat)], ids=lambda f: f.name)
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


@given(st.integers(0, 1000), st.sampled_from([n for n in MENU if n != "int8"]))
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


def test_constant_and_zero_groups_survive():
    weight = torch.cat((torch.zeros(2, 64), torch.full((2, 64), 0.25)), 1)
    for format in FORMATS.values():
        value = format.dequantize(format.quantize(weight), 128, torch.float32)
        assert value.isfinite().all()
        assert_close(value, weight, rtol=0.01, atol=1e-6)


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
    with pytest.raises(UsageError, match="nearest, gptq"):
        rounding_named("best")
    assert rounding_for(FORMATS["fp8"], "gptq") == "nearest"
    assert rounding_for(FORMATS["int4-g64"]) == "gptq"


def test_padding_is_said():
    assert format_named("int4-g64").padding(172) == "last group has 44 of 64 columns"
    assert format_named("nf4").padding(172) == "rows padded from 172 to 192 codes"
    assert format_named("int4-g64").padding(192) is None
