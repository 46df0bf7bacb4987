"""The difference that a change of precision makes on the same items, and an interval for it.

Values of 0 and 1 get Bonett and Price's adjusted Wald interval, all others a bootstrap-t interval: both hold about
what they promise where difference ± 1.96 standard errors does not: with few pairs that differ, or skewed differences.
May import: numpy, scipy, torch.
"""

from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist

import numpy as np
from scipy import stats
from torch import Tensor

RESAMPLES = 2000
FEWEST = 20
"""Pairs below which resamples say too little of the tails, and Student's t interval is given."""
AT_ONCE = 1 << 22
"""Values of resamples in memory at a time."""


@dataclass(frozen=True)
class Paired:
    """Means over the same items, and an interval for the difference, in the values' unit.

    `difference` is `mean_other - mean_base`; `low` and `high` are infinite where nothing can be said: one pair of
    values that are not 0 or 1, or a value that is not finite.
    """

    pairs: int
    mean_base: float
    mean_other: float
    difference: float
    low: float
    high: float
    level: float = 0.95


def paired(base: Tensor, other: Tensor, level: float = 0.95) -> Paired:
    """Compare two models' values, [items] of any real dtype, item by item; the population is that of such items.

    Where both are all 0 or 1: `proportion_interval`. Where all differ by the same, or none does: `unseen_reach`. Else,
    with FEWEST pairs or more, `bootstrap_interval`, and with fewer Student's t. The same input gives the same interval,
    and exchanging the two mirrors it. Raises ValueError for shapes that differ or hold nothing.
    """
    if base.shape != other.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"paired values must be two vectors of one length, not {[*base.shape]} and {[*other.shape]}")
    x, y = (values.detach().cpu().double().numpy() for values in (base, other))
    d = y - x
    if not np.isfinite(d).all():
        low, high = -inf, inf
    elif np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all():
        low, high = proportion_interval(int((d > 0).sum()), int((d < 0).sum()), len(d), level)
    elif (d == d[0]).all() and len(d) > 1:
        reach = unseen_reach(float(x.std() or abs(x[0])), len(d), level)
        low, high = d[0] - reach, d[0] + reach
    elif len(d) < FEWEST:
        low, high = _student_interval(d, level)
    else:
        low, high = bootstrap_interval(d, level)
    return Paired(len(d), float(x.mean()), float(y.mean()), float(d.mean()), float(low), float(high), level)


def proportion_interval(gained: int, lost: int, pairs: int, level: float = 0.95) -> tuple[float, float]:
    """An interval for the difference of two paired proportions, where `gained` pairs went from 0 to 1 and `lost` from
    1 to 0.

    Bonett and Price (2012), Journal of Educational and Behavioral Statistics 37: with p = (gained + 1) / (n + 2) and
    q = (lost + 1) / (n + 2), p - q ± z √((p + q - (p - q)²) / (n + 2)), within -1 and 1. No gain and no loss gives
    about ± 2.8 / (n + 2). Of the intervals with a closed form, Fagerland, Lydersen and Laake (2014), Statistics in
    Medicine 33, recommend this one.
    """
    p, q = (gained + 1) / (pairs + 2), (lost + 1) / (pairs + 2)
    reach = NormalDist().inv_cdf((1 + level) / 2) * sqrt((p + q - (p - q) ** 2) / (pairs + 2))
    return max(-1.0, p - q - reach), min(1.0, p - q + reach)


def unseen_reach(spread: float, pairs: int, level: float = 0.95) -> float:
    """How far the mean may lie from a difference that all pairs have: spread (1 - (1 - level)^(1/n)), of the values'
    standard deviation (or size, where all are the same).

    At most so large a part of all pairs differs in another way, or one of n would likely have shown it (Clopper and
    Pearson 1934; "the rule of three", 3/n at 0.95). How far those lie off was not seen: as far as items do
    is our guess.
    """
    return spread * (1 - (1 - level) ** (1 / pairs))


def bootstrap_interval(d: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """An interval for the mean of differences, float64 [pairs], by the bootstrap-t: mean - t* s / √n, where t* are
    quantiles of (mean* - mean) √n / s* over RESAMPLES resamples with a fixed seed (Efron 1981; second-order correct,
    Hall 1988, Annals of Statistics 16). Never narrower at either side than Student's t.

    That last part is ours: where few pairs differ, or tails are long, resamples alone see too little of them.
    """
    n, mean = len(d), d.mean()
    generator = np.random.default_rng(0)
    studentised: list[np.ndarray] = []
    left = RESAMPLES
    while left:
        rows = min(left, max(1, AT_ONCE // n))
        drawn = d[generator.integers(n, size=(rows, n))]
        means, spread = drawn.mean(1), drawn.std(1, ddof=1)
        some = spread > 1e-9 * d.std()
        studentised.append((means[some] - mean) / (spread[some] / sqrt(n)))
        left -= rows
    below, above = np.quantile(np.concatenate(studentised), ((1 - level) / 2, (1 + level) / 2))
    error = d.std(ddof=1) / sqrt(n)
    low, high = _student_interval(d, level)
    return min(low, float(mean - above * error)), max(high, float(mean - below * error))


def _student_interval(d: np.ndarray, level: float) -> tuple[float, float]:
    if len(d) < 2:
        return -inf, inf
    reach = float(stats.t.ppf((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / sqrt(len(d)))
    return float(d.mean()) - reach, float(d.mean()) + reach
