"""Conformance tests for a format. May import: formats."""

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.testing import assert_close

from bitplan.formats.base import Format, Specs, Tensors, as_floats
from bitplan.formats.modules import Packed, pack_parameter


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normally distributed float32 weights [rows, columns], the same for the same seed."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def specs_of(tensors: Tensors) -> Specs:
    """Shape and dtype of each tensor, as `Format.specs` gives them."""
    return {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in tensors.items()}


class FormatTests:
    """What everything else takes for granted of a `Format`. Give the fixture `format`."""

    @pytest.fixture
    def format(self) -> Format:
        raise NotImplementedError("override the fixture `format` with the format to test")

    @pytest.fixture
    def error_bound(self, format: Format) -> float:
        """The largest relative error ‖dequantize(quantize(W)) - W‖ / ‖W‖ allowed for normally distributed weights: by
        default that of evenly spaced codes over ± 4 standard deviations, step / √12. Override it for other codes."""
        return min(8 / (2**format.bits - 1) / 12**0.5, 1.0)

    @pytest.fixture(params=[(5, 172), (70, 33), (2, 256)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
    def shape(self, request: pytest.FixtureRequest) -> tuple[int, int]:
        """Rows and columns: no multiples of a group, fewer columns than one, whole groups."""
        return request.param

    @pytest.fixture
    def tensors(self, format: Format, shape: tuple[int, int]) -> Tensors:
        return format.quantize(weights(*shape))

    def test_its_name_can_be_typed(self, format):
        """Lists of formats are separated by commas, and a slash comes before the rounding."""
        assert format.name and not set(format.name) & set(",/ *")

    def test_tensors_are_as_specified_and_integers(self, format, shape, tensors):
        assert specs_of(tensors) == format.specs(*shape) == specs_of(format.zeros(*shape, "cpu"))
        assert sum(tensor.nbytes for tensor in tensors.values()) == format.nbytes(*shape)
        assert set(format.floats) < set(tensors)
        assert not any(tensor.is_floating_point() for tensor in tensors.values())  # nothing casts or trains integers
        assert tensors[""].shape[0] == shape[0]
        assert tensors[""].shape != shape  # read as a plain weight it must fail on shapes

    def test_nearest_codes_are_near(self, format, error_bound):
        weight = weights(16, 256)
        value = format.dequantize(format.quantize(weight), 256, torch.float32)
        assert (value - weight).norm() <= error_bound * weight.norm()

    @pytest.mark.parametrize("constant", [0.0, 0.25, -0.25])
    def test_constant_weights_survive(self, format, constant):
        weight = torch.full((2, 128), constant)
        value = format.dequantize(format.quantize(weight), 128, torch.float32)
        assert value.isfinite().all()
        assert_close(value, weight, rtol=0.01, atol=1e-6)

    def test_values_are_rounded_once_to_the_dtype_asked_for(self, format, shape, tensors):
        whole = format.dequantize(tensors, shape[1], torch.float32)
        assert whole.shape == shape and whole.dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(format.dequantize(tensors, shape[1], dtype), whole.to(dtype))

    def test_rows_are_taken_as_they_are_dequantized(self, format, shape, tensors):
        whole = format.dequantize(tensors, shape[1], torch.float32)
        ids = torch.tensor([[0, shape[0] - 1], [1, 0]])
        assert torch.equal(format.take_rows(tensors, ids, shape[1], torch.float32), whole[ids])

    def test_a_slice_of_rows_is_those_rows(self, format, shape, tensors):
        whole = format.dequantize(tensors, shape[1], torch.float32)
        for start in range(0, shape[0], 32):
            stop = min(start + 32, shape[0])
            part = format.rows_of(tensors, start, stop, shape[1])
            assert torch.equal(format.dequantize(part, shape[1], torch.float32), whole[start:stop])

    def test_product_is_the_dequantized_layers(self, format, shape, tensors):
        whole = format.dequantize(tensors, shape[1], torch.float32)
        x, bias = weights(7, shape[1], 4).view(7, 1, -1), weights(1, shape[0], 5)[0]
        assert_close(format.linear(x, tensors, shape[1], bias), nn.functional.linear(x, whole, bias))

    def test_scales_may_be_floats_and_are_differentiable(self, format):
        """What distillation trains: the stored bits as floats give the same weight, and gradients reach them."""
        if not format.floats:
            pytest.skip("no stored floats")
        ids = torch.tensor([[2, 0]])
        tensors = format.quantize(weights(4, 96))
        scales = {s: as_floats(tensors[s], dtype).float().requires_grad_() for s, dtype in format.floats.items()}
        value = format.dequantize(tensors | scales, 96, torch.float32)
        assert torch.equal(value, format.dequantize(tensors, 96, torch.float32))
        assert torch.equal(format.take_rows(tensors | scales, ids, 96, torch.float32), value[ids])
        x = weights(3, 96, 1).requires_grad_()
        expected = torch.autograd.grad(nn.functional.linear(x, value).square().sum(), list(scales.values()))
        for given in (x, x.detach()):  # a kernel without a backward would hand the scales no gradient
            product = format.linear(given, tensors | scales, 96, None)
            found = torch.autograd.grad(product.square().sum(), list(scales.values()))
            assert all((gradient != 0).any() for gradient in found)
            assert_close(found, expected)

    @pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
    def test_a_packed_module_is_saved_and_loaded(self, format, kind):
        def module() -> nn.Module:
            made = nn.Linear(96, 6, bias=False) if kind is nn.Linear else nn.Embedding(6, 96)
            return pack_parameter(made, "weight", format)

        saved, loaded = module(), module()
        assert isinstance(loaded, Packed)
        stored = format.quantize(weights(6, 96))
        saved.load_state_dict({f"weight{suffix}": tensor for suffix, tensor in stored.items()})
        loaded.load_state_dict(load(save(saved.state_dict())))
        value = format.dequantize(stored, 96, torch.float32)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert sum(parameter.nbytes for parameter in loaded.parameters()) == format.nbytes(6, 96)
        assert torch.equal(loaded.dequantized(), value)
        if kind is nn.Embedding:
            assert torch.equal(loaded(torch.tensor([4, 0])), value[[4, 0]])
