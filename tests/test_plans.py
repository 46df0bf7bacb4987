"""The embedded model's plans at three budgets: they fit, and are better than uniform."""

from pathlib import Path

import pytest

from bitplan.planner.plan import Plan
from bitplan.sensitivity.profile import read

ROOT = Path(__file__).parent.parent
PLANS = sorted((ROOT / "plans").glob("*.json"))


def test_there_are_three_budgets():
    assert len({read(path, Plan).budget.weights for path in PLANS}) == 3


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_keeps_its_promises(path):
    plan = read(path, Plan)
    assert plan.bytes <= plan.budget.weights
    assert plan.measured is not None and plan.uniform is not None and plan.uniform.measured is not None
    assert plan.measured.kl <= plan.uniform.measured.kl
    assert plan.uniform.bytes <= plan.budget.weights
