import pytest
import torch
from torch.testing import assert_close

from bitplan.formats.rounding import awq
from bitplan.formats.rounding.awq import EXPONENTS, clipped_codes, search_scale
from bitplan.formats.table import format_named

COLUMNS = 96


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x():
    """Inputs, a few of whose columns are large."""
    return randn(400, COLUMNS, seed=0) * torch.where(torch.arange(COLUMNS) % 16 == 0, 30.0, 1.0)


def output_error(x, weights, formats, scale) -> float:
    """Summed squared error of the outputs per token, with each weight rounded at its scale: by running the inputs."""
    total = 0.0
    for weight, format in zip(weights, formats, strict=True):
        codes, grid = clipped_codes(weight * scale, format, (x / scale).square().mean(0))
        stored = format.store(codes, grid)
        value = format.dequantize(stored, COLUMNS, torch.float32)
        total += float((((x / scale) @ value.T) - x @ weight.T).square().sum(-1).mean())
    return total


@pytest.mark.parametrize("names", [("int3-g32",), ("int4-g64", "int2-g32"), ("int8",)], ids="+".join)
def test_the_scale_is_the_best_of_all_exponents_by_running_them(x, names):
    weights = [randn(12, COLUMNS, seed=i + 1) for i in range(len(names))]
    formats = [format_named(name) for name in names]
    moment = x.T @ x / len(x)
    size = x.square().mean(0).sqrt()
    tried = []
    for exponent in EXPONENTS:
        scale = size**exponent
        tried.append(scale / (scale.max() * scale.min()).sqrt())
    errors = [output_error(x, weights, formats, scale) for scale in tried]
    found = search_scale(weights, formats, moment)
    best = min(range(len(tried)), key=errors.__getitem__)
    assert output_error(x, weights, formats, found) == pytest.approx(errors[best], rel=1e-3)
    assert_close(found, tried[best], rtol=1e-4, atol=0)


def test_columns_that_matter_are_scaled_up_and_lose_less(x):
    weight, format = randn(24, COLUMNS, seed=2), format_named("int3-g32")
    scale = search_scale([weight], [format], x.T @ x / len(x))
    assert scale[::16].min() > scale[1:16].max()
    assert output_error(x, [weight], [format], scale) < output_error(x, [weight], [format], torch.ones(COLUMNS))


def test_ones_where_no_exponent_helps(x, monkeypatch):
    weight, format, moment = randn(8, COLUMNS, seed=3), format_named("int3-g32"), x.T @ x / len(x)
    assert not torch.equal(search_scale([weight], [format], moment), torch.ones(COLUMNS))
    # Inputs that are all alike have one scale only; and where rounding loses nothing, none is better than ones.
    assert torch.equal(search_scale([weight], [format], torch.eye(COLUMNS)), torch.ones(COLUMNS))
    monkeypatch.setattr(awq, "rounded", lambda weight, *_: weight)
    assert torch.equal(search_scale([weight], [format], torch.diag(moment.diagonal())), torch.ones(COLUMNS))


def test_a_column_without_inputs_breaks_nothing(x):
    x[:, 3] = 0
    weight, format = randn(8, COLUMNS, seed=4), format_named("int3-g32")
    scale = search_scale([weight], [format], x.T @ x / len(x))
    assert scale.isfinite().all() and (scale > 0).all()
    assert output_error(x, [weight], [format], scale) <= output_error(x, [weight], [format], torch.ones(COLUMNS))
