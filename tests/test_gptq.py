import sys
from operator import attrgetter

import pytest
import torch
from torch.testing import assert_close

from bitplan.formats.errors import RoundingFailed
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.rounding import ROUNDINGS, Hessian
from bitplan.formats.rounding.gptq import AIM_DAMPING, DAMPING, gptq, gptq_codes
from bitplan.formats.table import FORMATS, format_named
from bitplan.testing import RoundingTests


def inputs(columns: int, tokens: int = 600) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)


def over_columns(format: IntegerFormat, grid: Grid, columns: int) -> Grid:
    """A grid per column, by hand."""
    group = torch.arange(columns) // (format.group or columns)
    return Grid(grid.scale[:, group], grid.zero[:, group])


def on_fitted_grids(weight: torch.Tensor, format: IntegerFormat, importance: torch.Tensor) -> torch.Tensor:
    """Every weight's nearest value on the grids that were fitted beforehand."""
    grid = over_columns(format, format.fitted_grids(weight, importance), weight.shape[1])
    return format.decode(format.encode(weight, grid), grid)


def by_explicit_inverses(weight: torch.Tensor, matrix: torch.Tensor, format: IntegerFormat) -> torch.Tensor:
    """Optimal brain quantization by falling diagonal on grids set beforehand: the inverse Hessian of what is left,
    formed anew at every column."""
    columns = weight.shape[1]
    order = sorted(range(columns), key=lambda column: -float(matrix[column, column]))
    grid = over_columns(format, format.fitted_grids(weight, matrix.diagonal()), columns)
    matrix = matrix.double() + DAMPING[0] * matrix.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    left, value = weight.double().clone(), torch.zeros_like(weight)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(matrix[rest][:, rest])
        here = Grid(grid.scale[:, column], grid.zero[:, column])
        value[:, column] = format.decode(format.encode(left[:, column].float(), here), here)
        error = (left[:, column] - value[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0][None]
    return value


class TestGptq(RoundingTests):
    @pytest.fixture
    def rounding(self):
        return ROUNDINGS["gptq"]

    @pytest.fixture(
        params=[format for format in FORMATS.values() if ROUNDINGS["gptq"].fits(format)], ids=attrgetter("name")
    )
    def format(self, request):
        return request.param


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


def test_codes_are_nearest_to_what_was_aimed_at_on_grids_set_beforehand():
    x, format = inputs(160), format_named("int3-g64")
    weight, hessian = torch.randn(6, 160, generator=torch.Generator().manual_seed(7)), Hessian(x.T @ x / len(x))
    codes, grid, aimed = gptq_codes(weight, format, [hessian])
    fitted = format.fitted_grids(weight, hessian.matrix.diagonal())
    assert torch.equal(grid.scale, fitted.scale) and torch.equal(grid.zero, fitted.zero)
    assert torch.equal(codes, format.encode(aimed, over_columns(format, grid, 160)))
    first = int(hessian.matrix.diagonal().argmax())  # the first to be rounded has taken no error of others
    assert torch.equal(aimed[:, first], weight[:, first])
    assert not torch.equal(aimed, weight)


@pytest.mark.parametrize("name", ["int2-g32", "int3-g64", "int4-g128", "int8", "binary-g64"])
def test_outputs_are_nearer_than_nearest(name):
    x, format = inputs(192), format_named(name)
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(2))
    matrix = x.T @ x / len(x)
    value = format.dequantize(gptq(weight, format, [Hessian(matrix)]), 192, torch.float32)
    # Nearest on the same clipped grids: what is left is what the passing on of errors brings.
    for other in (
        format.dequantize(format.quantize(weight), 192, torch.float32),
        on_fitted_grids(weight, format, matrix.diagonal()),
    ):
        assert ((value - weight) @ x.T).norm() < 0.95 * ((other - weight) @ x.T).norm()


def test_an_identity_hessian_gives_nearest():
    weight, format = torch.randn(5, 128, generator=torch.Generator().manual_seed(4)), format_named("int3-g64")
    rounded = format.dequantize(gptq(weight, format, [Hessian(torch.eye(128))]), 128, torch.float32)
    assert torch.equal(rounded, on_fitted_grids(weight, format, torch.ones(128)))


def test_dead_columns_become_zero_and_harm_nothing():
    x, format = inputs(96), format_named("int4-g32")
    x[:, 10:14] = 0
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(5))
    for hessian in (Hessian(x.T @ x), Hessian(x.T @ x, x.T @ x)):
        value = format.dequantize(gptq(weight, format, [hessian]), 96, torch.float32)
        assert (value[:, 10:14] == 0).all()
        assert value.isfinite().all()
        assert ((value - weight) @ x.T).norm() < 0.2 * (weight @ x.T).norm()
    # Columns without inputs bend no grid: all others are rounded as if those held nothing.
    weight[:, 10:14] = 1e6
    again = format.dequantize(gptq(weight, format, [Hessian(x.T @ x)]), 96, torch.float32)
    assert torch.equal(again, value)


class TestAim:
    """The full-precision model's inputs x0, and x, which its rounded twin gets."""

    @pytest.fixture
    def x0(self):
        return inputs(48)

    @pytest.fixture
    def x(self, x0):
        return x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(8)) * x0.std() * 0.5

    @pytest.mark.parametrize("dead", [[], [0, 17, 18]], ids=["all-alive", "some-dead"])
    def test_is_the_least_squares_solution_with_a_ridge(self, x0, x, dead):
        x[:, dead] = 0
        weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(9))
        aim = Hessian(x.T @ x / len(x), x0.T @ x / len(x)).aim
        alive = [column for column in range(48) if column not in dead]
        ridge = AIM_DAMPING * x.double().square().mean(0)[alive].mean()
        # Ridge regression towards `weight` is plain least squares with a row more for every column.
        more = (ridge * len(x)).sqrt() * torch.eye(48, dtype=torch.float64)
        left, right = torch.cat((x.double(), more)), torch.cat((x0.double(), more)) @ weight.double().T
        expected = torch.linalg.lstsq(left, right).solution.T
        assert_close(weight + weight @ aim, expected.float(), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(expected.float(), weight, atol=0.05)

    def test_is_nothing_where_inputs_are_the_same(self, x):
        assert_close(Hessian(x.T @ x, x.T @ x).aim, torch.zeros(48, 48))
        assert Hessian(x.T @ x).aim is None

    def test_outputs_are_nearer_to_the_full_precision_models(self, x0, x):
        weight, format = torch.randn(16, 48, generator=torch.Generator().manual_seed(10)), format_named("int4-g32")
        matrix, cross = x.T @ x / len(x), x0.T @ x / len(x)

        def error(hessian: Hessian) -> torch.Tensor:
            value = format.dequantize(gptq(weight, format, [hessian]), 48, torch.float32)
            return (x @ value.T - x0 @ weight.T).norm()

        assert error(Hessian(matrix, cross)) < 0.9 * error(Hessian(matrix))


def test_a_hessian_beyond_damping_is_an_error():
    with pytest.raises(RoundingFailed, match="positive definite"):
        _ = Hessian(torch.tensor([[1.0, 50.0], [50.0, 1.0]])).factor
    with pytest.raises(RoundingFailed, match="NaN"):
        _ = Hessian(torch.full((2, 2), float("nan"))).factor
    with pytest.raises(RoundingFailed, match="NaN"):
        _ = Hessian(torch.full((2, 2), float("nan")), torch.eye(2)).aim


def test_rows_in_slices_have_the_codes_of_all_rows_at_once(monkeypatch):
    weight = torch.randn(101, 96, generator=torch.Generator().manual_seed(1))
    x = inputs(96)
    hessians = [Hessian(x.T @ x / len(x))]
    for name in ("int4-g32", "int3-g32"):
        codes, grid, _ = gptq_codes(weight, format_named(name), hessians)
        whole = format_named(name).store(codes, grid)
        monkeypatch.setattr(sys.modules[gptq.__module__], "SLICE", 4 * 96 * 7)
        assert_close(gptq(weight, format_named(name), hessians), whole, rtol=0, atol=0)
