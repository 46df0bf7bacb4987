import pytest
import torch

from bitplan.formats.double_quant import DoubleQuantFormat
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.rounding import Hessian, tuned
from bitplan.formats.rounding.gptq import gptq_codes
from bitplan.formats.rounding.tuned import CLIP, FROM_CODES, FROM_WEIGHTS, Learned, tune

FORMATS = [
    IntegerFormat("asymmetric", 3, group=32),
    IntegerFormat("integer-2", 2, group=64),
    IntegerFormat("symmetric", 4, group=0, zero_point="symmetric"),
    IntegerFormat("mid_rise", 1, group=32, zero_point="mid_rise"),
    IntegerFormat("mid_rise-2", 2, group=64, zero_point="mid_rise"),
    IntegerFormat("float_zero", 3, group=32, zero_point="float_zero"),
    DoubleQuantFormat("double", 4, group=32),
]
COLUMNS = 80  # the last group is a shorter one


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FORMATS, ids=lambda format: format.name)
def format(request):
    return request.param


@pytest.fixture
def x():
    return randn(300, COLUMNS, seed=0) @ randn(COLUMNS, COLUMNS, seed=1)


@pytest.fixture
def weight():
    return randn(6, COLUMNS, seed=2) * 0.1


@pytest.fixture
def begun(format, weight, x):
    """(GPTQ's codes, grid, what it aimed at)."""
    return gptq_codes(weight, format, [Hessian(x.T @ x / len(x))])


def wandered(learned: Learned, steps: int = 12) -> Learned:
    """Somewhere else, after random steps."""
    for seed in range(steps):
        for i, parameter in enumerate(learned.parameters):
            parameter.data += 0.05 * randn(*parameter.shape, seed=10 * seed + i)
        learned.limit()
    return learned


def test_it_starts_at_gptqs_codes_and_grid(format, begun):
    codes, grid, aimed = begun
    learned = Learned(format, aimed, grid)
    assert torch.equal(learned.codes()[0], codes)
    assert torch.equal(learned.grid().scale, grid.scale)
    assert torch.equal(learned.grid().zero, grid.zero)
    stored = format.store(codes, grid)
    assert all(torch.equal(tensor, stored[suffix]) for suffix, tensor in learned.tensors().items())


def test_from_weights_it_starts_at_the_nearest_codes_and_stays_beside_the_weights(format, weight):
    grid = format.fitted_grids(weight, torch.ones(COLUMNS))
    learned = Learned(format, weight, grid, FROM_WEIGHTS)
    wide = Grid(format.over_columns(grid.scale, COLUMNS), format.over_columns(grid.zero, COLUMNS))
    assert torch.equal(learned.codes()[0], format.encode(weight, wide))
    wandered(learned, 25)
    codes, wide = learned.codes()
    place = (weight / wide.scale.clamp(min=1e-9) + wide.zero).clamp(0, format.top)
    assert ((codes - place).abs() <= 1 + 1e-4).all()


@pytest.mark.parametrize("steps", [0, 25])
def test_what_is_stored_is_what_was_learned_to_the_bit(format, begun, steps):
    codes, grid, aimed = begun
    learned = wandered(Learned(format, aimed, grid), steps)
    assert torch.equal(format.dequantize(learned.tensors(), COLUMNS, torch.float32), learned.weight())
    assert torch.equal(learned.codes()[0], codes) == (steps == 0)


def test_a_group_of_nothing_starts_and_stays_nothing(format):
    aimed = randn(4, COLUMNS, seed=3)
    aimed[1] = 0
    learned = wandered(Learned(format, aimed, format.fitted_grids(aimed, torch.ones(COLUMNS))))
    assert learned.weight().isfinite().all()
    assert (learned.weight()[1] == 0).all()


def test_gradients_reach_everything_and_limits_hold(format, begun, weight, x):
    _, grid, aimed = begun
    learned = Learned(format, aimed, grid)
    ((learned.weight() - weight) @ x.T).square().mean().backward()
    offset, low, high = learned.parameters
    assert (offset.grad != 0).any() and (high.grad != 0).any()
    assert (low.grad is not None and bool((low.grad != 0).any())) == (format.zero_point in ("asymmetric", "float_zero"))
    with torch.no_grad():
        offset += 10
        low -= 10
        high += 10
    learned.limit()
    assert (offset == FROM_CODES.offset).all() and (low == CLIP[0]).all() and (high == CLIP[1]).all()


class TestTune:
    @pytest.fixture
    def learned(self, begun, format):
        _, grid, aimed = begun
        return Learned(format, aimed, grid)

    @pytest.fixture
    def loss(self, learned, weight, x):
        return lambda: ((learned.weight() - weight) @ x.T).square().mean()

    def test_it_lessens_the_loss(self, learned, loss):
        start = float(loss().detach())
        tune([learned], lambda _: loss(), lambda: float(loss().detach()), 60)
        assert float(loss().detach()) <= start

    def test_from_nearest_it_learns_what_inputs_ask_for(self, format, weight, x):
        x = x + 20 * randn(300, 1, seed=6)  # a direction that all columns share
        learned = Learned(format, weight, format.fitted_grids(weight, torch.ones(COLUMNS)))

        def loss() -> torch.Tensor:
            return ((learned.weight() - weight) @ x.T).square().mean()

        start = float(loss().detach())
        tune([learned], lambda _: loss(), lambda: float(loss().detach()), 100)
        assert float(loss().detach()) < 0.8 * start

    def test_a_loss_that_only_grows_gives_back_the_start(self, learned, loss, begun, format):
        codes, grid, _ = begun
        start = format.store(codes, grid)
        tune([learned], lambda _: -loss(), lambda: float(loss().detach()), 60)
        assert all(torch.equal(tensor, start[suffix]) for suffix, tensor in learned.tensors().items())

    def test_the_best_look_is_kept_not_the_last(self, learned, loss, monkeypatch):
        monkeypatch.setattr(tuned, "CHECKED", 10)
        seen: list[tuple[float, torch.Tensor]] = []

        def whole() -> float:
            loss = [5.0, 4.0, 1.0, 3.0, 2.0][len(seen)]
            seen.append((loss, learned.weight().detach().clone()))
            return loss

        tune([learned], lambda _: loss(), whole, 40)
        assert len(seen) == 5
        assert torch.equal(learned.weight(), seen[2][1])
        assert not torch.equal(seen[2][1], seen[4][1])


def test_grids_stay_within_their_codes():
    format = IntegerFormat("", 2, group=32)
    learned = wandered(Learned(format, randn(3, 64, seed=5), Grid(torch.full((3, 2), 0.3), torch.full((3, 2), 3.0))))
    grid = learned.grid()
    assert torch.equal(grid.zero, grid.zero.round().clamp(0, 3))
    assert torch.equal(grid.scale, grid.scale.half().float())
