"""A model that overflows in float16, and not in float32: its outputs are said not to be finite."""

from math import isnan

import pytest
import torch

from bitplan.formats.errors import OutputsNotFinite, PlanMismatch
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.evaluate.compare import compare
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts
from tests import tiny


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    model = tiny.build("llama", torch.float16)
    for name, parameter in model.named_parameters():
        if "up_proj" in name or "gate_proj" in name:
            parameter.normal_(std=2000)  # their product is beyond 65,504
    folder = tmp_path_factory.mktemp("overflowing")
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    source = sources.find(folder)
    return open_session(source, read_texts(source, tokens=512, length=32), device="cpu")


def test_a_plan_that_overflows_is_refused(session):
    objective = Objective(session)
    model = load_planned(uniform_plan(session, "int8", "nearest"), session.source, "cpu")
    assert isnan(objective.kl(model))  # a trial of a search may, and counts as bad
    with pytest.raises(OutputsNotFinite, match="are not finite in float16: name a checkpoint in bfloat16 or float32"):
        objective.heldout(model)


def test_a_plan_that_names_too_little_is_refused(session):
    plan = uniform_plan(session, "int8", "nearest")
    facts = plan.unquantized[0].model_copy(update={"name": "model.norm.nothing"})
    with pytest.raises(PlanMismatch, match="does not name"):
        load_planned(plan.model_copy(update={"unquantized": (facts,)}), session.source, "cpu")


def test_rows_that_overflow_say_so(session):
    rows = {row.name: row for row in compare(session, ("fp16", "bf16"), {}, device="cpu")}
    assert rows["bf16"].evaluation is not None
    assert rows["fp16"].evaluation is None and "not finite in float16" in str(rows["fp16"].note)
