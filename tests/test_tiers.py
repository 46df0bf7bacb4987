"""Losses by tier: measured from cached prefixes, around another format, a checked sample, and from weights alone."""

from statistics import median

import pytest
from scipy.stats import spearmanr
from torch.testing import assert_close

from bitplan.formats.errors import PlanMismatch, UsageError
from bitplan.formats.scheme import QuantScheme
from bitplan.planner.commands.audit import around_of
from bitplan.sensitivity.audit import Around, audit, measure_units
from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.measured import Prefixes

INT3, INT8 = QuantScheme("int3-g64", "nearest"), QuantScheme("int8", "nearest")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma2", "opt"])
def test_a_cached_prefix_gives_what_the_whole_model_gives(session_of, name):
    session = session_of(name)
    reference = Reference(session.model, session.texts.search)
    prefixes = Prefixes(Chain(session.model, session.graph, "cpu"), reference)
    units = session.graph.units
    for unit in {units[0], units[1], units[len(units) // 2], units[-1]}:
        weight = session.weight_cache.dequantized(unit, INT3)
        session.swapper.exchange(unit, weight)
        whole = reference.evaluate(session.model)
        session.swapper.restore(unit)
        found = prefixes.evaluate(unit.parameter, session.swapper.shaped(unit, weight))
        assert found.kl > 0
        assert_close(found.kl, whole.kl, rtol=1e-3, atol=1e-7)
        assert_close(found.delta_nll, whole.delta_nll, rtol=1e-3, atol=1e-6)


def test_around_a_format_the_others_are_in_it(session_of):
    session = session_of("llama-tied")
    around = around_of("int3-g64", session, "nearest")
    assert around == Around("int3-g64", {unit.name: INT3 for unit in session.graph.units})
    unit = session.graph.units[3]
    reference = Reference(session.model, session.texts.search)

    def whole(own: QuantScheme) -> float:
        for each in session.graph.units:
            scheme = own if each == unit else INT3
            session.swapper.exchange(each, session.weight_cache.dequantized(each, scheme))
        found = reference.evaluate(session.model).kl
        for each in session.graph.units:
            session.swapper.restore(each)
        return found

    profile = audit(session, ("int8", "int3-g64"), "nearest", "measured", around)
    rows = {(row.unit, row.format): row for row in profile.rows}
    assert (profile.tier, profile.around) == ("measured", "int3-g64")
    assert_close(rows[unit.name, "int8"].measured_kl, whole(INT8) - whole(INT3), rtol=1e-3, atol=1e-7)
    assert abs(rows[unit.name, "int3-g64"].measured_kl) < 1e-6
    assert rows[unit.name, "int8"].measured_kl < 0
    assert all(session.swapper.weight(u).equal(session.model.get_parameter(u.parameter)) for u in session.graph.units)


def test_around_what_is_no_format_or_another_models_plan(session_of, checkpoint):
    with pytest.raises(UsageError, match="unknown format 'int9'"):
        around_of("int9", session_of("llama"))
    with pytest.raises(PlanMismatch, match="was made for"):
        around_of("plans/demo-4-bpw.json", session_of("llama"))


def test_a_check_measures_a_sample_and_rescales(session_of):
    session = session_of("llama")
    plain, checked = audit(session, ("int4-g64", "int2-g64")), audit(session, ("int4-g64", "int2-g64"), check=6)
    check = checked.check
    assert check is not None and len({row.unit for row in check.rows}) == 6
    assert {row.format for row in check.rows} == {"int4-g64", "int2-g64"}
    units = session.swapper.units
    alone, *_ = measure_units(session, [(units[r.unit], QuantScheme(r.format, r.rounding)) for r in check.rows])
    assert [row.measured_kl for row in check.rows] == [evaluation.kl for evaluation in alone.values()]
    ratio = median(row.measured_kl / row.predicted_nll for row in check.rows)
    assert check.ratio == pytest.approx(ratio)
    ranks = spearmanr([r.predicted_nll for r in check.rows], [r.measured_kl for r in check.rows]).statistic
    assert check.spearman == pytest.approx(ranks)
    assert [r.predicted_nll for r in checked.rows] == pytest.approx([ratio * r.predicted_nll for r in plain.rows])


def test_weights_alone_run_no_text(session_of, monkeypatch):
    session = session_of("qwen3-moe")
    monkeypatch.setattr(type(session), "gather", lambda *_: pytest.fail("text was run"))
    session.model.forward = lambda *_, **__: pytest.fail("the model was run")
    profile = audit(session, ("int8", "int4-g64", "int2-g64"), tier="weights")
    losses = {(row.unit, row.format): row.predicted_nll for row in profile.rows}
    for unit in session.graph.units:
        own = [losses[unit.name, format] for format in (unit.native, "int8", "int4-g64", "int2-g64")]
        assert own == sorted(own) and own[0] == 0 and own[1] > 0, unit.name
    assert profile.tier == "weights"
