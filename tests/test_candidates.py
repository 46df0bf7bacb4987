"""Candidates are rounded as plans are, and sharing work between them changes nothing."""

import pytest
import torch

from bitplan.planner.assemble import Finish, assemble, uniform_plan
from bitplan.planner.load import load_planned
from bitplan.planner.quantize.candidates import Candidates
from bitplan.planner.quantize.distillation import round_missing
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
    candidates.put(plan)
    ids = session.texts.search.ids[:2]
    with torch.no_grad():
        candidate = session.model(input_ids=ids).logits
    candidates.restore()
    assert all(torch.equal(before[each], now) for each, now in weights(session, before).items())
    round_missing(plan, session)
    with torch.no_grad():
        finished = load_planned(plan, session.source, "cpu")(input_ids=ids).logits
    torch.testing.assert_close(candidate, finished, atol=2e-4, rtol=1e-3)


def test_what_is_shared_up_to_a_block_changes_nothing(session_of, monkeypatch):
    session = session_of("llama")
    one = mixed(session, lambda unit: "int4-g32")
    other = mixed(session, lambda unit: "int2-g32" if "layers.1" in unit else "int4-g32")
    candidates, fresh = Candidates(session), Candidates(session)
    candidates.put(one)
    assert (candidates.segments, candidates.shared) == (4, 0)
    candidates.put(other)
    assert (candidates.segments, candidates.shared) == (8, 2)  # the embedding and the first block
    assert candidates.saved == pytest.approx(candidates.seconds(0) + candidates.seconds(1)) and candidates.saved > 0
    found = weights(session, session.swapper.units)
    fresh.put(other)
    assert all(torch.equal(found[name], now) for name, now in weights(session, found).items())
    candidates.put(one)
    assert candidates.shared == 6
    monkeypatch.setattr("bitplan.planner.quantize.candidates.IN_MEMORY", 1)  # nothing is kept but the last segment
    fresh.put(one)
    shared = fresh.shared
    fresh.put(one)
    assert fresh.shared == shared
