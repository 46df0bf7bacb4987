"""Formats and plans side by side: tasks with intervals, pages, and rows that are not run again."""

import csv
import json

import pytest

import planner.compare
from planner import QuantizationManager
from tests.test_cli import LITTLE, run, text  # noqa: F401 (fixtures)


@pytest.fixture
def tasks(tmp_path):
    choice, prose = tmp_path / "choice.jsonl", tmp_path / "prose.jsonl"
    lines = [
        {"prompt": f"the {i} cats sat on", "choices": [" mats", " it", " xyz"], "answer": i % 3} for i in range(12)
    ]
    choice.write_text("\n".join(map(json.dumps, lines)))
    prose.write_text("\n".join(json.dumps({"text": f"the {i} cats sat on {i * 7} mats."}) for i in range(25)))
    return choice, prose


def test_tasks_pages_and_finished_rows(run, checkpoint, text, tasks, tmp_path, monkeypatch):  # noqa: F811
    page, sheet = tmp_path / "page.html", tmp_path / "sheet.csv"
    arguments = (
        "compare",
        checkpoint("llama"),
        "--text",
        text,
        *LITTLE,
        "--formats",
        "fp32,int8,int2-g64",
        "--rounding",
    )
    arguments += ("nearest", "--task", *tasks, "--json")
    code, out, err = run(*arguments, "--html", page, "--csv", sheet)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["name"] for row in rows] == ["fp32", "uniform int8/nearest", "uniform int2-g64/nearest"] or len(
        rows
    ) == 3
    for row in rows:
        assert [task["task"] for task in row["tasks"]] == ["choice", "prose"]
        assert row["peak_bytes"] > row["resident_bytes"] and row["decode_tokens_per_s"] > 0
        for task in row["tasks"]:
            assert task["low"] <= task["difference"] <= task["high"]
            assert task["difference"] == pytest.approx(task["mean_other"] - task["mean_base"])
    fp32, int2 = rows[0]["tasks"][1], rows[2]["tasks"][1]
    assert fp32["difference"] == 0 and int2["difference"] != 0
    with open(sheet) as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    told = page.read_text()
    assert "<svg" in told and all(row["name"] in told for row in rows)
    assert run(*arguments, "--html", page)[0] == 2  # it exists

    monkeypatch.setattr(planner.compare, "Reference", None)  # nothing is run again
    assert json.loads(run(*arguments)[1])["rows"] == rows


def test_a_comparison_goes_on_where_it_was_cut_off(run, checkpoint, text, monkeypatch):  # noqa: F811
    arguments = ("compare", checkpoint("qwen3"), "--text", text, *LITTLE, "--formats", "fp32,bf16,fp8", "--json")
    measured, calls = planner.compare._measured, []

    def once(name, *rest):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(name, *rest)

    monkeypatch.setattr(planner.compare, "_measured", once)
    assert run(*arguments)[0] == 130
    code, out, _ = run(*arguments)
    assert code == 0 and len(json.loads(out)["rows"]) == 3
    assert len(calls) == 4


def test_the_manager_measures_both_sides(checkpoint, text, tasks):  # noqa: F811
    manager = QuantizationManager(checkpoint("llama-tied"), device="cpu")
    manager.load("bf16")
    found = manager.benchmark_accuracy(tasks[0], limit=6)
    assert found["items"] == 6 and found["task"] == "choice"
    assert found["difference"] == pytest.approx(found["quantized"] - found["baseline"])
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]


def test_bad_tasks(run, checkpoint, text, tmp_path):  # noqa: F811
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    arguments = ("compare", checkpoint("llama"), "--text", text, *LITTLE, "--formats", "fp32", "--task")
    code, out, err = run(*arguments, bad)
    assert (code, out) == (2, "") and "bad.jsonl:2" in err
    assert run(*arguments, tmp_path / "none.jsonl")[0] == 2
    assert run(*arguments, bad, "--limit", "0")[0] == 2


def test_advice_shows_what_was_measured_and_what_was_not(run, checkpoint, text):  # noqa: F811
    model = checkpoint("gpt2")
    asked = ("recommend", model, "--text", text, *LITTLE, "--for")
    code, out, _ = run(*asked, "training", "--json")
    found = json.loads(out)
    assert code == 0 and found["format"] == "bf16" and found["largest_activation"] > 0
    assert found["not_measured"] == ["bf16", "fp16"]
    assert run("compare", model, "--text", text, *LITTLE, "--formats", "bf16,int8")[0] == 0
    code, out, _ = run(*asked, "inference", "--json")
    found = json.loads(out)
    assert [row["name"] for row in found["rows"]] == ["bf16", "uniform int8"]
    assert found["not_measured"] == ["fp8", "int4-g128"]
    assert "--gpu 8GiB" in run(*asked, "fit", "--gpu", "8GiB")[1]
    assert run(*asked, "fun")[0] == 2
