"""Why a plan's units have their formats: prices against the profile, pins, and where the profile comes from."""

import json

import pytest

from bitplan.planner.assemble import Finish, quick_plan
from bitplan.planner.plan import Budget, Plan
from bitplan.planner.report.explain import explain_text, reasons, unit_text, why
from bitplan.planner.report.page.plan import plan_page
from bitplan.planner.report.page.render import render
from bitplan.search.frontier import frontier
from bitplan.search.overrides import Override
from bitplan.search.problem import problem_of
from bitplan.sensitivity.profile import Profile, read
from tests.test_cli import FORMATS_OPTION, LITTLE, run  # noqa: F401 (a fixture)
from tests.test_page import in_browser, made_profile  # noqa: F401 (a fixture)


def planned(profile: Profile, point: int, overrides: tuple[Override, ...] = ()) -> Plan:
    """The plan in the bytes of a point of the frontier, counted from the smallest."""
    problem = problem_of(profile, None, overrides)
    budget = frontier(problem.options)[point].nbytes + profile.unquantized_bytes
    return quick_plan(problem, Budget(requested="some bytes", weights=budget), Finish("nearest"))


def test_at_a_point_of_the_frontier_no_exchange_is_worth_it():
    """There the knapsack's optimum is the Lagrangian's: each smaller format loses at least the price of its bytes, each
    larger one gains at most that, and the next step has the price itself."""
    profile = made_profile(3)
    for point in (0, 7, 40, 80):
        found = reasons(planned(profile, point), profile)
        alternatives = [each for group in found.groups for each in group.alternatives]
        assert len(alternatives) == 12 * len(profile.units)
        assert not any(each.better for each in alternatives)
        gains = [-each.more_loss / each.more_bytes for each in alternatives if each.more_bytes > 0]
        losses = [-each.more_loss / each.more_bytes for each in alternatives if each.more_bytes < 0]
        assert max(gains) == pytest.approx(found.price)
        assert min(losses, default=float("inf")) >= found.price * (1 - 1e-9)
        rows = {(row.unit, row.format): row for row in profile.rows}
        for group in found.groups:
            own = rows[group.name, group.units[0].format]
            for each in group.alternatives:
                other = rows[group.name, each.scheme]
                assert each.more_bytes == other.bytes - own.bytes
                assert each.more_loss == pytest.approx(other.cost - own.cost)


def test_pins_are_named_and_rule_out():
    profile = made_profile(2)
    plan = planned(profile, 20, (Override("set", "*.1.mlp.up_proj", "int8"),))
    found = reasons(plan, profile)
    group = next(group for group in found.groups if group.name == "model.layers.1.mlp.up_proj")
    assert group.scheme == "int8" and not any(each.allowed for each in group.alternatives)
    assert why(found, group) == "pinned by --set '*.1.mlp.up_proj=int8', which leaves no other formats"
    assert "ruled out by an override" in unit_text(found, group.name)
    assert "override --set '*.1.mlp.up_proj=int8': 1 unit" in explain_text(found)
    page = render(plan_page(found))
    assert "<h2>Overrides</h2>" in page and "<h3" in page and "&lt;Model&gt; &amp; Co" in page


def test_the_page_of_a_plan_of_80_layers():
    profile = made_profile(80)
    plan = planned(profile, 900)
    page = render(plan_page(reasons(plan, profile)))
    assert len(page.encode()) < 1_000_000
    without = render(plan_page(reasons(plan, None)))
    assert "give --profile FILE" in without and all(unit.name in without for unit in plan.units)


def test_the_page_of_a_plan_in_a_browser(in_browser):  # noqa: F811
    profile = made_profile(4)
    told = in_browser(
        render(plan_page(reasons(planned(profile, 60), profile))),
        """
        told.overflow = document.documentElement.scrollWidth - innerWidth;
        const cells = [...document.querySelectorAll("svg.plot")[0].querySelectorAll(".mark.cell path")];
        told.colours = new Set(cells.map(cell => getComputedStyle(cell).fill)).size;
        """,
    )
    assert told["overflow"] <= 0 and told["colours"] > 2


def test_the_command(run, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    model, profile, plan, page = checkpoint("llama"), *(tmp_path / name for name in ("p.json", "plan.json", "p.html"))
    asked = ("audit", model, *LITTLE, *FORMATS_OPTION, "--rounding", "nearest", "-o", profile)
    assert run(*asked)[0] == 0
    assert run("plan", model, "--profile", profile, "--trials", "0", "--bpw", "6", "-o", plan)[0] == 0
    code, out, err = run("explain", plan, "--json", "--html", page)  # the profile is in the cache
    assert code == 0, err
    found = json.loads(out)
    assert found["price_per_byte"] > 0 and len(found["groups"]) == len({u.group for u in read(plan, Plan).units})
    assert f"<title>{model.name}</title>" in page.read_text(encoding="utf-8")
    code, out, _ = run("explain", plan, "--unit", "*.1.self_attn.k_proj")
    assert code == 0 and "shares one format with model.layers.1.self_attn.q_proj" in out and "Price: " in out
    code, out, err = run("explain", plan, "--unit", "nothing")
    assert (code, out) == (2, "") and "matches no unit; the first names are" in err
    code, out, err = run("explain", plan, "--html", page)
    assert (code, out) == (2, "") and "exists: give --force" in err

    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "empty"))
    code, out, err = run("explain", plan)
    assert code == 0 and "give --profile FILE" in out and "the cache has no profile" in err
    assert json.loads(run("explain", plan, "--json", "--profile", profile)[1]) == found
    other = tmp_path / "other.json"
    other.write_text(made_profile(1).model_dump_json(), encoding="utf-8")
    code, out, err = run("explain", plan, "--profile", other)
    assert (code, out) == (1, "") and "the plan for other weights" in err
