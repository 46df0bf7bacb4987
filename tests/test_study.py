import pytest

from bitplan.formats.scheme import QuantScheme
from bitplan.search.knapsack import Option, solve
from bitplan.search.study import bend, role, search

CHOICES = [QuantScheme(f"int{bits}-g64", "gptq") for bits in (2, 3, 4, 6)]
PROBLEM = {
    f"model.layers.{layer}.{part}": [
        Option(choice, size, (layer + 1) * weight * 4.0**-i)
        for i, (choice, size) in enumerate(zip(CHOICES, (2, 3, 4, 6), strict=True))
    ]
    for layer in range(4)
    for part, weight in (("attn.q_proj", 1.0), ("mlp.down_proj", 3.0))
}
BUDGET = 28


def evaluate(allocation):
    """Truth differs from the prediction: attention matters more than it was said to."""
    return sum(
        (10 if "attn" in group else 1) * next(o.loss for o in PROBLEM[group] if o.scheme == choice)
        for group, choice in allocation.items()
    )


def test_candidates_fit_and_the_first_is_the_knapsacks_own(tmp_path):
    seen = []
    best, exact = search(
        PROBLEM, BUDGET, lambda a: seen.append(a) or evaluate(a), trials=25, journal=tmp_path / "j", name="s"
    )
    assert exact == solve(PROBLEM, BUDGET)
    assert seen[0] == exact.allocation
    sizes = [sum(next(o.nbytes for o in PROBLEM[g] if o.scheme == c) for g, c in a.items()) for a in seen]
    assert max(sizes) <= BUDGET
    assert best.loss == min(map(evaluate, seen)) == evaluate(best.allocation)
    assert best.loss < evaluate(exact.allocation)  # it learned what the prediction had wrong
    assert len({tuple(a.values()) for a in seen}) == len(seen)  # no plan is judged twice


def test_a_study_that_was_cut_short_ends_as_it_would_have(tmp_path):
    whole, _ = search(PROBLEM, BUDGET, evaluate, trials=12, journal=tmp_path / "whole", name="s")
    calls = 0

    def interrupted(allocation):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return evaluate(allocation)

    with pytest.raises(KeyboardInterrupt):
        search(PROBLEM, BUDGET, interrupted, trials=12, journal=tmp_path / "cut", name="s")
    resumed, _ = search(PROBLEM, BUDGET, evaluate, trials=12, journal=tmp_path / "cut", name="s")
    assert (resumed.allocation, resumed.loss) == (whole.allocation, whole.loss)


def test_a_finished_study_is_not_run_again(tmp_path):
    first, _ = search(PROBLEM, BUDGET, evaluate, trials=5, journal=tmp_path / "j", name="s")
    again, _ = search(
        PROBLEM, BUDGET, lambda a: pytest.fail("judged again"), trials=5, journal=tmp_path / "j", name="s"
    )
    assert again == first


def test_bending_by_nothing_is_nothing():
    assert bend(PROBLEM, 1.0, 0.0, {}) == PROBLEM
    weighted = bend(PROBLEM, 1.0, 0.0, {"attn.q_proj": 1.0})
    assert weighted["model.layers.0.attn.q_proj"][0].loss == pytest.approx(2.718281828)


def test_roles_have_no_numbers():
    assert role("model.layers.11.self_attn.q_proj") == "self_attn.q_proj"
    assert role("model.layers.3.mlp.experts.gate_up_proj") == "experts.gate_up_proj"
    assert role("transformer.wte") == "transformer.wte"
