"""An audit in parts: two processes on gloo, and a model that is read a block at a time, give one process's figures."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from bitplan.formats.errors import UsageError
from bitplan.formats.scheme import QuantScheme
from bitplan.planner.cli import main
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import measure_units
from bitplan.sensitivity.profile import Profile, read
from bitplan.sensitivity.session import open_session, read_texts


def losses(path) -> dict[tuple[str, str], float]:
    return {(row.unit, row.format): row.predicted_nll for row in read(path, Profile).rows}


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun has no gloo rendezvous there")
def test_two_ranks_give_what_one_gives(checkpoint, tmp_path, monkeypatch):
    """Moments summed over the ranks' text, and the checked units shared out; the profile is written once."""
    model, one, two = checkpoint("llama-tied"), tmp_path / "one.json", tmp_path / "two.json"
    arguments = ["audit", str(model), "--tokens", "1024", "--block", "64", "--device", "cpu", "--check", "5"]
    arguments += ["--formats", "int8,int4-g64,int2-g64", "--json", "-o"]
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "alone"))
    assert main([*arguments, str(one)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "BITPLAN_CACHE": str(tmp_path / "both"), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "bitplan.planner.cli", *arguments, str(two)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"predicted_nll"') == len(losses(one))
    assert losses(one).keys() == losses(two).keys()
    for pair, loss in losses(one).items():
        assert_close(losses(two)[pair], loss, rtol=2e-3, atol=1e-9)
    ours, theirs = read(one, Profile).check, read(two, Profile).check
    assert ours is not None and theirs is not None
    assert [row.unit for row in ours.rows] == [row.unit for row in theirs.rows]
    assert_close([r.measured_kl for r in theirs.rows], [r.measured_kl for r in ours.rows], rtol=1e-2, atol=1e-7)
    assert not list((tmp_path / "both").glob("*/statistics/back-*"))


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
    (expected, *_), (measured, *_) = measure_units(whole, pairs), measure_units(paged, pairs)
    for pair, evaluation in expected.items():
        assert_close(measured[pair].kl, evaluation.kl, rtol=1e-3, atol=1e-7)


def test_too_little_memory_is_refused_with_what_is_needed(checkpoint):
    source = sources.find(checkpoint("llama"))
    texts = read_texts(source, tokens=1024, length=64)
    with pytest.raises(UsageError, match=r"--max-memory 100\.00 MiB: this model needs about 600\.\d+ MiB"):
        open_session(source, texts, device="cpu", memory=100 << 20)
