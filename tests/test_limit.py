"""The fewest bytes within a loss, against all allocations, and as the command's plans."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.planner.assemble import Finish
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.evaluate.trials import Effort
from bitplan.planner.plan import Budget, Plan
from bitplan.planner.select import Selection
from bitplan.search.knapsack import solve
from bitplan.search.limit import SIZES, Tried, narrow, smallest
from bitplan.search.problem import problem_of
from bitplan.sensitivity.audit import audit
from tests.test_cli import FORMATS_OPTION, LITTLE, run, text  # noqa: F401 (fixtures)
from tests.test_knapsack import problems
from tests.test_study import PROBLEM


def facts(problem, allocation):
    taken = [next(o for o in problem[g] if o.scheme == scheme) for g, scheme in allocation.items()]
    return sum(o.nbytes for o in taken), sum(o.loss for o in taken)


def test_close_to_the_fewest_bytes_of_all_allocations():
    """Measured losses are 0.4 to 0.6 of the predicted ones, the more the larger the allocation."""

    problem = dict(list(PROBLEM.items())[:5])

    def measure(allocation):
        nbytes, loss = facts(problem, allocation)
        return loss * (0.4 + 0.2 * (nbytes - 10) / 20)

    allocations = [
        dict(zip(problem, c, strict=True))
        for c in itertools.product(*([o.scheme for o in each] for each in problem.values()))
    ]
    for limit in (4.0, 1.0, 0.3):
        best = min(facts(problem, each)[0] for each in allocations if measure(each) <= limit)
        tried = narrow(problem, limit, measure)
        found = smallest(tried, limit)
        assert found.loss == measure(found.allocation) <= limit
        assert best <= found.nbytes <= best + 1
        assert len(tried) <= SIZES
        assert narrow(problem, limit, lambda a: pytest.fail("measured again"), tried) == tried


@given(problems, st.floats(0, 12))
def test_what_is_found_is_within_the_limit_and_nothing_is_measured_twice(problem, limit):
    seen = []

    def measure(allocation):
        assert allocation not in seen
        seen.append(allocation)
        return facts(problem, allocation)[1]

    limit = max(limit, 1e-6)
    tried = narrow(problem, limit, measure)
    found = smallest(tried, limit)
    least = solve(problem, sum(max(o.nbytes for o in each) for each in problem.values())).loss
    assert (found is None) == (least > limit)
    if found is None:
        assert min(each.loss for each in tried) == pytest.approx(least)


def test_a_loss_that_is_not_finite_is_beyond_any_limit():
    sizes = {}

    def measure(allocation):
        nbytes, loss = facts(PROBLEM, allocation)
        sizes[nbytes] = loss
        return math.inf if nbytes < 30 else loss

    found = smallest(
        narrow(PROBLEM, 5.0, measure, [Tried({g: o[0].scheme for g, o in PROBLEM.items()}, 16, math.inf)]), 5.0
    )
    assert found is not None and found.nbytes >= 30


def check_limit(run, start, option, limit, *more):  # noqa: F811
    code, out, err = run(*start, option, limit, *more)
    assert code == 0 and "on held-out text" in err
    plan = Plan.model_validate_json(out)
    found, limit = plan.measured, float(limit.strip("%"))
    assert (found.kl <= limit) if option == "--max-loss" else (found.delta_nll <= math.log1p(limit / 100))
    assert plan.bytes <= plan.budget.weights
    assert (plan.search is None) == (more == ("--trials", "0")) and plan.uniform is not None


@pytest.mark.slow
def test_trials_help_to_find_fewer_bytes(run, checkpoint):  # noqa: F811
    start = ("plan", checkpoint("llama"), *LITTLE, *FORMATS_OPTION, "--json")
    check_limit(run, start, "--max-ppl-increase", "5%", "--trials", "3")


def test_plans_of_fewest_bytes_hold_the_limit_on_heldout_text(run, checkpoint, tmp_path):  # noqa: F811
    model, profile, output = checkpoint("llama"), tmp_path / "profile.json", tmp_path / "plan.json"
    assert run("audit", model, *LITTLE, *FORMATS_OPTION, "--rounding", "nearest", "-o", profile)[0] == 0
    start = ("plan", model, "--profile", profile, "--rounding", "nearest", "--device", "cpu", "--json")
    check_limit(run, start, "--max-loss", "0.3", "--trials", "0")
    fixed = ("--set", "*mlp*=int2-g64", "--trials", "0", "-o", output)
    code, _, err = run(*start, "--max-loss", "0.0001", *fixed)
    assert code == 3 and not output.exists()
    assert "KL of at most 0.0001 nats per token: the least that the formats" in err and "drop an override" in err
    for wrong, told in [
        (("--max-loss", "0"), "--max-loss must be above zero"),
        (("--max-loss", "nan"), "--max-loss must be above zero"),
        (("--max-ppl-increase", "0.01"), "no percentage: write for example 1%"),
        (("--max-loss", "1", "--bpw", "4"), "give the budget once"),
        (("--max-loss", "1", "--time", "5m"), "leave --time out"),
    ]:
        code, _, err = run(*start, *wrong)
        assert code == 2 and told in err


def test_several_budgets_are_several_plans(run, checkpoint, tmp_path):  # noqa: F811
    model, profile, output = checkpoint("llama"), tmp_path / "profile.json", tmp_path / "plan.json"
    assert run("audit", model, *LITTLE, *FORMATS_OPTION, "--rounding", "nearest", "-o", profile)[0] == 0
    start = ("plan", model, "--profile", profile, "--rounding", "gptq", "--device", "cpu", "--json", "-o", output)
    names = ("plan-4-bits-per-weight.json", "plan-6-bits-per-weight.json")
    code, out, _ = run(*start, "--bpw", "4", "--bpw", "6", "--trials", "0")
    assert code == 0
    plans = [Plan.model_validate(each) for each in json.loads(out)]
    assert [plan.budget.requested for plan in plans] == ["4 bits per weight", "6 bits per weight"]
    assert [Plan.model_validate_json((tmp_path / name).read_text("utf-8")) for name in names] == plans
    code, _, err = run(*start, "--bpw", "6", "--bpw", "3")
    assert code == 2 and "plan-6-bits-per-weight.json exists" in err


def test_a_finalist_is_evaluated_once_on_the_search_text(session_of, monkeypatch):
    session, evaluated = session_of("llama"), []
    problem = problem_of(audit(session, ("int8", "int4-g32", "int2-g32")))
    budget = Budget(requested="4", weights=session.model.num_parameters() // 2)
    blocks, kl = Objective.blocks, Objective.kl
    monkeypatch.setattr(Objective, "blocks", lambda s, model: evaluated.append(model) or blocks(s, model))
    monkeypatch.setattr(Objective, "kl", lambda s, model: evaluated.append(model) or kl(s, model))
    plan = Selection(problem, session, Finish(), Effort(2, 2), device="cpu").made(budget)
    finished = [model for model in evaluated if model is not session.model]
    assert len(finished) == len(plan.search.finalists) + 1  # the uniform one
