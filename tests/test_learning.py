"""Learned codes of a block: which of them are kept, and that they are worth it."""

from itertools import count

import pytest
import torch

from bitplan.formats.rounding.tuned import Learned
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.load import load_planned
from bitplan.planner.quantize import judge, segment
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.quantize.judge import Judge
from bitplan.planner.quantize.segment import Segment
from bitplan.planner.quantize.sequential import Sequence
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import States
from bitplan.sensitivity.texts.text import Blocks
from tests.test_sequence import planned

FIRST = 1
"""The first block's segment."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(segment, "STEPS", 20)
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))


def keep_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is learned, whatever it loses."""
    later = count()
    monkeypatch.setattr(Segment, "_loss", lambda self, tensors: -next(later))


def in_first_block(session: Session, scheme: str) -> dict[str, str]:
    """Choices for `planned`: a scheme for the first block's units, the others native."""
    path = session.chain().paths[0]
    return {u.name: scheme for u in session.graph.units if u.name.startswith(path + ".")} | {"*": "native"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_judged_model_loses_what_the_loaded_one_does(name, session_of, monkeypatch):
    session = session_of(name)
    monkeypatch.setattr(judge, "TOKENS", 128)  # two blocks of the search text
    plan = planned(session, in_first_block(session, "int2-g32/nearest"))
    steps = Sequence(plan, session)
    true, got = steps._segment(0, None, None)
    _, behind = steps._segment(FIRST, true, got)
    judged = Judge(session, steps.chain)
    assert judged.ids.shape == (2, 64)
    of_all = Reference(session.model, session.texts.calibration)
    judged.ids = session.texts.calibration.ids  # what this plan's hidden states are of
    expected = of_all.evaluate(load_planned(plan, session.source, "cpu")).kl
    assert expected > 0.01
    assert judged.kl(FIRST, behind) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_of_gptqs_codes_and_both_starts_the_least_loss_is_kept(which, session_of, monkeypatch):
    session = session_of("llama")
    plan = uniform_plan(session, "int2-g32", "tuned")
    seen: list[dict[str, dict[str, torch.Tensor]]] = []

    def loss(self: Segment, tensors: dict[str, dict[str, torch.Tensor]]) -> float:
        seen.append(tensors)
        return float((len(seen) - 1) % 3 != which)

    def tune(self: Segment, learned: dict[str, Learned], targets: States) -> None:
        for one in learned.values():
            one.high.data.mul_(1.2)

    monkeypatch.setattr(Segment, "_loss", loss)
    monkeypatch.setattr(Segment, "_tune", tune)
    steps = Sequence(plan, session)
    true, got = steps._segment(0, None, None)
    work = steps.segment(FIRST, true, got)
    made = work.round(steps.chain.units[FIRST])
    assert len(seen) == 3
    for name, tensors in made.items():
        assert all(torch.equal(tensor, seen[which][name][suffix]) for suffix, tensor in tensors.items())
        others = [each[name] for i, each in enumerate(seen) if i != which]
        assert not any(all(torch.equal(tensors[suffix], each[suffix]) for suffix in tensors) for each in others)
        unit = next(unit for unit in steps.chain.units[FIRST] if unit.name == name)
        weight = work.format(unit).dequantize(tensors, unit.columns, torch.float32)
        assert torch.equal(work.weight(unit), weight)  # the blocks behind run on what is kept


@pytest.mark.parametrize("few", [0.0, float("inf")])
def test_the_search_text_loses_no_more_than_by_gptq(few, session_of, monkeypatch):
    monkeypatch.setattr(segment, "FEW", few)
    session = session_of("llama")
    search = Blocks(Judge(session, session.chain()).ids)
    reference, losses = Reference(session.model, search), {}
    for rounding in ("gptq", "tuned"):
        plan = planned(session, in_first_block(session, f"int2-g32/{rounding}"))
        round_missing(plan, session)
        losses[rounding] = reference.evaluate(load_planned(plan, session.source, "cpu")).kl
    assert losses["tuned"] <= losses["gptq"] * (1 + 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tuned_leaves_a_block_no_farther_than_gptq(name, session_of, monkeypatch):
    """The first block's output on the same inputs, beside the full-precision block's."""
    monkeypatch.setattr(segment, "FEW", 0.0)
    keep_the_last(monkeypatch)
    session, errors = session_of(name), {}
    choices = {unit.name: "int8/nearest" for unit in session.graph.units if unit.kind in ("embedding", "tied")}
    for rounding in ("nearest", "gptq", "tuned"):
        steps = Sequence(planned(session, choices | {"*": f"int2-g32/{rounding}"}), session)
        true, got = steps._segment(0, None, None)
        expected, found = steps._segment(FIRST, true, got)
        text = slice(len(session.texts.calibration.ids))
        errors[rounding] = float((expected[text] - found[text]).square().mean())
    assert errors["tuned"] <= errors["gptq"] < 0.5 * errors["nearest"]


def test_from_weights_codes_stay_beside_the_weights_and_a_block_comes_closer(session_of, monkeypatch):
    session, errors = session_of("llama"), {}
    monkeypatch.setattr(segment, "STEPS", 60)
    keep_the_last(monkeypatch)
    for rounding in ("nearest", "tuned"):
        choices = {unit.name: "int8/nearest" for unit in session.graph.units if unit.kind == "embedding"}
        steps = Sequence(planned(session, choices | {"*": f"int3-g32/{rounding}"}), session)
        true, got = steps._segment(0, None, None)
        work = steps.segment(FIRST, true, got)
        units = steps.chain.units[FIRST]
        work.round(units)
        errors[rounding] = float((work.outputs(true, {})[:] - work.outputs(got, work.now)[:]).square().mean())
        for unit in units:
            weight, found = work.originals[unit.parameter], work.now[unit.parameter]
            step = (weight.amax() - weight.amin()) / 7  # at least that of any group
            assert (found - weight).abs().max() < 1.5 * step
    assert errors["tuned"] < 0.8 * errors["nearest"]
