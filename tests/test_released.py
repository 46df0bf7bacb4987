"""Files of every schema that there has been: they are read.

tests/released has plans of schemas 1 to 5, profiles of schemas 1 and 2, checkpoints that were saved with plans of
schemas 1 to 4, and a study as Optuna 5 keeps it. When a schema changes, add a file of the last one.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitplan
from bitplan.planner.hf.checks import resident_bytes
from bitplan.planner.plan import Plan
from bitplan.search.study import search
from bitplan.sensitivity.profile import Profile, read
from tests.test_study import BUDGET, PROBLEM, evaluate, mean

TOKENS = {
    1: [215, 7, 5, 50, 7, 12, 9, 252, 252, 12, 174, 124, 156, 108, 17, 18],
    2: [215, 7, 5, 50, 7, 12, 9, 252, 252, 12, 174, 124, 156, 108, 17, 18],
    3: [2, 226, 179, 177, 10, 24, 177, 226, 39, 212, 177, 102, 201, 115, 37, 160],
    4: [215, 7, 5, 128, 7, 12, 9, 252, 252, 12, 252, 14, 179, 16, 17, 18],
}
"""The saved checkpoints' most likely tokens after 3, 4, … 18."""
RELEASED = Path(__file__).parent / "released"
assert bitplan.__version__  # the import registers the checkpoints' quantization method


@pytest.mark.parametrize("schema", [1, 2, 3, 4, 5])
def test_plans_are_read(schema):
    plan = read(RELEASED / f"plan-{schema}.json", Plan)
    assert plan.schema_version == 6 and plan.packed and plan.unquantized
    assert plan.search.loss > 0 and plan.predicted.nll >= plan.predicted.bound
    if schema == 3:
        assert plan.workload.kv_format == "int8" and plan.kv_cache_loss.kl > 0
    assert (plan.latency is not None) == (schema == 5)


@pytest.mark.parametrize("schema", [1, 2])
def test_profiles_are_read(schema):
    profile = read(RELEASED / f"profile-{schema}.json", Profile)
    assert profile.schema_version == 3 and profile.rows and profile.unquantized


@pytest.mark.parametrize("schema", TOKENS)
def test_a_saved_checkpoint_loads(schema):
    model = AutoModelForCausalLM.from_pretrained(RELEASED / f"saved-{schema}").eval()
    assert resident_bytes(model) == model.config.quantization_config.plan.bytes
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    assert logits.isfinite().all() and logits.argmax(-1)[0].tolist() == TOKENS[schema]


def test_a_study_goes_on(tmp_path):
    def finished(allocation):
        raise AssertionError("its trials are all there")

    place = shutil.copy(RELEASED / "study-1.log", tmp_path)
    kept = {"journal": Path(place), "shared": True, "name": "s", "facts": {"budget": "28 bytes"}}
    found, _ = search(PROBLEM, BUDGET, finished, trials=4, **kept)
    assert found.trials == 4 and found.best.loss == pytest.approx(mean(found.best.allocation))
    longer, _ = search(PROBLEM, BUDGET, evaluate, trials=6, **kept)
    assert longer.trials == 6 and longer.best.loss <= found.best.loss
