import copy

import pytest
import torch
from torch.testing import assert_close

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
        monkeypatch.setattr("bitplan.sensitivity.store.IN_MEMORY", 0)
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
