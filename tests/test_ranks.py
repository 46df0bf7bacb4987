"""An audit by two processes on gloo gives one process's figures."""

import os
import subprocess
import sys

import pytest
from torch.testing import assert_close

from bitplan.planner.cli import main
from bitplan.sensitivity.profile import Profile, read


def losses(path) -> dict[tuple[str, str], float]:
    return {(row.unit, row.format): row.predicted_nll for row in read(path, Profile).rows}


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun has no gloo rendezvous there")
def test_two_ranks_give_what_one_gives(checkpoint, tmp_path, monkeypatch):
    """Moments summed over the ranks' text, and the checked units shared out; the profile is written once."""
    model, one, two = checkpoint("llama-tied"), tmp_path / "one.json", tmp_path / "two.json"
    arguments = ["audit", str(model), "--tokens", "4096", "--block", "64", "--device", "cpu", "--check", "5"]
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
        # Each rank estimates from its own text by how much moments are shrunk.
        assert_close(losses(two)[pair], loss, rtol=5e-2, atol=1e-9)
    ours, theirs = read(one, Profile).check, read(two, Profile).check
    assert ours is not None and theirs is not None
    assert [row.unit for row in ours.rows] == [row.unit for row in theirs.rows]
    assert_close([r.measured_kl for r in theirs.rows], [r.measured_kl for r in ours.rows], rtol=1e-2, atol=1e-7)
    assert not list((tmp_path / "both").glob("*/statistics/back-*"))
