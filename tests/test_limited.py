"""A model that is read a block at a time, within a memory limit, gives what a model in memory gives."""

import json
import platform
import re

import pytest
import torch
from torch.testing import assert_close

from bitplan.formats.errors import UsageError
from bitplan.formats.scheme import QuantScheme
from bitplan.planner.plan import Plan
from bitplan.sensitivity import session as sessions
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import Around, measure_units
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts
from tests.test_cli import run  # noqa: F401

TEXT = (platform.__file__, "--tokens", "1024", "--block", "64", "--device", "cpu")
LITTLE = (*TEXT, "--formats", "int8,int4-g64,int2-g64", "--trials", "2", "--bpw", "5")


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_a_model_read_a_block_at_a_time_gives_the_same(checkpoint, tmp_path, monkeypatch, name):
    source = sources.find(checkpoint(name, torch.bfloat16))
    texts = read_texts(source, tokens=1024, length=64)
    found = []
    for memory in (None, 2 << 30):
        monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / str(memory)))
        session = open_session(source, texts, device="cpu", memory=memory)
        session.gather()
        found.append((session, [session.store[unit] for unit in session.graph.units]))
    (whole, expected), (paged, streamed) = found
    assert next(whole.model.parameters()).dtype == torch.float32
    assert next(paged.model.parameters()).dtype == torch.bfloat16
    for ours, theirs in zip(streamed, expected, strict=True):
        for field in vars(theirs):
            if getattr(theirs, field) is not None:
                assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-4, atol=1e-7)
    for unit in whole.graph.units:
        assert torch.equal(whole.swapper.weight(unit), paged.swapper.weight(unit))
    schemes = [QuantScheme("int2-g64", rounding) for rounding in ("nearest", "gptq")]
    pairs = [(unit, schemes[i % 2]) for i, unit in enumerate(whole.graph.units) if unit.kind != "embedding"]
    others = Around("int4-g64", {unit.name: QuantScheme("int4-g64", "nearest") for unit in whole.graph.units})
    for around in (None, others):
        (expected, *_), (measured, *_) = (measure_units(session, pairs, around) for session in (whole, paged))
        for pair, evaluation in expected.items():
            assert_close(measured[pair].kl, evaluation.kl, rtol=1e-3, atol=1e-7)


def test_too_little_memory_is_refused_with_what_is_needed(checkpoint):
    source = sources.find(checkpoint("llama"))
    texts = read_texts(source, tokens=1024, length=64)
    with pytest.raises(UsageError, match=r"--max-memory 100\.00 MiB: this model needs about 700\.\d+ MiB"):
        open_session(source, texts, device="cpu", memory=100 << 20)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_plan_is_the_same_within_a_limit(run, checkpoint, tmp_path, monkeypatch, name):  # noqa: F811
    model, plans = checkpoint(name, torch.bfloat16), []
    monkeypatch.setattr(sessions, "PART", 1 << 20)  # all hidden states in files
    for limit in ((), ("--max-memory", "2GiB")):
        monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / str(len(limit))))
        path = tmp_path / f"{len(limit)}.json"
        code, _, err = run("plan", model, "--text", *LITTLE, *limit, "-o", path)
        assert code == 0, err
        plans.append(read(path, Plan))
    whole, limited = plans
    assert [(unit.name, unit.format) for unit in limited.units] == [(unit.name, unit.format) for unit in whole.units]
    assert_close(limited.measured.kl, whole.measured.kl, rtol=1e-2, atol=1e-6)
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "empty"))
    found = run("apply", path, "--text", *TEXT, "--max-memory", "2GiB", "--json")
    assert found[0] == 0, found[2]
    assert_close(json.loads(found[1])["kl"], limited.measured.kl, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "option", [("--heal",), ("--kv-dtype", "int8", "--context", "64"), ("--sample",), ("--task", "a.jsonl")]
)
def test_what_runs_the_whole_model_is_refused(run, checkpoint, option):  # noqa: F811
    code, out, err = run("plan", checkpoint("llama"), "--bpw", "5", "--max-memory", "2GiB", *option)
    assert (code, out) == (2, "") and f"{option[0]} runs the whole model in memory" in err


def test_a_limit_holds_the_plan_too(run, checkpoint, monkeypatch):  # noqa: F811
    """The plan is loaded to be measured."""
    monkeypatch.setattr(sessions, "PROGRAM", 0)
    model = checkpoint("llama", torch.bfloat16)
    _, _, err = run("audit", model, "--text", *TEXT, "--max-memory", "1B")
    enough = re.search(r"needs about ([0-9.]+ KiB) ", err)[1]
    more = f"{float(enough.split()[0]) + 0.01}KiB"
    code, _, err = run("plan", model, "--text", *LITTLE, "--max-memory", more)
    assert code == 2 and "second moments and logits, the plan's" in err
    assert run("plan", model, "--text", *TEXT, "--trials", "0", "--bpw", "5", "--max-memory", more)[0] == 0
