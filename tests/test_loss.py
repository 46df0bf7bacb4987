import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from bitplan.planner.evaluate.compare import ComparisonRow
from bitplan.planner.evaluate.objective import measured
from bitplan.planner.report.tables import with_error
from bitplan.sensitivity.audit import audit, audit_cache
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.texts.text import Blocks
from tests import tiny

IDS = torch.randint(0, 256, (5, 20), generator=torch.Generator().manual_seed(2))


def test_a_model_beside_itself_loses_nothing():
    model = tiny.build("llama")
    evaluation = Reference(model, Blocks(IDS)).evaluate(model)
    assert (evaluation.kl, evaluation.delta_nll, evaluation.tokens) == (0, 0, 5 * 19)


@pytest.mark.parametrize("in_memory", [True, False])
def test_against_torchs_own_losses(in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr("bitplan.sensitivity.loss.IN_MEMORY", 0)
    model = tiny.build("llama")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter += 0.01
    evaluation = Reference(model, Blocks(IDS)).evaluate(other)
    log_p, log_q = (m(input_ids=IDS).logits[:, :-1].log_softmax(-1) for m in (model, other))
    labels = IDS[:, 1:]

    def nll(log):
        return torch.nn.functional.nll_loss(log.flatten(0, 1), labels.flatten(), reduction="none").view(5, 19)

    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert_close(evaluation.nll, float(nll(log_q).mean()), rtol=1e-5, atol=1e-6)
    assert_close(evaluation.kl, float(kl.mean()), rtol=1e-4, atol=1e-6)
    assert_close(evaluation.kl_se, float(kl.mean(-1).std() / 5**0.5), rtol=1e-3, atol=1e-6)
    delta = (nll(log_q) - nll(log_p)).mean(-1)
    assert_close(evaluation.delta_nll_se, float(delta.std() / 5**0.5), rtol=1e-3, atol=1e-6)


def test_one_block_has_no_standard_error(session_of):
    """In a profile, a plan and a comparison alike: null in files, nothing or a dash in text."""
    session = session_of("llama")
    one = Blocks(session.texts.search.ids[:1])
    session.texts = replace(session.texts, search=one)
    profile = audit(session, ("int4-g64",), tier="measured")
    rows = [row for row in profile.rows if row.measured_kl is not None]
    assert len(rows) == len(profile.units) and all(row.measured_nll_se is None for row in rows)
    assert {row.kl_se for row in audit_cache(session)} == {None}

    evaluation = Reference(session.model, one).evaluate(session.model)
    facts = measured(evaluation)
    assert facts.kl_se is None and facts.delta_nll_se is None and facts.kl == evaluation.kl
    line = ComparisonRow("native", evaluation=evaluation, resident_bytes=8, bits_per_weight=1.0, throughput=None)
    assert line.as_dict()["kl_se"] is None
    json.dumps(line.as_dict(), allow_nan=False)
    assert with_error("0.1", facts.kl_se) == with_error("0.1", evaluation.kl_se) == "0.1"
    assert with_error("0.1", 0.25, 2) == "0.1 ± 0.25"
