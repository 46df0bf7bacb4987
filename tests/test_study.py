import math

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bitplan.formats.errors import BitplanError
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


class Killed(BaseException):
    """What Optuna does not catch: the trial stays RUNNING, as after SIGKILL."""


def trials(journal, state):
    study = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(journal))))
    return study.get_trials(states=(state,))


@pytest.mark.parametrize("killed_at", [1, 2, 5], ids=["first", "startup", "tpe"])
def test_a_killed_study_draws_and_ends_as_it_would_have(tmp_path, killed_at):
    whole, _ = search(PROBLEM, BUDGET, evaluate, trials=14, journal=tmp_path / "whole", name="s")
    calls = 0

    def killed(allocation):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise Killed
        return evaluate(allocation)

    with pytest.raises(Killed):
        search(PROBLEM, BUDGET, killed, trials=14, journal=tmp_path / "cut", name="s")
    assert len(trials(tmp_path / "cut", optuna.trial.TrialState.RUNNING)) == 1
    resumed, _ = search(PROBLEM, BUDGET, evaluate, trials=14, journal=tmp_path / "cut", name="s")
    assert resumed == whole
    drawn = [[t.params for t in trials(tmp_path / name, optuna.trial.TrialState.COMPLETE)] for name in ("whole", "cut")]
    assert drawn[0] == drawn[1]


def test_a_study_killed_before_its_first_trial_evaluates_the_knapsacks_plan_once(tmp_path, monkeypatch):
    whole, _ = search(PROBLEM, BUDGET, evaluate, trials=6, journal=tmp_path / "whole", name="s")

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(optuna.Study, "optimize", killed)
        search(PROBLEM, BUDGET, evaluate, trials=6, journal=tmp_path / "cut", name="s")
    resumed, _ = search(PROBLEM, BUDGET, evaluate, trials=6, journal=tmp_path / "cut", name="s")
    assert resumed == whole
    unbent = [t for t in trials(tmp_path / "cut", optuna.trial.TrialState.COMPLETE) if t.params["power"] == 1.0]
    assert len(unbent) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["first", "later"])
def test_a_loss_that_is_not_finite_is_infinitely_bad(tmp_path, bad, which):
    calls = []

    def some_bad(allocation):
        calls.append(allocation)
        assert len(calls) <= 10, "the study does not end"
        return bad if (len(calls) == 1) == (which == "first") else evaluate(allocation)

    best, _ = search(PROBLEM, BUDGET, some_bad, trials=10, journal=tmp_path / "j", name="s")
    assert best.trials == 10
    assert best.loss == evaluate(best.allocation)
    assert (best.trial == 0) == (which == "later")
    assert math.isinf(best.first_loss) == (which == "first")
    again, _ = search(PROBLEM, BUDGET, lambda a: pytest.fail("again"), trials=10, journal=tmp_path / "j", name="s")
    assert again == best


def test_a_study_without_any_finite_loss_is_one_sentence(tmp_path):
    for _ in range(2):  # also when it is read back
        with pytest.raises(BitplanError, match=r"none of the 4 plans that were tried has a finite loss"):
            search(PROBLEM, BUDGET, lambda a: math.nan, trials=4, journal=tmp_path / "j", name="s")


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
