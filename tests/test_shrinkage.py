"""Second moments of few tokens, shrunk: the formula against one written with all products at once, and what for."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bitplan.formats.rounding.gptq import Hessian, gptq
from bitplan.formats.table import format_named
from bitplan.sensitivity.shrinkage import SAMPLE, SecondMoments


def shrunk(runs: list[Tensor], true: list[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
    """E[x xᵀ] and E[x0 xᵀ] of inputs [tokens, columns], in any pieces."""

    def samples(parts: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.cat(parts).double().split(SAMPLE)

    def mean(products: Tensor, kept: Tensor) -> Tensor:
        """`kept`: entries that are not shrunk."""
        size = samples(runs)[0].square().mean(0)
        scale = (size + 1e-3 * size.mean()).rsqrt()
        scaled = products * scale * scale[:, None] * ~kept
        mean = scaled.mean(0)
        variance = scaled.var(0).sum() / len(products) if len(products) > 1 else torch.tensor(0.0)
        rho = (variance / mean.square().sum()).clamp(0, 1)
        return torch.where(kept, products.sum(0), (1 - rho) * products.sum(0)) / sum(map(len, runs))

    xs = samples(runs)
    eye = torch.eye(xs[0].shape[1], dtype=torch.bool)
    moment = mean(torch.stack([x.T @ x for x in xs]), eye)
    if true is None:
        return moment.float(), None
    changes = torch.stack([(x0 - x).T @ x for x, x0 in zip(xs, samples(true), strict=True)])
    return moment.float(), (moment + mean(changes, eye & False)).float()


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Of correlated columns of different sizes, a few of which rarely have any."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=torch.Generator().manual_seed(1)) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + mixing)
    x *= torch.linspace(0.1, 3, columns)
    x[:, :3] *= torch.rand(tokens, 1, generator=generator) < 0.1
    return x


def sums(runs: list[Tensor], true: list[Tensor] | None = None) -> SecondMoments:
    moments = SecondMoments(1, runs[0].shape[1], crossed=true is not None)
    for i, x in enumerate(runs):
        moments.add(x, true=true[i] if true else None)
    return moments


@pytest.mark.parametrize("tokens", [[2048, 700], [40, 40, 40, 17], [1, 256, 257], [100]])
@pytest.mark.parametrize("columns", [24, 600])
def test_means_follow_the_formula(tokens, columns):
    runs = [inputs(n, columns, seed) for seed, n in enumerate(tokens)]
    true = [x + 0.1 * inputs(len(x), columns, 9) for x in runs]
    moment, crossed = sums(runs, true).means()
    expected, expected_crossed = shrunk(runs, true)
    size = float(expected.diagonal().max())
    assert_close(moment[0], expected, rtol=1e-3, atol=1e-5 * size)
    assert_close(crossed, expected_crossed, rtol=1e-3, atol=1e-5 * size)
    assert torch.equal(moment[0], moment[0].T)
    assert sums(runs).means()[1] is None
    assert_close(sums(runs).means(10)[0] * 10, sums(runs).means()[0] * sum(tokens))


def test_experts_have_their_own(tokens=300):
    parts = [inputs(tokens, 32, seed) for seed in range(4)]
    moments = SecondMoments(3, 32)
    for i, x in enumerate(parts):
        moments.add(x, i % 2)
        moments.add(x[:0], 2)  # no token reached it
    found, _ = moments.means()
    for expert in range(2):
        assert_close(found[expert], shrunk(parts[expert::2])[0], rtol=1e-3, atol=1e-4)
    assert not found[2].any()


def test_what_samples_agree_on_stays_and_what_they_do_not_goes():
    x = inputs(SAMPLE, 32)
    assert_close(sums([x] * 6).means()[0][0], x.T @ x / SAMPLE, rtol=1e-3, atol=1e-4)
    independent = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    found = sums([independent]).means()[0][0]
    plain = independent.T @ independent / 1024
    off = ~torch.eye(64, dtype=torch.bool)
    assert found[off].square().sum() < 0.05 * plain[off].square().sum()
    assert_close(found.diagonal(), plain.diagonal())


def test_columns_without_inputs_stay_without():
    x = inputs(600, 32)
    x[:, 5] = 0
    found = sums([torch.zeros(300, 32), x]).means()[0][0]
    assert found.isfinite().all()
    assert not found[5].any()
    assert Hessian(found).dead.tolist() == [i == 5 for i in range(32)]


def topics(tokens: int, seed: int, columns: int = 192) -> Tensor:
    """Inputs as a text has them: 64 tokens at a time lie mostly in 8 of 64 × 8 directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, 8, columns, generator=torch.Generator().manual_seed(1)) / 2**0.5
    chosen = directions[torch.randint(0, 64, (tokens // 64,), generator=generator)]
    inside = torch.randn(tokens // 64, 64, 8, generator=generator) @ chosen
    return inside.flatten(0, 1) + torch.randn(tokens, columns, generator=generator)


def test_gptq_by_few_tokens_loses_less_on_others():
    """Also where it aims at full-precision inputs, here with noise that cannot be foretold."""
    x, others = topics(2048, 0), topics(20_480, 7)
    x0 = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    weight, format = torch.randn(256, 192, generator=torch.Generator().manual_seed(4)), format_named("int3-g64")

    def loss(moment: Tensor, crossed: Tensor | None = None) -> float:
        value = format.dequantize(gptq(weight, format, [Hessian(moment, crossed)]), 192, torch.float32)
        return float((others @ (weight - value).T).square().mean())

    moment, crossed = sums([x], [x0]).means()
    plain = x.T @ x / len(x)
    assert loss(moment[0]) < 0.9 * loss(plain)
    assert loss(moment[0], crossed) < 0.6 * loss(plain, x0.T @ x / len(x))
