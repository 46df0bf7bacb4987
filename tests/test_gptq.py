import pytest
import torch
from torch.testing import assert_close

from formats.errors import RoundingFailed
from formats.rounding import Hessian
from formats.rounding.gptq import DAMPING, gptq
from formats.table import format_named


def inputs(columns: int, tokens: int = 600) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)


def by_explicit_inverses(weight: torch.Tensor, matrix: torch.Tensor, format) -> torch.Tensor:
    """Optimal brain quantization in a fixed order: the inverse Hessian of what is left, formed anew at every column."""
    columns = weight.shape[1]
    matrix = matrix.double() + DAMPING[0] * matrix.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    left, value = weight.double().clone(), torch.zeros_like(weight)
    for column in range(columns):
        if column % format.group == 0:
            grid = format.grid(left[:, column : column + format.group].float())
        inverse = torch.linalg.inv(matrix[column:, column:])
        code = format.encode(left[:, column : column + 1].float(), grid)
        value[:, column] = ((code - grid.zero) * grid.scale)[:, 0]
        error = (left[:, column] - value[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0][None]
    return value


@pytest.mark.parametrize("columns", [64, 160, 300])
def test_equals_brain_surgery_with_explicit_inverses(columns):
    x = inputs(columns)
    matrix = x.T @ x / len(x)
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(1))
    format = format_named("int4-g64")
    value = format.dequantize(gptq(weight, format, [Hessian(matrix)]), columns, torch.float32)
    expected = by_explicit_inverses(weight, matrix, format)
    # A code on the edge between two may fall either way; everything else agrees.
    same = torch.isclose(value, expected, rtol=1e-3, atol=1e-3)
    assert same.float().mean() > 0.97
    error, other = ((value - weight) @ x.T).norm(), ((expected - weight) @ x.T).norm()
    assert_close(error, other, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["int2-g32", "int3-g64", "int4-g128", "int8", "binary-g64"])
def test_outputs_are_nearer_than_nearest(name):
    x, format = inputs(192), format_named(name)
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(2))

    def error(tensors):
        return ((format.dequantize(tensors, 192, torch.float32) - weight) @ x.T).norm()

    assert error(gptq(weight, format, [Hessian(x.T @ x / len(x))])) < 0.95 * error(format.quantize(weight))


def test_an_identity_hessian_gives_nearest():
    weight, format = torch.randn(5, 128, generator=torch.Generator().manual_seed(4)), format_named("int3-g64")
    rounded = gptq(weight, format, [Hessian(torch.eye(128))])
    nearest = format.quantize(weight)
    assert all(torch.equal(rounded[suffix], nearest[suffix]) for suffix in nearest)


def test_dead_columns_become_zero_and_harm_nothing():
    x, format = inputs(96), format_named("int4-g32")
    x[:, 10:14] = 0
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(5))
    value = format.dequantize(gptq(weight, format, [Hessian(x.T @ x)]), 96, torch.float32)
    assert (value[:, 10:14] == 0).all()
    assert value.isfinite().all()
    assert ((value - weight) @ x.T).norm() < 0.2 * (weight @ x.T).norm()


def test_each_expert_has_its_own_hessian():
    x, y, format = inputs(64), inputs(64).flip(1), format_named("int3-g32")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(6))
    hessians = [Hessian(x.T @ x), Hessian(y.T @ y)]
    together = format.dequantize(gptq(weight, format, hessians), 64, torch.float32)
    apart = [
        format.dequantize(gptq(w, format, [h]), 64, torch.float32)
        for w, h in zip(weight.split(4), hessians, strict=True)
    ]
    assert torch.equal(together, torch.cat(apart))


def test_a_hessian_beyond_damping_is_an_error():
    with pytest.raises(RoundingFailed, match="positive definite"):
        _ = Hessian(torch.tensor([[1.0, 50.0], [50.0, 1.0]])).factor
    with pytest.raises(RoundingFailed, match="NaN"):
        _ = Hessian(torch.full((2, 2), float("nan"))).factor
