"""Candidates are rounded as plans are, and sharing work between them changes nothing."""

import pytest
import torch

from bitplan.planner.assemble import Finish, assemble, uniform_plan
from bitplan.planner.load import load_planned
from bitplan.planner.quantize.candidates import AT_ONCE, Candidates
from bitplan.planner.quantize.distillation import round_missing
from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.loss import log_probabilities
from bitplan.sensitivity.profile import unit_entry


def mixed(session, formats):
    """A plan by a function from unit names to formats."""
    plan, units = uniform_plan(session, "int4-g32"), [unit_entry(unit) for unit in session.graph.units]
    return assemble(units, plan.unquantized, plan.provenance, lambda u: formats(u.name), Finish(), "mixed", "search")


def weights(session, names):
    parameters = dict(session.model.named_parameters(remove_duplicate=False))
    return {name: parameters[session.swapper.units[name].parameter].clone() for name in names}


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_on_all_of_the_text_a_candidate_is_the_plan(session_of, name):
    session = session_of(name)
    plan = mixed(session, lambda unit: "int3-g32" if ".1." in unit else "int8" if "0.mlp" in unit else "int4-g32")
    before = weights(session, session.swapper.units)
    candidates = Candidates(session, tokens=1 << 20)
    segments, ids = candidates.round(plan), session.texts.search.ids
    of_block = candidates.log_probabilities(plan, segments)
    with candidates.exchanged(plan, segments) as model:
        whole = log_probabilities(model, ids)
    assert all(torch.equal(before[each], now) for each, now in weights(session, before).items())
    round_missing(plan, session)
    finished = log_probabilities(load_planned(plan, session.source, "cpu"), ids)
    torch.testing.assert_close(whole, finished, atol=2e-4, rtol=1e-3)
    for block in (len(ids) - 1, 0, 1):
        torch.testing.assert_close(of_block(block), whole[block : block + 1], atol=2e-5, rtol=1e-4)


def test_what_is_shared_up_to_a_block_changes_nothing(session_of, monkeypatch):
    session = session_of("llama")
    one = mixed(session, lambda unit: "int4-g32")
    other = mixed(session, lambda unit: "int2-g32" if "layers.1" in unit else "int4-g32")
    candidates, fresh, run = Candidates(session), Candidates(session), Chain.run
    ids = session.texts.search.ids
    text = range(0, len(ids), AT_ONCE)

    def evaluated(candidates, plan):
        of_block = candidates.log_probabilities(plan, candidates.round(plan))
        return torch.cat([of_block(block) for block in text])

    evaluated(candidates, one)
    assert (candidates.segments, candidates.shared, candidates.saved) == (4, 0, 0)
    ran = []
    monkeypatch.setattr(Chain, "run", lambda chain, segment, *parts: ran.append(segment) or run(chain, segment, *parts))
    of_block = candidates.log_probabilities(other, candidates.round(other))
    assert (candidates.segments, candidates.shared) == (8, 2)  # the embedding and the first block
    assert candidates.saved == pytest.approx(candidates.seconds(0) + candidates.seconds(1)) and candidates.saved > 0
    ran.clear()
    saved, found = candidates.saved, torch.cat([of_block(block) for block in text])
    assert ran == [2, 3] * len(text) and candidates.saved > saved  # and so is the text that ran through these
    torch.testing.assert_close(found, evaluated(fresh, other), rtol=0, atol=0)
    candidates.round(one)
    assert candidates.shared == 6
    monkeypatch.setattr("bitplan.sensitivity.session.IN_MEMORY", 1)  # nothing is kept but the last segment
    fresh.round(one)
    shared = fresh.shared
    torch.testing.assert_close(evaluated(fresh, other), found, rtol=0, atol=0)
    assert fresh.shared == shared
