"""What a saved plan says of itself to those who find it."""

import re

import pytest
from huggingface_hub import ModelCard

from bitplan.planner.export.gptq_layout import LAYOUT
from bitplan.planner.plan import Plan
from bitplan.planner.report.model_card import OWN, card_text
from bitplan.sensitivity.profile import read
from tests.test_readme import ROOT


@pytest.fixture(scope="module")
def plan():
    return read(ROOT / "plans" / "demo-4-bpw.json", Plan)


@pytest.mark.parametrize("layout", [OWN, LAYOUT], ids=["own", "gptq"])
def test_a_card_is_read_by_the_hubs_reader(plan, layout):
    card = ModelCard(card_text(plan, layout))
    assert card.data.base_model == "model" and card.data.base_model_relation == "quantized"
    assert card.data.library_name == "transformers" and {"bitplan", *layout.tags} <= set(card.data.tags)
    snippet = re.search(r"```python\n(.*?)```", card.text, re.S)
    assert snippet and len(snippet.group(1).strip().splitlines()) <= 3
    m, uniform = plan.measured, plan.uniform
    for figure in (f"{plan.bytes:,}", f"{plan.budget.weights:,}", f"{m.ppl:.3f}", f"{m.kl:.5f}", uniform.format):
        assert figure in card.text
    assert "model.layers.*.mlp.down_proj" in card.text


def test_a_hub_model_is_named_whole_and_a_folder_by_its_name(plan):
    facts = plan.provenance
    for model, revision, told in (("org/model: a", "0123", "org/model: a"), ("/home/me/model", None, "model")):
        renamed = facts.model.model_copy(update={"id": model, "revision": revision})
        other = plan.model_copy(update={"provenance": facts.model_copy(update={"model": renamed})})
        text = card_text(other, OWN)
        assert ModelCard(text).data.base_model == told
        assert "/home" not in text
