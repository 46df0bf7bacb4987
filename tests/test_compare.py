"""Formats and plans side by side: tasks with intervals, pages, and rows that are not run again."""

import csv
import html
import json
import struct

import pytest
import torch
from filelock import FileLock, Timeout

import bitplan.planner.evaluate.compare
from bitplan import QuantizationManager
from bitplan.formats.errors import BitplanError, WriteFailed
from bitplan.planner.evaluate.compare import why_not
from bitplan.planner.evaluate.throughput import Throughput
from bitplan.sensitivity.loss import Reference
from tests.test_cli import LITTLE, run, text  # noqa: F401 (fixtures)


@pytest.fixture
def tasks(tmp_path):
    choice, prose = tmp_path / "choice.jsonl", tmp_path / "prose.jsonl"
    lines = [
        {"prompt": f"the {i} cats sat on", "choices": [" mats", " it", " xyz"], "answer": i % 3} for i in range(12)
    ]
    choice.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    prose.write_text(
        "\n".join(json.dumps({"text": f"the {i} cats sat on {i * 7} mats."}) for i in range(25)), encoding="utf-8"
    )
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
    with open(sheet, encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    told = page.read_text(encoding="utf-8")
    assert "<svg" in told and all(row["name"] in told for row in rows)
    assert run(*arguments, "--html", page)[0] == 2  # it exists

    monkeypatch.setattr(bitplan.planner.evaluate.compare, "Reference", None)  # nothing is run again
    assert json.loads(run(*arguments)[1])["rows"] == rows


def is_held(path) -> bool:
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def test_a_comparison_goes_on_where_it_was_cut_off(run, checkpoint, text, monkeypatch):  # noqa: F811
    arguments = ("compare", checkpoint("qwen3"), "--text", text, *LITTLE, "--formats", "fp32,bf16,fp8", "--json")
    measured, calls = bitplan.planner.evaluate.compare._measured, []

    def once(name, row, session, *rest):
        calls.append(name)
        # Another process would wait for this row.
        held = [is_held(path) for path in session.compared.glob("*.lock")]
        assert sum(held) == 1
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(name, row, session, *rest)

    monkeypatch.setattr(bitplan.planner.evaluate.compare, "_measured", once)
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
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    arguments = ("compare", checkpoint("llama"), "--text", text, *LITTLE, "--formats", "fp32", "--task")
    code, out, err = run(*arguments, bad)
    assert (code, out) == (2, "") and "bad.jsonl:2" in err
    assert run(*arguments, tmp_path / "none.jsonl")[0] == 2
    assert run(*arguments, bad, "--limit", "0")[0] == 2


class TestRowsThatFail:
    """Told in the table, in JSON, CSV and HTML alike; the others still run."""

    @pytest.fixture
    def told(self, run, checkpoint, text, tmp_path, monkeypatch):  # noqa: F811
        """told(row, why, more arguments…): compares fp32, fp8 and bf16 in a cache of its own."""
        monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))

        def check(failing: str, why: str, *more: object) -> None:
            page, sheet = tmp_path / "page.html", tmp_path / "sheet.csv"
            arguments = ("compare", checkpoint("llama"), "--text", text, *LITTLE, "--formats", "fp32,fp8,bf16", *more)
            code, out, err = run(*arguments, "--json", "--html", page, "--csv", sheet)
            assert code == 0, err
            rows = {row["name"]: row for row in json.loads(out)["rows"]}
            assert [name for name, row in rows.items() if row["note"]] == [failing]
            assert why in rows[failing]["note"] and rows[failing]["resident_bytes"] is None
            assert all(row["kl"] is not None for name, row in rows.items() if name != failing)
            with open(sheet, encoding="utf-8") as file:
                assert {row["name"]: row["note"] for row in csv.DictReader(file)}[failing] == rows[failing]["note"]
            assert html.escape(f"{failing}: {rows[failing]['note']}") in page.read_text(encoding="utf-8")
            table = run(*arguments)[1].splitlines()
            assert f"{failing}: {rows[failing]['note']}" in table
            assert sum(line.split("  ")[0] == failing and "–" in line for line in table) == 1

        return check

    def test_a_format_that_the_device_cannot_run(self, told, monkeypatch):
        monkeypatch.setattr("bitplan.formats.floats.Float8Format.unavailable", lambda self: "no device here has fp8")
        told("fp8", "fp8 cannot run here: no device here has fp8")

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ],
    )
    def test_no_memory_for_one(self, told, monkeypatch, error):
        evaluate = Reference.evaluate

        def evaluated(self, model, *rest):
            if model.dtype == torch.bfloat16:
                raise error
            return evaluate(self, model, *rest)

        monkeypatch.setattr(Reference, "evaluate", evaluated)
        told("bf16", "out of memory: give a smaller --block, or another --device")

    def test_no_memory_for_a_plans_codes(self, told, run, checkpoint, text, tmp_path, monkeypatch):  # noqa: F811
        plan = tmp_path / "plan.json"
        made = ("plan", checkpoint("llama"), "--text", text, *LITTLE, "--formats", "int4-g64", "--bpw", "6")
        assert run(*made, "--rounding", "nearest", "--trials", "0", "-o", plan)[0] == 0

        def refusing(*_):
            raise MemoryError

        monkeypatch.setattr("bitplan.planner.commands.compare.make_codes", refusing)
        told("plan.json", "out of memory", "--plan", plan)

    def test_other_errors_are_not_hidden(self, run, checkpoint, text, monkeypatch):  # noqa: F811
        monkeypatch.setattr("bitplan.planner.evaluate.compare.load_float", lambda *_: 1 / 0)
        code, out, err = run("compare", checkpoint("llama"), "--text", text, *LITTLE, "--formats", "fp16")
        assert (code, out) == (1, "") and "ZeroDivisionError" in err


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_bytes_are_those_of_the_loaded_tensors_and_of_the_saved_file(
    name,
    run,  # noqa: F811
    checkpoint,
    text,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """By two ways that know nothing of `resident_bytes`: storages by their addresses, and the file's data section."""
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    formats = (
        "fp32",
        "bf16",
        "fp8",
        "int8",
        "nf4",
        "int4-g64",
        "int3-row",
        "int2-g32-z16",
        "ternary-g64",
        "binary-g64",
    )
    held, saved = [], []

    def look(model, *_):
        tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
        held.append(sum(tensors.values()))
        model.save_pretrained(tmp_path / str(len(held)))
        with open(tmp_path / str(len(held)) / "model.safetensors", "rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
            saved.append(file.seek(0, 2) - 8 - header)
        return Throughput(1.0, 1.0, 1)

    monkeypatch.setattr(bitplan.planner.evaluate.compare, "run", look)
    arguments = ("compare", checkpoint(name, torch.bfloat16), "--text", text, *LITTLE, "--rounding", "nearest")
    code, out, err = run(*arguments, "--formats", ",".join(formats), "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert len(rows) == len(formats) and not any(row["note"] for row in rows)
    assert [row["resident_bytes"] for row in rows] == held == saved


def test_bad_words(run, checkpoint, tmp_path):  # noqa: F811
    asked = ("compare", checkpoint("llama"), *LITTLE, "--formats", "bf16,nf4")
    for code, told, *words in (
        (2, "--limit is the number of items of a task: give --task too", "--limit", "3"),
        (2, "unknown rounding 'magic': there are nearest", "--rounding", "magic"),
        (2, "bf16, nf4 cannot be rounded by 'awq', only by nearest", "--rounding", "awq"),
        (1, "cannot read", "--plan", tmp_path / "none.json"),
    ):
        found, out, err = run(*asked, *words)
        assert (found, out) == (code, "") and told in err


def test_a_full_disk_is_no_matter_of_one_row():
    assert why_not(BitplanError("no format")) == "no format"
    with pytest.raises(WriteFailed, match="cannot write"):
        why_not(WriteFailed("cannot write x"))
