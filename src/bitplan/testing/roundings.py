"""Conformance tests for a rounding that rounds one weight alone. May import: formats."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bitplan.formats.base import Format, Tensors
from bitplan.formats.rounding import Hessian, Rounding
from bitplan.formats.table import DEFAULT_FORMATS, format_named
from bitplan.testing.formats import specs_of, weights


def hessian(columns: int, seed: int = 1, dead: Sequence[int] = ()) -> Hessian:
    """The second moment of correlated inputs of `columns` features, those in `dead` always zero."""
    x = weights(4 * columns, columns, seed) @ weights(columns, columns, seed + 1) + weights(4 * columns, columns, seed)
    x[:, list(dead)] = 0
    return Hessian(x.T @ x / len(x))


def loss(value: Tensor, weight: Tensor, hessian: Hessian) -> Tensor:
    """The output's mean squared error tr(ΔW H ΔWᵀ), for values and weights [rows, columns]."""
    change = (value - weight).double()
    return ((change @ hessian.matrix.double()) * change).sum()


class RoundingTests:
    """What everything else takes for granted of a `Rounding` with `alone`. Give the fixture `rounding`; override the
    parameters of `format` to test it on other formats than a plan's default ones."""

    @pytest.fixture
    def rounding(self) -> Rounding:
        raise NotImplementedError("override the fixture `rounding` with the rounding to test")

    @pytest.fixture(params=DEFAULT_FORMATS)
    def format(self, request: pytest.FixtureRequest) -> Format:
        return format_named(request.param)

    @pytest.fixture
    def quantize(self, rounding: Rounding, format: Format):
        """quantize(weight [experts * rows, columns], hessians) → stored tensors."""
        if not rounding.fits(format):
            pytest.skip(f"{rounding.name} does not round {format.name}")

        def quantize(weight: Tensor, hessians: Sequence[Hessian]) -> Tensors:
            assert rounding.alone is not None
            return rounding.alone(weight, format, hessians if rounding.needs_text else [])

        return quantize

    @pytest.mark.parametrize("shape", [(5, 172), (3, 33)], ids=["5x172", "3x33"])
    def test_tensors_are_the_formats_the_same_each_time(self, quantize, format, shape):
        weight, inputs = weights(*shape), hessian(shape[1])
        tensors = quantize(weight, [inputs])
        assert specs_of(tensors) == format.specs(*shape)
        assert torch.equal(weight, weights(*shape))  # the weight given is left as it was
        again = quantize(weight, [inputs])
        assert all(torch.equal(tensor, again[suffix]) for suffix, tensor in tensors.items())

    @pytest.mark.parametrize("dead", [(), (0, 40, 41)], ids=["all-inputs", "dead-inputs"])
    def test_outputs_are_no_further_than_nearests(self, quantize, format, dead):
        weight, inputs = weights(8, 96), hessian(96, dead=dead)
        value = format.dequantize(quantize(weight, [inputs]), 96, torch.float32)
        nearest = format.dequantize(format.quantize(weight), 96, torch.float32)
        assert value.isfinite().all()
        assert loss(value, weight, inputs) <= loss(nearest, weight, inputs)

    def test_each_expert_has_its_own_hessian(self, quantize, format):
        weight, inputs = weights(8, 64, 6), [hessian(64), hessian(64, 7)]
        together = format.dequantize(quantize(weight, inputs), 64, torch.float32)
        apart = [quantize(part, [own]) for part, own in zip(weight.split(4), inputs, strict=True)]
        assert torch.equal(together, torch.cat([format.dequantize(part, 64, torch.float32) for part in apart]))
