"""Files of every schema that there has been: they are read.

tests/released has plans of schemas 1 to 4, a profile of schema 1, and a checkpoint that was saved with a plan of
schema 3. When a schema changes, add a file of the last one.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitplan
from bitplan.planner.hf.checks import resident_bytes
from bitplan.planner.plan import Plan
from bitplan.sensitivity.profile import Profile, read

TOKENS = [2, 226, 179, 177, 10, 24, 177, 226, 39, 212, 177, 102, 201, 115, 37, 160]
"""The saved checkpoint's most likely tokens after 3, 4, … 18."""
RELEASED = Path(__file__).parent / "released"
assert bitplan.__version__  # the import registers the checkpoints' quantization method


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_plans_are_read(schema):
    plan = read(RELEASED / f"plan-{schema}.json", Plan)
    assert plan.schema_version == 4 and plan.packed and plan.unquantized
    assert plan.search.loss > 0 and plan.predicted.nll >= plan.predicted.bound
    if schema == 3:
        assert plan.workload.kv_format == "int8" and plan.kv_cache_loss.kl > 0


def test_a_profile_is_read():
    profile = read(RELEASED / "profile-1.json", Profile)
    assert profile.schema_version == 2 and profile.rows and profile.unquantized


def test_a_saved_checkpoint_loads():
    model = AutoModelForCausalLM.from_pretrained(RELEASED / "saved-3").eval()
    plan = read(RELEASED / "plan-3.json", Plan)
    assert resident_bytes(model) == plan.bytes
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    assert logits.isfinite().all() and logits.argmax(-1)[0].tolist() == TOKENS
