"""Experts in a module list, as remote code has them: scored, rounded, saved and loaded, reached by tokens or not."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitplan.planner.plan import Plan
from bitplan.sensitivity.profile import Profile
from tests import tiny
from tests.test_cli import LITTLE, run, text  # noqa: F401 (fixtures)


@pytest.fixture
def model(tmp_path, monkeypatch):
    tiny.listing_experts(monkeypatch)
    return tiny.saved("llama", tmp_path / "model")


def test_audit_plan_apply_and_reload(run, model, text, tmp_path):  # noqa: F811
    options = ("--text", text, *LITTLE, "--formats", "int8,int4-g32")
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    code, _, err = run("audit", model, *options, "-o", profile)
    assert code == 0, err
    assert "no calibration token reaches these experts" in err and "layers.0.mlp.experts.7.up_proj" in err
    read = Profile.model_validate_json(profile.read_text(encoding="utf-8"))
    experts = {unit.name for unit in read.units if ".experts." in unit.name}
    assert len(experts) == 2 * 8 * 3
    assert len({unit.group for unit in read.units if unit.name in experts}) == 2
    scores = {row.unit: row.predicted_nll for row in read.rows if row.format == "int4-g32"}
    assert all(math.isfinite(scores[name]) for name in experts)
    assert all((scores[name] == 0) for name in experts if ".experts.7." in name)

    code, _, err = run("audit", model, *options, "--per-expert", "-o", profile, "--force")
    assert code == 0, err
    groups = Profile.model_validate_json(profile.read_text(encoding="utf-8")).units
    assert len({unit.group for unit in groups if unit.name in experts}) == 2 * 8

    code, _, err = run("plan", model, *options, "--rounding", "gptq", "--bpw", "5.5", "--trials", "0", "-o", plan)
    assert code == 0, err
    made = Plan.model_validate_json(plan.read_text(encoding="utf-8"))
    assert {unit.rounding for unit in made.units if unit.name in experts and unit.format == "int4-g32"} <= {"gptq"}
    code, _, err = run("apply", plan, "--text", text, *LITTLE, "--save", tmp_path / "saved")
    assert code == 0, err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded.model.layers[0].mlp.experts[7]["up_proj"]).__name__ == "PackedLinear"
    original = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        found, expected = loaded(input_ids=ids).logits, original(input_ids=ids).logits
    assert (found - expected).norm() < 0.5 * expected.norm()
