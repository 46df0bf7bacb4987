"""The frontier against all allocations of small problems, and its price against the knapsack's own gain."""

import itertools
import json

import pytest
from hypothesis import given

from bitplan.formats.scheme import QuantScheme
from bitplan.planner.cli import main
from bitplan.search.frontier import frontier, knee, price_at
from bitplan.search.knapsack import Option, floor, hull, solve
from bitplan.search.problem import problem_of
from bitplan.sensitivity.profile import write
from tests.test_knapsack import problems
from tests.test_page import made_profile


@given(problems)
def test_each_point_is_the_best_for_its_bytes(problem):
    allocations = [(sum(o.nbytes for o in c), sum(o.loss for o in c)) for c in itertools.product(*problem.values())]
    points = frontier(problem)
    assert points[0].nbytes == floor(problem)
    for point in points:
        assert point.loss == pytest.approx(min(loss for size, loss in allocations if size <= point.nbytes), abs=1e-9)


@given(problems)
def test_prices_fall_and_no_allocation_beats_the_price(problem):
    """At a point's price, no allocation has less loss + price · bytes."""
    points = frontier(problem)
    allocations = [(sum(o.nbytes for o in c), sum(o.loss for o in c)) for c in itertools.product(*problem.values())]
    prices = [point.price for point in points]
    assert prices == sorted(prices, reverse=True)
    for point in points[1:]:
        least = min(loss + point.price * size for size, loss in allocations)
        assert point.loss + point.price * point.nbytes == pytest.approx(least, abs=1e-9)
    assert price_at(problem, points[-1].nbytes) == 0
    assert price_at(problem, points[0].nbytes) == (points[1].price if len(points) > 1 else 0)


def test_knee_and_hull():
    options = [Option(QuantScheme(f"f{i}", "nearest"), size, loss) for i, (size, loss) in
               enumerate([(10, 10.0), (20, 2.0), (25, 1.9), (30, 1.0), (100, 0.0)])]  # fmt: skip
    assert [o.nbytes for o in hull(options)] == [10, 20, 30, 100]
    assert knee(frontier({"g": options})).nbytes == 20


def test_the_command_prints_optimal_sizes_of_a_profile(tmp_path, capsys):
    """Each row is the knapsack's optimum for its bytes, the ends and the knee among them."""
    path, profile = tmp_path / "profile.json", made_profile(layers=3)
    write(path, profile)
    assert main(["frontier", str(path), "--points", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    options, kept = problem_of(profile).options, profile.unquantized_bytes
    assert [row["bytes"] for row in (rows[0], rows[-1])] == [floor(options) + kept, frontier(options)[-1].nbytes + kept]
    assert sum(row["knee"] for row in rows) == 1 and 5 <= len(rows) <= 6
    for row in rows:
        assert row["loss"] == pytest.approx(solve(options, row["bytes"] - kept).loss, rel=1e-4, abs=1e-9)
    assert main(["frontier", str(path), "--formats", "int4-g64,int8"]) == 0
    assert "knee" in capsys.readouterr().out
    assert main(["frontier", str(path), "--points", "1"]) == 2
    assert main(["frontier", str(path), "--formats", "fp8"]) == 2
    assert "no rows for fp8" in capsys.readouterr().err


def test_some_sizes_are_measured(checkpoint, tmp_path, capsys):
    """As the plan of the same bytes is, on the same text."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {i} cats sat on {i * 7} mats." for i in range(800)), encoding="utf-8")
    little = ["--text", str(text), "--tokens", "1024", "--block", "64", "--device", "cpu", "--json"]
    model, formats = str(checkpoint("llama-tied")), ["--formats", "int8,int4-g64,int2-g64"]
    page = tmp_path / "page.html"
    asked = ["frontier", model, *little, *formats, "--points", "4", "--measure", "2", "--html", str(page)]
    assert main(asked) == 0
    rows = json.loads(capsys.readouterr().out)
    measured = [row for row in rows if "measured_kl" in row]
    assert len(measured) == 2 and any(row["knee"] for row in measured)
    assert page.read_text(encoding="utf-8").count("measured plan") >= 2
    budget = ["--budget", f"{measured[1]['bytes']}B", "--trials", "1"]
    assert main(["plan", model, *little, *formats, *budget]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"] == measured[1]["measured_bytes"] <= measured[1]["bytes"]
    assert plan["shipped"] == "search"
    assert measured[1]["measured_kl"] == pytest.approx(plan["measured"]["kl"], rel=1e-5)


def test_a_profile_alone_cannot_be_measured(tmp_path, capsys):
    path = tmp_path / "profile.json"
    write(path, made_profile(layers=3))
    assert main(["frontier", str(path), "--measure", "2"]) == 2
    assert "name it in the profile's place" in capsys.readouterr().err
