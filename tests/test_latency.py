"""Two limits, bytes and seconds: the knapsack against all allocations, the speed table, and the command's plans."""

import functools
import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitplan.formats.errors import BudgetInfeasible
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.planner.evaluate import finished, speed
from bitplan.planner.evaluate.speed import Speed, device_text, measure, shape_of
from bitplan.planner.evaluate.trials import Trials
from bitplan.planner.plan import Plan
from bitplan.planner.report.explain import explain_text, reasons, why
from bitplan.planner.report.page.plan import plan_page
from bitplan.search import knapsack
from bitplan.search.knapsack import GAP, Option, ceiling, floor, seconds_of
from bitplan.search.latency import fastest, solve
from bitplan.search.study import search
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.graph import build_graph
from bitplan.sensitivity.profile import Profile, read, unit_entry, write
from tests import tiny
from tests.test_cli import LITTLE, run  # noqa: F401 (fixture)
from tests.test_study import PROBLEM

options = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10), st.integers(0, 40)), min_size=1, max_size=4).map(
    lambda rows: [Option(QuantScheme(f"f{i}", "nearest"), *row[:2], row[2] / 1024) for i, row in enumerate(rows)]
)
problems = st.lists(options, min_size=1, max_size=5).map(lambda groups: {f"g{i}": g for i, g in enumerate(groups)})
shares = st.floats(0, 1)


@given(problems, shares, shares)
def test_equals_brute_force(problem, share, of_seconds):
    budget = floor(problem) + round(share * (ceiling(problem) - floor(problem)))
    every = [c for c in itertools.product(*problem.values()) if sum(o.nbytes for o in c) <= budget]
    times = sorted(seconds_of(c) for c in every)
    limit = times[0] + of_seconds * (times[-1] - times[0])
    best = min(sum(o.loss for o in c) for c in every if seconds_of(c) <= limit)
    solution = solve(problem, budget, seconds=limit)
    picked = [next(o for o in problem[g] if o.scheme == c) for g, c in solution.allocation.items()]
    assert seconds_of(picked) <= limit and sum(o.nbytes for o in picked) == solution.nbytes <= budget
    largest = max(o.loss for group in problem.values() for o in group)
    assert sum(o.loss for o in picked) == pytest.approx(solution.loss)
    assert solution.loss == pytest.approx(best, rel=2 * GAP, abs=1e-6 * largest)  # HiGHS' absolute gap
    assert solution.bound <= best * (1 + 1e-9) + 1e-9
    assert fastest(problem, budget).loss == pytest.approx(times[0], rel=2 * GAP, abs=1e-7)
    with pytest.raises(BudgetInfeasible, match="is the least within"):
        solve(problem, budget, seconds=times[0] * (1 - GAP) - 1e-6)


def sums(problem, value):
    """Of every allocation, one after the other."""
    return functools.reduce(np.add.outer, [[value(o) for o in options] for options in problem.values()]).ravel()


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_best_of_all_allocations_where_both_limits_bind(seed):
    """Halfway between the fewest seconds and those of the least loss within the bytes."""
    draw = random.Random(seed)

    def option(i, size):
        bits = draw.uniform(1, 16)
        loss = 4.0**-bits * draw.uniform(0.5, 2) * size
        return Option(QuantScheme(f"f{i}", "nearest"), int(size * bits), loss, draw.uniform(0.5, 2) * size)

    problem = {f"g{g}": [option(i, draw.choice((64, 256, 1024))) for i in range(6)] for g in range(6)}
    nbytes, times, losses = (sums(problem, lambda o, of=of: getattr(o, of)) for of in ("nbytes", "seconds", "loss"))
    budget = int(np.quantile(nbytes, 0.4))
    within = nbytes <= budget
    least = np.flatnonzero(within)[losses[within].argmin()]
    limit = float(times[least] + times[within].min()) / 2
    best = losses[within & (times <= limit)].min()
    assert best > losses[least]
    solution = solve(problem, budget, seconds=limit)
    picked = [next(o for o in problem[g] if o.scheme == c) for g, c in solution.allocation.items()]
    assert seconds_of(picked) <= limit and solution.nbytes <= budget
    assert best * (1 - 1e-9) <= solution.loss <= best * (1 + 2 * GAP) and solution.bound <= best * (1 + 1e-6)


@given(problems, shares)
def test_a_limit_that_does_not_bind_changes_nothing(problem, share):
    budget = floor(problem) + round(share * (ceiling(problem) - floor(problem)))
    assert solve(problem, budget, seconds=1e9) == solve(problem, budget) == knapsack.solve(problem, budget)


def test_studies_are_known_by_what_they_were_known_by():
    assert repr(Option(QuantScheme("int8", "nearest"), 3, 0.5, 0.25)) == repr(
        Option(QuantScheme("int8", "nearest"), 3, 0.5)
    )


def test_every_trial_keeps_to_the_seconds(tmp_path):
    """Larger options are slower: the bytes allow them all, the seconds a part."""
    problem = {
        group: [Option(o.scheme, o.nbytes, o.loss, o.nbytes / 100) for o in options]
        for group, options in PROBLEM.items()
    }
    seconds = {group: {o.scheme: o.seconds for o in options} for group, options in problem.items()}
    limit, seen = floor(problem) * 1.4 / 100, []

    def evaluate(allocation):
        seen.append(allocation)
        return [sum(o.loss for g, s in allocation.items() for o in problem[g] if o.scheme == s)]

    found, exact = search(
        problem, ceiling(problem), evaluate, trials=6, journal=tmp_path / "log", name="s", seconds=limit
    )
    assert found.trials == 6 and len(seen) > 1
    for each in (*seen, exact.allocation):
        assert sum(seconds[group][scheme] for group, scheme in each.items()) <= limit


# The speed table


def test_every_shape_is_timed_and_experts_by_their_share(monkeypatch, tmp_path):
    """Eight experts in a list, one of which runs a token."""
    monkeypatch.setattr(speed, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(speed, "PROMPT", 16)
    tiny.listing_experts(monkeypatch)
    source = sources.find(tiny.saved("llama", tmp_path / "model"))
    found = measure(source, ("int8", "int4-g64"), "cpu")
    write(tmp_path / "speed.json", found)
    assert read(tmp_path / "speed.json", Speed) == found
    units = [unit_entry(unit) for unit in build_graph(sources.load_model(source)).units]
    assert {shape_of(row) for row in found.rows} == {shape_of(unit) for unit in units}
    assert all(row.seconds > 0 for row in found.rows) and found.step > 0
    assert {row.format for row in found.rows} == {"fp32", "int8", "int4-g64"}
    experts = [unit.name for unit in units if ".experts." in unit.name]
    assert experts and found.calls == {name: pytest.approx(1 / 8) for name in experts}
    unit = next(unit for unit in units if unit.name in experts)
    one = next(row for row in found.rows if shape_of(row) == shape_of(unit) and row.format == "int8")
    assert found.seconds(unit, "int8") == pytest.approx(one.seconds / 8)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mixtral"])
def test_modules_of_every_kind_are_timed_as_they_are_packed(name, checkpoint, monkeypatch):
    monkeypatch.setattr(speed, "ROUND_SECONDS", 0.0)
    model = sources.load_model(sources.find(checkpoint(name)))
    for unit in build_graph(model).units:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for format in (unit.native, "int8", "int4-g32", "int3-g32-s4", "nf4"):
            if FORMATS[format].unavailable():
                continue
            taken = speed._of_unit(model, unit, format, unit.weights)
            assert (taken == 0) == (unit.kind == "experts" and format == unit.native)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("format", ["int8", "int3-g32-s4", "int4-g64", "nf4", "ternary-g32", "fp8"])
def test_repeated_rows_are_codes_of_the_format(format):
    torch.manual_seed(0)
    weight, row = torch.randn(200, 96), FORMATS[format]
    made = speed._codes(row, weight)
    assert {s: (tuple(t.shape), t.dtype) for s, t in made.items()} == row.specs(200, 96)
    values = row.dequantize(made, 96, torch.float32)
    assert torch.allclose(values[:64], row.dequantize(row.quantize(weight[:64]), 96, torch.float32))
    assert torch.equal(values[64:128], values[:64])


# The command

MS = {"fp32": 2.0, "int8": 1.0, "int4-g64": 0.25}
"""Of each unit in a format, in the table that these tests make up."""


@pytest.fixture
def asked(run, checkpoint, tmp_path):  # noqa: F811
    """asked(*words) → exit code, plan or None, stderr of `plan` by a profile and a table, within 9 bits a weight."""
    model, profile, file = checkpoint("llama"), tmp_path / "profile.json", tmp_path / "speed.json"
    formats = ("--formats", "int8,int4-g64")
    assert run("audit", model, *LITTLE, *formats, "--rounding", "nearest", "-o", profile)[0] == 0
    made = read(profile, Profile)
    units = made.units
    rows = {
        (shape_of(unit), format): {
            name: getattr(unit, name) for name in ("kind", "experts", "rows", "columns", "dtype")
        }
        | {"format": format, "seconds": MS[format] / 1e3}
        for unit in units
        for format in MS
    }
    table = {
        "model": "tiny",
        "config_sha256": sources.find(model).config_sha256,
        "device": device_text("cpu"),
        "versions": {"bitplan": "0"},
        "prompt": 16,
        "step": (MS["fp32"] * len(units) + 1) / 1e3,
        "rows": list(rows.values()),
        "calls": {},
    }
    assert {DTYPES[unit.dtype] for unit in units} == {"fp32"}

    def call(limit, *words, **changes):
        file.write_text(json.dumps(table | changes), encoding="utf-8")
        start = (
            "plan",
            model,
            "--profile",
            profile,
            "--bpw",
            "9",
            "--rounding",
            "nearest",
            "--device",
            "cpu",
            "--json",
        )
        code, out, err = run(*start, *(("--max-latency", limit) if limit else ()), "--speed", file, *words)
        return code, Plan.model_validate_json(out) if code == 0 else None, err

    call.units, call.profile, call.file = units, made, file
    return call


def milliseconds(plan):
    return 1 + sum(MS[unit.format] for unit in plan.units)


def test_the_seconds_force_what_the_bytes_do_not(asked):
    count, none = len(asked.units), ("--trials", "0")
    code, plan, err = asked("1s", *none)
    assert code == 0 and {unit.format for unit in plan.units} == {"int8"} and "is predicted, not measured" in err
    assert plan.latency.measured is None and plan.uniform.format == "int8"
    for limit in (1 + count / 4, 1 + count / 2):
        code, plan, _ = asked(f"{limit}ms", *none)
        assert code == 0 and milliseconds(plan) <= limit and plan.uniform.format == "int4-g64"
        assert plan.latency.predicted == pytest.approx(milliseconds(plan) / 1e3)
        assert ("int8" in {unit.format for unit in plan.units}) == (limit > 1 + count / 4)
    told = explain_text(reasons(plan, asked.profile))
    assert f"keeps to --max-latency {limit}ms: prices are of bytes alone" in told
    assert f"and --max-latency {limit}ms." in plan_page(reasons(plan, asked.profile)).lead
    forced = next(group for group in reasons(plan, asked.profile).groups if "int4-g64" in group.scheme)
    told = why(reasons(plan, asked.profile), forced)
    assert "would be better at the plan's price, which is of bytes alone" in told and "fit the bytes or the sec" in told


def test_a_limit_that_nothing_keeps_is_infeasible_and_says_the_least(asked):
    count = len(asked.units)
    code, _, err = asked(f"{count / 4}ms")
    assert code == 3 and f"within {asked_bytes(asked):,} bytes is {1 + count / 4:.4g} ms per token" in err
    assert "of which 1 ms are outside of the units" in err and "trials" not in err
    code, plan, _ = asked(err.partition("at least --max-latency ")[2].partition(",")[0], "--trials", "0")
    assert code == 0 and {unit.format for unit in plan.units} == {"int4-g64"}
    code, _, err = asked(f"{count / 2}ms", "--set", "*=int8")
    assert code == 3 and "drop an override" in err


def asked_bytes(asked):
    return asked("1s", "--trials", "0")[1].budget.weights


@pytest.mark.parametrize(
    ("limit", "words", "changes", "code", "told"),
    [
        ("9ms", (), {"config_sha256": "0" * 64}, 1, "the speed table is of tiny, whose config is another than that of"),
        ("9ms", (), {"device": "Abacus, 2 threads"}, 1, "was measured on Abacus, 2 threads, and this is"),
        ("9ms", ("--formats", "int8"), {"rows": []}, 2, "the speed table has no seconds for"),
        ("9ms", (), {"schema_version": 2}, 1, "reads up to 1"),
        ("9", (), {}, 2, "--max-latency '9' is no time above zero: write for example 30ms or 0.5s"),
        ("0ms", (), {}, 2, "no time above zero"),
        (None, (), {}, 2, "go together: give both"),
        ("9ms", ("--time", "5m"), {}, 2, "leave --time out"),
    ],
)
def test_what_is_wrong_is_one_sentence(asked, limit, words, changes, code, told):
    found, _, err = asked(limit, *words, **changes)
    assert found == code and told in err


def test_a_limit_on_the_loss_is_no_budget(asked, run, checkpoint):  # noqa: F811
    asked("1s", "--trials", "0")
    words = ("--max-loss", "1", "--max-latency", "9ms", "--speed", asked.file, "--device", "cpu")
    code, _, err = run("plan", checkpoint("llama"), *words)
    assert code == 2 and "leave the limit on the loss out" in err


def test_a_plan_that_is_slower_than_predicted_is_searched_for_again(asked, monkeypatch, run, tmp_path):  # noqa: F811
    """As loaded, each plan takes 1.3 times what the table says, and the limits of all trials are lowered by that."""
    count, seen = len(asked.units), []
    limit = 1 + 0.6 * count
    monkeypatch.setattr(finished, "decode_seconds", lambda *_: 1.3 * seen[-1])
    losses = Trials.losses

    def watched(self, allocation):
        seen.append(self.problem.seconds(allocation) + self.problem.latency.rest)
        assert seen[-1] <= self.problem.latency.aim + 1e-12
        return losses(self, allocation)

    monkeypatch.setattr(Trials, "losses", watched)
    code, plan, err = asked(f"{limit}ms", "--trials", "1", "-o", tmp_path / "plan.json")
    assert code == 0 and err.count("ms per token as loaded") == 2 and "above --max-latency" in err
    assert (
        1.3 * milliseconds(plan) == pytest.approx(1e3 * plan.latency.measured) and plan.latency.measured <= limit / 1e3
    )
    assert f"{1e3 * plan.latency.measured:.3f} ms measured as loaded" in run("show", tmp_path / "plan.json")[1]
    monkeypatch.setattr(finished, "decode_seconds", lambda *_: 3 * seen[-1])
    code, _, err = asked(f"{limit - 0.1}ms", "--trials", "1")  # a study that has not run yet
    least = float(err.partition("at least --max-latency ")[2].partition("ms")[0])
    assert (
        code == 3 and "as finished plans were measured" in err and 3 * (1 + count / 4) == pytest.approx(least, rel=0.03)
    )
    monkeypatch.setattr(finished, "decode_seconds", lambda *_: 1.001 * limit / 1e3)
    code, _, err = asked(f"{limit}ms", "--trials", "1")
    assert code == 1 and "after 4 tries that is still above the limit" in err
