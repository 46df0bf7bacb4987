"""The embedded model's plans at three budgets: they fit, and one, made again, measures as it says."""

from pathlib import Path

import pytest

from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL
from bitplan.planner.load import load, resident_bytes
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.session import load_reference, read_texts

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


def test_a_plan_is_what_it_says():
    plan, source = read(ROOT / "plans" / "demo-4-bpw.json", Plan), sources.find(MODEL)
    heldout = read_texts(source, files=[CALIBRATION], heldout=[HELDOUT]).heldout
    assert heldout.fingerprint == plan.provenance.text.heldout.sha256
    model = load(plan, MODEL, device="cpu", text=[CALIBRATION])
    assert resident_bytes(model) == plan.bytes
    # Another processor adds in another order: codes on an edge may fall otherwise.
    kl = Reference(load_reference(source, "cpu"), heldout).evaluate(model).kl
    assert kl == pytest.approx(plan.measured.kl, rel=0.05)
