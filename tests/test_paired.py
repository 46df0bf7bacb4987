import math

import numpy as np
import pytest
import torch

from bitplan.sensitivity.tasks.paired import Paired, paired, proportion_interval


def as_tensors(base: np.ndarray, other: np.ndarray) -> Paired:
    return paired(torch.from_numpy(base), torch.from_numpy(other))


@pytest.mark.parametrize("pairs", [100, 200, 500])
@pytest.mark.parametrize(
    ("gain", "loss"), [(0.001, 0.001), (0.005, 0.01), (0, 0.02), (0.01, 0.03), (0.02, 0.08), (0.05, 0.25)]
)
def test_marks_cover_a_known_difference(pairs, gain, loss):
    """Marks that agree on 70 to 99.8 of 100 items."""
    generator = np.random.default_rng(pairs)
    drawn = generator.multinomial(pairs, (gain, loss, 1 - gain - loss), size=2000)
    bounds = {key: proportion_interval(*key, pairs) for key in {(int(g), int(b)) for g, b, _ in drawn}}
    covered = sum(bounds[g, b][0] <= gain - loss <= bounds[g, b][1] for g, b, _ in drawn.tolist())
    assert covered / len(drawn) >= 0.93


CONTINUOUS = {
    "normal": (lambda g, n: g.normal(0.05, 1, n), 0.05),
    "long tails": (lambda g, n: g.standard_t(3, n), 0),
    "skewed": (lambda g, n: g.lognormal(0, 1, n), math.exp(0.5)),
    "nats": (lambda g, n: 0.3 * g.exponential(1, n) - 0.1 * g.exponential(1, n), 0.2),
    "few differ": (lambda g, n: (g.random(n) < 0.1) * g.exponential(1, n), 0.1),
}


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_nats_cover_a_known_difference(kind, monkeypatch):
    monkeypatch.setattr("bitplan.sensitivity.tasks.paired.RESAMPLES", 300)
    draw, true = CONTINUOUS[kind]
    generator = np.random.default_rng(0)
    base = generator.exponential(3, 100)
    found = [as_tensors(base, base + draw(generator, 100)) for _ in range(300)]
    assert sum(p.low <= true <= p.high for p in found) / len(found) >= 0.92  # 300 draws are ± 0.025


def test_is_bonett_and_prices_interval():
    # Their formula by hand: 3 gained and 9 lost of 50.
    p, q = 4 / 52, 10 / 52
    reach = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 52)
    assert proportion_interval(3, 9, 50) == pytest.approx((p - q - reach, p - q + reach), abs=1e-6)


def test_means_and_exchange_mirror():
    generator = np.random.default_rng(0)
    for base, other in [
        (generator.integers(0, 2, 80).astype(float), generator.integers(0, 2, 80).astype(float)),
        (generator.lognormal(size=80), generator.lognormal(size=80)),
        (generator.lognormal(size=5), generator.lognormal(size=5)),
    ]:
        one, two = as_tensors(base, other), as_tensors(other, base)
        assert one.difference == pytest.approx(one.mean_other - one.mean_base)
        assert (one.mean_base, one.pairs) == (pytest.approx(base.mean()), len(base))
        assert (one.low, one.high) == pytest.approx((-two.high, -two.low))
        assert one.low < one.difference < one.high
        assert one == as_tensors(base, other)


@pytest.mark.parametrize("values", [[0.0] * 40, [1.0] * 40, [0.0, 1.0] * 20, [2.5] * 40, [1.0, 2.0, 7.0] * 20], ids=str)
def test_where_nothing_differs_something_small_still_may(values):
    found = paired(torch.tensor(values), torch.tensor(values))
    assert found.difference == 0
    assert found.low == -found.high < 0
    assert found.high < 0.25


def test_half_precision_and_whole_numbers_are_taken():
    assert paired(torch.tensor([0, 1, 1]), torch.tensor([True, True, True])).difference == pytest.approx(1 / 3)
    assert paired(torch.ones(30).half(), torch.ones(30).half() * 2).difference == 1


@pytest.mark.parametrize(
    ("base", "other"), [([1.0, 2.0], [math.inf, 2.0]), ([1.0, 2.0], [math.nan, 2.0]), ([2.5], [3.5])]
)
def test_says_nothing_where_nothing_can_be_said(base, other):
    found = paired(torch.tensor(base), torch.tensor(other))
    assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(("one", "two"), [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_refuses_what_has_no_pairs(one, two):
    with pytest.raises(ValueError, match="one length"):
        paired(torch.zeros(one), torch.zeros(two))
